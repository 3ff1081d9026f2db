"""What a method is given on the server: the clients of a step, the server's parts, and the commit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from psl_flower import tree
from psl_flower.errors import ConfigError, DivergenceError, StepError
from psl_flower.exchange.validation import Validator
from psl_flower.failures import Failure, Kind
from psl_flower.methods.base import SplitMethod, Stage
from psl_flower.protocol import Config, Leaf, Orders, Part, Reply, Request, Weights, step_seed
from psl_flower.protocol import Kind as LeafKind
from psl_flower.server import SUMMED, LocalBackend, NothingCountsError, Outcome, PartCopy, ServerPart
from psl_flower.strategy.attempt import Attempt, LostClientsError, TooFewError
from psl_flower.strategy.gathering import gather
from psl_flower.strategy.kept import KeptRows, is_kept
from psl_flower.strategy.secure import SecureSums, check_given_alike
from psl_flower.tree import Tree

Exchange = Callable[[Request], Reply]

_MOST_SEPARATE = 2**26  # bytes of sums that are asked for client by client to learn how large they usually are


ALONE = (
    "a step or an evaluation of one client only: what it would tell of its loss is of its own labels, so loss and "
    "accuracy of it are not told (nan)"
)


@dataclass(frozen=True, eq=False, kw_only=True)
class Asking:
    """How a context asks clients.

    Parameters
    ----------
    exchange : callable
        Takes a request whose nodes are client ids, and returns the reply.
    validator : Validator
    separate : bool
        Whether sums are wanted client by client.
    config, evaluate_config : dict
        Sent along.
    refuse : callable
        Told of failures, and the name of the stage; raises where they end the run.
    secure : SecureSums, optional
        Where clients mask their sums.
    keys : callable
        Returns the clients' public keys, by client.
    texts : bool
        Whether rows may differ in length.
    kept : KeptRows, optional
        What clients are not asked for again.
    """

    exchange: Exchange
    validator: Validator
    separate: bool = False
    config: Config = field(default_factory=dict)
    evaluate_config: Config = field(default_factory=dict)
    refuse: Callable[[Mapping[int, Failure], int, str], None]
    secure: SecureSums | None = None
    keys: Callable[[], Mapping[int, bytes]] = dict
    texts: bool = False
    kept: KeptRows | None = None


class CallContext:
    """Asks the clients of one batch, and holds the parts that run on the server.

    Parts are attributes: ``ctx.body.forward_backward(...)``.
    """

    def __init__(
        self,
        method: SplitMethod,
        backend: LocalBackend,
        asking: Asking,
        orders: Orders,
        *,
        seed: int,
        delays: Mapping[int, float] | None = None,
    ) -> None:
        self.method, self.backend, self.orders = method, backend, orders
        self._asking, self._seed, self._delays = asking, seed, dict(delays or {})
        self._weights: Mapping[str, Weights] = backend.weights()
        self._secure_attempt: int | None = None
        self.given = False  # masked sums, which clients do once
        self.lost: dict[int, Failure] = {}  # clients that are not in it any more, and why

    def __getattr__(self, name: str) -> ServerPart:
        method = self.__dict__.get("method")
        if method is None or method.parts.get(name) != "server":
            raise AttributeError(f"there is no part {name!r} on the server")
        part: ServerPart = self.backend.part(name, self._seed, training=not self.orders.test)
        return part

    @property
    def clients(self) -> list[int]:
        """The clients of the batch, ascending."""
        return [int(client) for client in self.orders.clients]

    def outcome(self, loss: Tensor, score: Tensor | None) -> Outcome:
        """Return what is told of a batch whose loss the clients have computed.

        Parameters
        ----------
        loss : (2,) or (5,) tensor
            The sum over what is told of the batch, and what counts in that; what counts in all; for how many clients
            the loss is a sum and no mean, and for how many it, or its gradients, are not finite.
        score : (2,) tensor or None
            Right predictions, and those that count, where it is classification.

        Raises
        ------
        NothingCountsError
            If nothing counts, in training.
        DivergenceError
            If it is not finite, in training.
        """
        total, told, *more = loss.tolist()
        weight, summed, wrong = more or (told, 0.0, 0.0)
        if self.backend.bound is not None and not self.orders.test and (weight != self.orders.num_rows or summed):
            raise ConfigError(
                f"DP-SGD needs a loss that is the mean over the examples, clients tell {weight:g} targets that count "
                f"of {self.orders.num_rows} examples: no weights, none ignored, no sum"
            )
        if not weight and not self.orders.test:
            raise NothingCountsError("no target of the batch counts in the loss")
        if wrong and not self.orders.test:
            raise DivergenceError(
                "the loss or its gradients are not finite: training diverges, lower the learning rate"
            )
        if summed:
            self.backend.tell_once(SUMMED)
        if weight and not told and not wrong:
            self.backend.tell_once(ALONE)
        right = None if score is None else (int(score[0]), int(score[1]))
        mean = math.nan if wrong or not told else total if summed else total / told
        return Outcome(mean, told, None, None, self.orders.num_rows, right, None, summed=bool(summed))

    def _request(self, stage: Stage, orders: Orders, inputs: Mapping[str, Tree]) -> Request:
        if set(inputs) != set(stage.inputs):
            raise ConfigError(
                f"stage {stage.name!r} takes {', '.join(stage.inputs) or 'nothing'}, got {', '.join(inputs)}"
            )
        clients = tuple(orders.clients.tolist())
        first, secure, cohort = stage.after is None, self._asking.secure, None
        each = secure is None and not self.orders.test and self._asking.validator.wants_each(stage)
        size = sum(tree.num_bytes(dict(part.parameters)) for part in self._weights.values())
        if secure is not None and LeafKind.SUM in stage.outputs.values():
            if len(orders) < secure.options.least:
                raise TooFewError
            self._secure_attempt = self._secure_attempt or secure.next_attempt()
            cohort = secure.cohort(stage, orders, self._secure_attempt, self._asking.keys())
            self.given = True
        return Request(
            stage=stage.name,
            nodes=clients,
            orders=orders,
            weights={} if stage.own else self._weights,
            inputs={name: Leaf(kind, inputs[name]) for name, kind in stage.inputs.items()},
            delays=tuple(self._delays.get(c, 0.0) for c in clients) if first and self._delays else (),
            separate=self._asking.separate or (each and size * len(orders) <= _MOST_SEPARATE),
            cohort=cohort,
            precision=self.backend.precision,
            config=self._asking.config,
            evaluate_config=self._asking.evaluate_config if orders.test else {},
        )

    def _ask(self, stage: Stage, request: Request) -> tuple[list[Part], dict[int, Failure]]:
        """Return what clients give, or gave before and is kept, and what is wrong with those that give nothing."""
        kept, orders = self._asking.kept, request.orders
        if kept is None or orders is None or not is_kept(stage):
            return self._ask_all(stage, request)
        there, missing, examples = kept.find(stage, orders, self._weights.values())
        if not missing:
            return there, {}
        parts, failures = self._ask_all(stage, replace(request.take(missing), kept=True))
        kept.put(stage, orders, examples, parts)
        return there + parts, failures

    def _ask_all(self, stage: Stage, request: Request) -> tuple[list[Part], dict[int, Failure]]:
        reply = self._asking.exchange(request)
        expected = {name: weights.parameters for name, weights in self._weights.items()}
        checked = self._asking.validator.check(stage, request, reply, expected)
        if self._asking.secure is not None:
            self._asking.secure.failed(stage, checked.failures, test=self.orders.test)
        return checked.parts, checked.failures

    def _gather(self, stage: Stage, request: Request | None, parts: list[Part], asked: Orders, clip: Any) -> Any:
        sent = gather(stage, parts, self.orders, asked, clip, texts=self._asking.texts)
        secure, cohort = self._asking.secure, None if request is None else request.cohort
        if secure is not None and cohort is not None:
            for name in [name for name, kind in stage.outputs.items() if kind is LeafKind.SUM]:
                check_given_alike(name, [part.outputs[name].value for part in parts])
                weights, total = self._weights.get(name), getattr(sent, name)
                parameters = None if weights is None else weights.parameters
                setattr(sent, name, secure.total(stage, name, total, cohort, parameters, test=self.orders.test))
        return sent

    def _once_more(
        self, stage: Stage, request: Request, failures: Mapping[int, Failure]
    ) -> tuple[list[Part], dict[int, Failure]]:
        """Ask those again that failed and had contributed before; return what comes of it."""
        at = {client: i for i, client in enumerate(request.nodes)}
        parts: list[Part] = []
        left: dict[int, Failure] = {}
        for some in _apart(failures):
            more, still = self._ask(stage, request.take([at[client] for client in some]))
            parts += more
            left |= still
        self._asking.refuse(left, len(request.nodes), stage.name)
        return parts, left


class StepContext(CallContext):
    """One attempt at a step, with the clients that have not been lost from it.

    Parameters
    ----------
    enough : float
        Examples that the step needs.
    """

    def __init__(self, *arguments: Any, enough: float, attempt: Attempt, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._enough, self._attempt, self.lost = enough, attempt, attempt.lost
        self._first: dict[str, list[Part]] = {}  # replies that do not depend on who takes part, by stage
        self._begun = False
        self.committed = False
        self.clip: Callable[[list[Part], str], list[Part]] | None = None
        self.labels: Tree = None

    def without(self, lost: Mapping[int, Failure]) -> None:
        """Go on without some clients, from the beginning; what the others have sent first stays."""
        self.lost |= lost
        if self.given:
            raise TooFewError  # they would have to give their sums again
        self._leave_out(lost)
        self._begun = False

    def _leave_out(self, lost: Iterable[int]) -> None:
        self.orders = self.orders.without(lost)
        if self.orders.num_rows < max(self._enough, 1):
            raise TooFewError

    def call(self, function: Any, **inputs: Tree) -> Any:
        """Ask all clients of the step for a stage at once.

        Parameters
        ----------
        function : stage of the method
        inputs : trees
            What it takes, by name: ROWS in the order of the clients, EACH as a list, SHARED as it is.

        Returns
        -------
        namespace
            What it gives, by name: ROWS joined, SUM added up, EACH as a list.

        Raises
        ------
        LostClientsError, TooFewError
            If clients fail; not for the method to catch.
        """
        stage: Stage = function.stage
        if self._begun and self._nothing_to_give(stage):
            return SimpleNamespace(**{name: {} for name in stage.outputs})
        parts, request = self._first.get(stage.name) if not self._begun and not inputs else None, None
        if parts is None:
            request = self._request(stage, self.orders, inputs)
            parts, failures = self._ask(stage, request)
            if failures:
                again = {} if request.cohort is not None else failures if self._begun else _joint(failures)
                self._asking.refuse(_own(failures) if again else failures, len(request.nodes), stage.name)
                more, still = self._once_more(stage, request, again) if again else ([], {})
                parts += more
                failures = {client: why for client, why in failures.items() if client not in again} | still
            if failures and self._begun and not self.given:
                raise LostClientsError(failures)
            self.lost |= failures
            if failures and self.given:
                raise TooFewError
            if not self._begun and not inputs and LeafKind.SUM not in stage.outputs.values():
                self._first[stage.name] = parts
            if failures:
                self._leave_out(failures)
        self._begun = True
        self._remember_checksums(parts)
        sent = self._gather(stage, request, parts, self._attempt.orders, self.clip)
        if "labels" in stage.outputs and not self.orders.test:
            self._attempt.labels = sent.labels
        return sent

    def _nothing_to_give(self, stage: Stage) -> bool:
        """Whether all that a stage gives are gradients of parts of which nothing trains: nobody needs to be asked."""
        parts = [self._weights.get(name) for name, kind in stage.outputs.items() if kind is LeafKind.SUM]
        return 0 < len(parts) == len(stage.outputs) and all(part and not part.parameters for part in parts)

    def _remember_checksums(self, parts: list[Part]) -> None:
        if self.orders.checksums is not None or any(part.checksums is None for part in parts):
            return
        found = {n: c for part in parts for n, c in zip(part.nodes, part.checksums.tolist(), strict=True)}  # type: ignore[union-attr]
        self.orders = replace(self.orders, checksums=np.array([found[c] for c in self.orders.clients.tolist()]))

    @property
    def rate(self) -> Tensor:
        """What a schedule has made of the learning rate so far, as a factor, for clients: () float64."""
        return torch.tensor(self.backend.rate, dtype=torch.float64)

    @property
    def divisor(self) -> int:
        """What the losses of the step's examples are divided by: their number, but where that may not be known."""
        return self.backend.divisor(self.orders.num_rows)

    def copy(self, part: str, client: int) -> PartCopy:
        """Return a client's copy of a part on the server, which lives until the end of the round."""
        at = self.clients.index(client)
        first = int(self.orders.counts[:at].sum())
        return self.backend.copy_of(part, client, step_seed(self._seed, 0, 0, client), first)

    def commit(self, **gradients: Mapping[str, Tensor | None] | None) -> None:
        """Step the optimizer over all parts, with their gradients by part."""
        self.backend.commit(gradients)
        self.committed = True


