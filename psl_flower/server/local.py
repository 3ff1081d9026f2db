"""The server backend of one process, in pure torch: forward, backward, commit, rollback, state."""

from __future__ import annotations

import copy
import logging
import secrets
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from psl_flower import tree
from psl_flower.errors import ConfigError
from psl_flower.origin import where
from psl_flower.precision import FULL, computing, widened
from psl_flower.privacy import DPSGD
from psl_flower.protocol import Weights
from psl_flower.server.loss import Loss
from psl_flower.server.moving import MovingBuffers
from psl_flower.server.optimizer import OptimizerFn, RatedOptimizer, make_optimizer
from psl_flower.server.part import PartCopy, ServerPart
from psl_flower.server.reduction import Reduction
from psl_flower.server.untrained import untrained
from psl_flower.split import CannotTellError, find_mixing, most_positions
from psl_flower.tree import Tree

log = logging.getLogger("flwr.psl_flower")

CLIENT = "client"  # where a part lives, as in `psl_flower.methods`


class LocalBackend:
    """The master copy of all parts, in this process, and the one optimizer over them.

    Parameters
    ----------
    parts : dict of str to nn.Module
        Their parameters and buffers are named as in the whole model. Changed in place.
    places : dict of str to str
        Where each part runs, "client" or "server".
    optimizer : callable
        Makes the one optimizer over the trainable parameters of all parts, in the whole model's order.
    loss : callable
        Takes (outputs, target) and returns the mean over the batch.
    device : torch.device
        Where they live.
    classification : bool
        Whether labels are class indices: they are checked, and accuracy is computed.
    order : iterable of str
        The whole model's parameter names, in order.
    private : DPSGD, optional
        Differential privacy of the model.
    noise_on_clients : bool
        Whether clients add its noise to their sums themselves.
    precision : str
        In which all parts compute, see `psl_flower.precision`.
    """

    def __init__(
        self,
        parts: Mapping[str, nn.Module],
        places: Mapping[str, str],
        *,
        optimizer: OptimizerFn,
        loss: Loss,
        device: torch.device,
        classification: bool,
        order: Iterable[str],
        private: DPSGD | None = None,
        noise_on_clients: bool = False,
        precision: str = FULL,
    ) -> None:
        self.parts = {name: part.to(device) for name, part in parts.items()}
        self.device, self.loss, self.classification = device, loss, classification
        self.reduction, self.precision = Reduction(), precision
        self._private = private
        self.bound = None if private is None else private.bound(len(parts))
        self.longest = most_positions(parts.values())  # that rows may be, where they may differ in length; else 0
        self._on_clients = [name for name in parts if places[name] == CLIENT]
        # all names of tied parameters: a part may know one by another name first than the whole model does
        named = {n: p for part in self.parts.values() for n, p in part.named_parameters(remove_duplicate=False)}
        parameters = {name: named[name] for name in order if name in named and named[name].requires_grad}
        self._noised = [name for name in parts if not (noise_on_clients and places[name] == CLIENT)]
        self.optimizer = make_optimizer(optimizer, parameters)
        self._make_optimizer, self._order = optimizer, list(parameters)
        self._first_rate = _rate(self.optimizer)
        self._copies: dict[str, dict[int, PartCopy]] = {}
        self._of_loss = MovingBuffers(loss)
        self._looked_at = False  # at what the loss depends on
        if isinstance(loss, nn.Module) and any(p.requires_grad for p in loss.parameters()):
            log.warning("the loss, %s, has parameters, which do not train: make them the model's", type(loss).__name__)
            self._looked_at = True
        self._told: set[str] = set()
        self._seen_apart = False
        self._session = secrets.token_hex(8)
        self._constants_version = 0
        self._weights: dict[str, Weights] | None = None

    # --- state -------------------------------------------------------------------------------------------------------
    def weights(self) -> dict[str, Weights]:
        """Return the state of the parts on the clients; the same objects until it changes."""
        if self._weights is None:
            self._weights = {name: self._weights_of(name) for name in self._on_clients}
        return self._weights

    def _weights_of(self, name: str) -> Weights:
        part = self.parts[name]
        frozen = {n: p.detach() for n, p in part.named_parameters() if not p.requires_grad}
        return Weights(
            {n: p.detach() for n, p in part.named_parameters() if p.requires_grad},
            {**frozen, **{n: t.detach() for n, t in part.named_buffers()}},
            f"{self._session}.{secrets.token_hex(8)}",  # no number: clients could count steps that they are not in
            f"{self._session}.constants.{self._constants_version}",
        )

    def state(self, names: Collection[str] | None = None) -> dict[str, Tensor]:
        """Return a copy of all parts' state, on the CPU; only of these names, if they are given.

        Frozen parameters, which no step changes, are not copied where they are on the CPU.
        """
        held = {n: t for part in self.parts.values() for n, t in part.state_dict(keep_vars=True).items()}
        return {
            name: t.detach().to("cpu", copy=t.requires_grad or not isinstance(t, nn.Parameter))
            for name, t in held.items()
            if names is None or name in names
        }

    def state_dict(self, names: Collection[str] | None = None) -> dict[str, Any]:
        """Return what `load_state_dict` needs to go on from here; the others are not to change, if names are given."""
        state = self.state(names)
        held = {name: t for part in self.parts.values() for name, t in part.named_buffers()}
        passing = {name: t for name, t in held.items() if name not in state}  # not persistent
        optimizer, loss = self.optimizer.state_dict(), self._of_loss.state_dict()
        return {"state": state, "buffers": passing, "optimizer": optimizer, "loss": loss}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        for part in self.parts.values():
            load_known(part, saved["state"])
        buffers = {name: t for part in self.parts.values() for name, t in part.named_buffers()}
        with torch.no_grad():
            for name, t in saved["buffers"].items():
                buffers[name].copy_(t)
        self.optimizer.load_state_dict(saved["optimizer"])
        self._of_loss.load_state_dict(saved.get("loss", {}))
        self._constants_version += 1
        self._changed()

    def _changed(self) -> None:
        self._weights = None

    # --- training ----------------------------------------------------------------------------------------------------
    def divisor(self, rows: int) -> int:
        """Return what the losses of so many examples are divided by: a step's loss is their mean."""
        return rows if self._private is None else self._private.divisor(rows)

    def part(self, name: str, seed: int, *, training: bool = True) -> ServerPart:
        """Return a part for one step, in which everything random comes from `seed`."""
        return ServerPart(self, self.parts[name], seed, training=training)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Make a step all or nothing: what happened before an error is undone.

        The optimizer steps last, so only buffers (batch norm) and gradients need undoing; randomness is seeded for each
        step and leaves the generators as they were.
        """
        on_server = [part for name, part in self.parts.items() if name not in self._on_clients]
        on_server += [each.module for copies in self._copies.values() for each in copies.values()]
        before = [{name: t.clone() for name, t in part.named_buffers()} for part in on_server]
        known = {part: set(copies) for part, copies in self._copies.items()}
        try:
            yield
        except BaseException:
            self.clear_gradients()
            for part, copies in self._copies.items():
                for client in copies.keys() - known.get(part, set()):
                    del copies[client]
            with torch.no_grad():
                for module, values in zip(on_server, before, strict=True):
                    for name, t in module.named_buffers():  # by name: another tensor may stand in its place
                        t.copy_(values[name])
            raise

    def commit(self, gradients: Mapping[str, Mapping[str, Tensor | None] | None]) -> None:
        """Step the optimizer.

        Parameters
        ----------
        gradients : dict of str to dict
            By part, its parameters' gradients by name; None for those that took no part.
        """
        self.clear_gradients()  # an earlier step's, of parts that have none in this one
        found: dict[nn.Parameter, Tensor | None] = {}  # a parameter that two parts share has the gradients of both
        for part, tensors in gradients.items():
            parameters = dict(self.parts[part].named_parameters())
            if self._private is not None and part in self._noised:
                trained = {name: p for name, p in parameters.items() if p.requires_grad}
                given = {name: (tensors or {}).get(name) for name in trained}
                tensors = self._private.noised(
                    {name: torch.zeros_like(trained[name]) if g is None else g for name, g in given.items()}
                )
            for name, gradient in (tensors or {}).items():
                moved = None if gradient is None else gradient.to(self.device)
                found[parameters[name]] = tree.add(found.get(parameters[name]), moved)
        for parameter, total in found.items():
            parameter.grad = total
        try:
            self.optimizer.step()
        except Exception as exc:
            name = type(self.optimizer).__name__
            raise ConfigError(f"the step of the optimizer, {name}, failed: {where(exc)}") from exc
        if getattr(self.optimizer, "stepped", True) and not set(self._on_clients).isdisjoint(gradients):
            self._changed()

    def commit_nothing(self) -> bool:
        """Make a step that no example is in, where that may not show: of noise alone; return whether it was made."""
        if self._private is None or self._private.examples is None:
            return False
        self.commit({name: {} for name in self.parts})
        return True

    def computing(self) -> AbstractContextManager[Any]:
        """Return what forward passes and losses run in."""
        return computing(self.precision, self.device)

    @property
    def rate(self) -> float:
        """What a schedule has made of the learning rate so far, as a factor."""
        return _rate(self.optimizer) / self._first_rate if self._first_rate else 1.0

    def assign(self, parts: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Give parts other values, by part and name; whole numbers are rounded."""
        with torch.no_grad():
            for part, tensors in parts.items():
                held = _state(self.parts[part])
                for name, t in tensors.items():
                    if held[name].requires_grad or not isinstance(held[name], nn.Parameter):  # not frozen
                        held[name].copy_(t if held[name].is_floating_point() else t.round())
        self._changed()

    # --- copies of a part, one a client ------------------------------------------------------------------------------
    def copy_of(self, part: str, client: int, seed: int, first_row: int) -> PartCopy:
        """Return a client's copy of a part, for one step; it is made of the master's, and stays until the average.

        Parameters
        ----------
        part : str
        client : int
        seed : int
            Of everything random in it.
        first_row : int
            Where the client's rows begin in the step's.
        """
        copies = self._copies.setdefault(part, {})
        if client not in copies:
            module = copy.deepcopy(self.parts[part])
            named = {n: p for n, p in module.named_parameters() if p.requires_grad}
            parameters = {name: named[name] for name in self._order if name in named}
            copies[client] = PartCopy(self, module, RatedOptimizer(self._make_optimizer, parameters))
        found = copies[client]
        found.seed, found.first_row = seed, first_row
        return found

    def average_copies(self, part: str, shares: Mapping[int, float]) -> dict[str, Tensor]:
        """Return the average of clients' copies, parameters and buffers, and forget all copies.

        Parameters
        ----------
        part : str
        shares : dict of int to float
            Each client's share of the average, 1 in all.
        """
        copies, total = self._copies.pop(part, {}), dict[str, Tensor]()
        for client, share in shares.items():  # who has none had no step that changed anything
            module = copies[client].module if client in copies else self.parts[part]
            for name, t in _state(module).items():
                value = t.detach() if t.is_floating_point() else t.double()
                total[name] = total[name] + share * value if name in total else share * value
        return total

    def tell_once(self, sentence: str) -> None:
        """Warn of something that holds for every batch."""
        if sentence not in self._told:
            self._told.add(sentence)
            log.warning("%s", sentence)

    def look_at(self, loss: Tensor, known: Iterable[Tensor]) -> None:
        """Tell, once, of what a loss depends on that does not train."""
        if self._looked_at:
            return
        self._looked_at = True
        if others := untrained(loss, known):
            self.tell_once(
                f"the loss depends on {len(others)} tensors that do not train here (shapes "
                f"{', '.join(str(tuple(t.shape)) for t in others[:5])}): they are a loss's own, or another model's. "
                "Make them the model's, whose outputs the loss is given; weight decay goes into the optimizer"
            )

    def check_rows(self, run: Callable[[Tree], Any], inputs: Tree, module: nn.Module) -> None:
        """Refuse a part in which examples have to do with each other, as soon as a batch can show it.

        Raises
        ------
        ConfigError
            If it is one: with differential privacy an example's gradient must be its own.
        """
        if self._seen_apart:
            return
        try:
            mixing = find_mixing(run, widened(inputs, self.precision), module=module, who="the server half")
        except CannotTellError:
            return  # another batch may tell
        if mixing:
            raise ConfigError(f"with private, {mixing}")
        self._seen_apart = True

    def clear_gradients(self) -> None:
        """Forget all gradients, also of parameters that the optimizer leaves out."""
        for part in self.parts.values():
            part.zero_grad(set_to_none=True)


def load_known(part: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load what a state dict has of a part; the rest keeps its values."""
    part.load_state_dict({name: state[name] for name in part.state_dict() if name in state}, strict=False)


def _rate(optimizer: torch.optim.Optimizer) -> float:
    return float(optimizer.param_groups[0].get("lr", 1.0))


def _state(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}
