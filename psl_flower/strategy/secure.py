"""The server's end of secure aggregation: who gives a sum together, in how many binary places, and what it comes to."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Container, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from psl_flower import tree
from psl_flower.errors import ConfigError, MembershipError, StepError
from psl_flower.exchange.streams import StreamOptions
from psl_flower.failures import Failure, Kind
from psl_flower.methods.base import SplitMethod, Stage
from psl_flower.population import Population
from psl_flower.privacy import FACTOR, Cohort, SecureAggregation, decode, places_for, secure_options
from psl_flower.protocol import Kind as LeafKind
from psl_flower.protocol import Orders
from psl_flower.samplers.base import Sampler
from psl_flower.samplers.turns import TurnsSampler
from psl_flower.tree import Tree

log = logging.getLogger("flwr.psl_flower")

# Note [Places]: how large the clients' own values are, the server cannot see. It takes them to be below 2^16 times the
# largest of the last sum, which nearly cancelled if that is wrong; then a client says so, the step is given up, and the
# next has as much more room. At first they are taken to be below 2^16.
_FIRST = _ROOM = 16


class SecureSums:
    """Sums that clients mask, in one run.

    Parameters
    ----------
    options : SecureAggregation
    max_norm : float, optional
        What clients scale their mean gradients down to.

    Attributes
    ----------
    session : str
        Names the run: each has new keys.
    """

    def __init__(self, options: SecureAggregation, max_norm: float | None = None) -> None:
        self.options, self.session, self._max_norm = options, secrets.token_hex(16), max_norm
        self._scaled = 0
        self._attempt = 0
        self._exponents: dict[str, int] = {}
        self._least: dict[str, int] = {}  # exponents that turned out to be needed

    def next_attempt(self) -> int:
        """Return the number of another attempt."""
        self._attempt += 1
        return self._attempt

    def cohort(self, stage: Stage, orders: Orders, attempt: int, keys: Mapping[int, bytes]) -> Cohort:
        """Return what the clients of a stage must know of each other."""
        size = len(orders)
        named = [np.frombuffer(keys.get(client) or bytes(32), dtype=np.uint8) for client in orders.clients.tolist()]
        exponents = {name: self._exponents.get(_name(stage, name, orders.test), _FIRST) for name in _sums(stage)}
        return Cohort(
            session=self.session,
            attempt=attempt,
            clients=orders.clients,
            counts=orders.counts,
            keys=np.stack(named),
            degree=self.options.degree(size),
            places={name: places_for(exponent, size) for name, exponent in exponents.items()},
            max_norm=self._max_norm,
        )

    def total(
        self,
        stage: Stage,
        name: str,
        value: Tree,
        cohort: Cohort,
        parameters: Mapping[str, Tensor] | None,
        *,
        test: bool,
    ) -> Tree:
        """Return what a sum comes to, once all have given their part.

        Parameters
        ----------
        value : tree
            The masked parts, added up.
        parameters : dict of str to Tensor, optional
            What it is the gradients of.
        test : bool
            Whether it is of test data.
        """
        if not tree.leaves(value):
            return value
        places, largest = cohort.places[name], 0.0

        def real(total: Tensor, like: Tensor) -> Tensor:
            nonlocal largest
            if not like.is_floating_point():
                return total.to(like.dtype)
            found = torch.from_numpy(decode(total.numpy(), places))
            largest = max(largest, float(found.abs().max()) if found.numel() else 0.0)
            return found.to(like.dtype)

        result: Tree = tree.map_leaves(real, value["values"], value["like"])
        if largest > 0:
            key = _name(stage, name, test)
            exponent = int(np.frexp(largest)[1]) + _ROOM
            self._exponents[key] = max(exponent, self._least.get(key, exponent))
        if parameters is None:
            return result
        if "scaled" in value:
            self._tell_scaled(name, *value["scaled"].tolist())
        there = dict(zip(sorted(parameters), value["present"].tolist(), strict=True))
        return {parameter: t if there[parameter] else None for parameter, t in result.items()}

    def _tell_scaled(self, name: str, clients: int, factors: int) -> None:
        self._scaled += clients
        if clients:
            mean = factors / FACTOR / clients
            log.warning(
                "%d clients scaled their %s gradients down to norm %.3g, by a factor of %.3g on average",
                *(clients, name, self._max_norm, mean),
            )

    def take_scaled(self) -> int:
        """Return how many contributions were scaled down since the last time."""
        scaled, self._scaled = self._scaled, 0
        return scaled

    def failed(self, stage: Stage, failures: Mapping[int, Failure], *, test: bool) -> None:
        """Give the sums of a stage more room, where a client's values were too large."""
        if not any(failure.kind is Kind.RANGE for failure in failures.values()):
            return
        for name in _sums(stage):
            key = _name(stage, name, test)
            self._exponents[key] = self._least[key] = self._exponents.get(key, _FIRST) + _ROOM

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to round as this one; keys are new in each."""
        return {"exponents": dict(self._exponents), "least": dict(self._least)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self._exponents, self._least = dict(state["exponents"]), dict(state["least"])


def check_secure(
    value: SecureAggregation | bool,
    method: SplitMethod,
    sampler: Sampler,
    streams: StreamOptions,
) -> SecureAggregation | None:
    """Return the options that people give; refuse what does not go with them.

    Raises
    ------
    ConfigError
        Naming what, and why.
    """
    options = secure_options(value)
    if options is None:
        return None
    with_it = "with secure_aggregation the server sees sums of clients only"
    if any(each.own or not each.batch for each in method.stages().values() if _sums(each)):
        raise ConfigError(f"{with_it}, method {method.name!r} adds up what clients keep for a round: use another")
    if isinstance(sampler, TurnsSampler):
        raise ConfigError(f"{with_it}, with method {method.name!r} a step is of one client: use another")
    if sampler.clients_draw:
        raise ConfigError(
            f"{with_it}, and small steps are joined; {type(sampler).__name__} has steps of any size, and who gives a "
            "sum together is told how many examples each has in it: use another"
        )
    if not streams.sum_gradients:
        raise ConfigError(f"{with_it}: it cannot have them one by one, leave sum_gradients=True in stream_options")
    return options


def check_all_are_here(population: Population, members: Container[int]) -> None:
    """Refuse to resume without some of the clients: steps since the checkpoint may have been made with them.

    Made again at the same weights without one of them, the difference of two sums would be its own.

    Raises
    ------
    MembershipError
        Naming those that are missing.
    """
    missing = [int(client) for client in population.client_ids[population.sizes > 0] if int(client) not in members]
    if missing:
        raise MembershipError(
            f"with secure_aggregation a run is resumed with all its clients, {len(missing)} are not connected (the "
            f"first is client {missing[0]}): start them, or begin anew without resume_from"
        )


def check_given_alike(name: str, values: Iterable[Tree]) -> None:
    """Raise StepError if some clients gave a masked sum, and others said that there is none."""
    if len({not tree.leaves(value) for value in values}) > 1:
        raise StepError(f"some clients gave a sum of {name}, others none: their masks do not cancel")


def _sums(stage: Stage) -> list[str]:
    return [name for name, kind in stage.outputs.items() if kind is LeafKind.SUM]


def _name(stage: Stage, name: str, test: bool) -> str:
    return f"{'test ' if test else ''}{stage.name} {name}"