class EvaluationContext(CallContext):
    """Evaluation of some test examples."""

    def call(self, function: Any, **inputs: Tree) -> Any:
        """Ask all clients for a stage at once, in evaluation mode; as in `StepContext.call`."""
        stage: Stage = function.stage
        request = self._request(stage, self.orders, inputs)
        parts, failures = self._ask(stage, request)
        asked = self.orders
        if failures:
            self.lost |= failures
            if inputs or self.given:
                raise LostClientsError(failures)
            self.orders = self.orders.without(failures)
            if not len(self.orders):
                raise TooFewError
        return self._gather(stage, request, parts, asked, None)


class RoundContext(CallContext):
    """What comes before and after the steps of a round, with all its clients.

    Attributes
    ----------
    orders : Orders
        Of the clients that are left; `counts` are the examples that each holds, or has used, of the round.
    lost : dict of int to Failure
        The clients that are out of the round.
    """

    def call(self, function: Any, **inputs: Tree) -> Any:
        """Ask all clients for a stage at once, as in `StepContext.call`; go on without those that fail.

        Raises
        ------
        StepError
            If nobody is left.
        """
        stage: Stage = function.stage
        request = self._request(stage, self.orders, inputs)
        parts, failures = self._ask(stage, request) if len(self.orders) else ([], {})
        self._asking.refuse(_own(failures), len(request.nodes), stage.name)
        again = {client: why for client, why in failures.items() if why.kind is not Kind.LEFT_OUT}
        if again:
            more, still = self._once_more(stage, request, again)
            parts += more
            failures = {client: why for client, why in failures.items() if client not in again} | still
        asked = self.orders
        self.lost |= failures
        self.orders = asked.without(failures)
        if not len(self.orders):
            raise StepError(f"no client is left for {stage.name}", self.lost)
        return self._gather(stage, request, parts, asked, None)

    def assign(self, **parts: Mapping[str, Tensor]) -> None:
        """Give parts of the master other values, by whole-model name."""
        self.backend.assign(parts)

    def average_copies(self, part: str) -> dict[str, Tensor]:
        """Return the average of the clients' copies of a part, by examples; the copies are gone then."""
        shares = self.orders.counts / self.orders.num_rows
        return self.backend.average_copies(part, dict(zip(self.clients, shares.tolist(), strict=True)))


def _apart(failures: Mapping[int, Failure]) -> list[list[int]]:
    """Return the clients that failed, in groups to ask again: each by itself where several sent one sum."""
    others = [client for client, failure in failures.items() if not failure.joint]
    return ([others] if others else []) + [[client] for client, failure in failures.items() if failure.joint]


def _own(failures: Mapping[int, Failure]) -> dict[int, Failure]:
    """Return those that are known to be their client's own."""
    return {client: failure for client, failure in failures.items() if not failure.joint}


def _joint(failures: Mapping[int, Failure]) -> dict[int, Failure]:
    """Return those that may be another client's, whose reply came with theirs."""
    return {client: failure for client, failure in failures.items() if failure.joint}
