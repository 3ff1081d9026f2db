"""The server backend of one process, in pure torch: forward, backward, commit, rollback, state."""

from __future__ import annotations

import copy
import logging
import math
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from psl_flower import tree
from psl_flower.devices import seeded
from psl_flower.errors import ConfigError, DivergenceError, LabelError, PSLError, StepError
from psl_flower.origin import where
from psl_flower.protocol import Weights
from psl_flower.server.loss import Loss, WeightedLoss, weighted
from psl_flower.server.metrics import is_integer, why_no_accuracy
from psl_flower.server.optimizer import OptimizerFn, RatedOptimizer, make_optimizer
from psl_flower.server.outcome import Outcome
from psl_flower.tree import Tree

log = logging.getLogger("flwr.psl_flower")

CLIENT = "client"  # where a part lives, as in `psl_flower.methods`


class NothingCountsError(StepError):
    """No target of a batch counts in the loss: there is nothing to learn from it."""


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
    ) -> None:
        self.parts = {name: part.to(device) for name, part in parts.items()}
        self.device, self.loss, self.classification = device, loss, classification
        self._on_clients = [name for name in parts if places[name] == CLIENT]
        # all names of tied parameters: a part may know one by another name first than the whole model does
        named = {n: p for part in self.parts.values() for n, p in part.named_parameters(remove_duplicate=False)}
        parameters = {name: named[name] for name in order if name in named and named[name].requires_grad}
        if not parameters:
            raise ConfigError("the model has no parameter to train: set requires_grad on some")
        self.optimizer = make_optimizer(optimizer, parameters)
        self._make_optimizer, self._order = optimizer, list(parameters)
        self._first_rate = _rate(self.optimizer)
        self._copies: dict[str, dict[int, PartCopy]] = {}
        self._told: set[str] = set()
        self._session = secrets.token_hex(8)
        self._version = 0
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
            f"{self._session}.{self._version}",
            f"{self._session}.constants.{self._constants_version}",
        )

    def state(self) -> dict[str, Tensor]:
        """Return a copy of all parts' state, on the CPU."""
        held = {name: t for part in self.parts.values() for name, t in part.state_dict().items()}
        return {name: t.detach().to("cpu", copy=True) for name, t in held.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` needs to go on from here."""
        state = self.state()
        held = {name: t for part in self.parts.values() for name, t in part.named_buffers()}
        passing = {name: t for name, t in held.items() if name not in state}  # not persistent
        return {"state": state, "buffers": passing, "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        for part in self.parts.values():
            part.load_state_dict({name: saved["state"][name] for name in part.state_dict()})
        buffers = {name: t for part in self.parts.values() for name, t in part.named_buffers()}
        with torch.no_grad():
            for name, t in saved["buffers"].items():
                buffers[name].copy_(t)
        self.optimizer.load_state_dict(saved["optimizer"])
        self._constants_version += 1
        self._changed()

    def _changed(self) -> None:
        self._version += 1
        self._weights = None

    # --- training ----------------------------------------------------------------------------------------------------
    def part(self, name: str, seed: int) -> ServerPart:
        """Return a part for one step, in which everything random comes from `seed`."""
        return ServerPart(self, self.parts[name], seed)

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
        for part, tensors in gradients.items():
            parameters = dict(self.parts[part].named_parameters())
            for name, gradient in (tensors or {}).items():
                parameters[name].grad = None if gradient is None else gradient.to(self.device)
        self.optimizer.step()
        if not set(self._on_clients).isdisjoint(gradients):
            self._changed()

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

    def clear_gradients(self) -> None:
        """Forget all gradients, also of parameters that the optimizer leaves out."""
        for part in self.parts.values():
            part.zero_grad(set_to_none=True)


class ServerPart:
    """A part of the model that runs on the server, in one step.

    Parameters
    ----------
    backend : LocalBackend
    module : nn.Module
        Takes what crosses the cut, one argument a tensor.
    seed : int
        Of everything random in it.
    """

    def __init__(self, backend: LocalBackend, module: nn.Module, seed: int) -> None:
        self._backend, self.module, self.seed = backend, module, seed

    def forward_backward(self, inputs: Tree, target: Tree) -> Outcome:
        """Run the part on the global batch, take the loss, and back-propagate.

        Parameters
        ----------
        inputs, target : tree
            Of the same rows.

        Raises
        ------
        LabelError
            If some labels are no class indices.
        NothingCountsError
            If no target counts.
        StepError
            If the part cannot take the inputs.
        DivergenceError
            If the loss or its gradients at the cut are not finite.
        """
        backend = self._backend
        leaves = tree.map_leaves(self._leaf, inputs)
        labels = self._target(target)
        backend.clear_gradients()
        self.module.zero_grad(set_to_none=True)
        self.module.train()
        with seeded(self.seed, backend.device):
            outputs, found = self._finish(leaves, labels)
            if not found.weight:
                raise NothingCountsError("no target of the batch counts in the loss")
            value = found.mean.item()
            if not math.isfinite(value):
                raise DivergenceError(f"the loss is {value}: training diverges, lower the learning rate")
            torch.autograd.backward(found.mean)
        gradient = tree.map_leaves(lambda leaf: leaf.grad, leaves)
        if not all(bool(torch.isfinite(g).all()) for g in tree.leaves(gradient)):
            raise DivergenceError("the gradients at the cut are not finite: training diverges, see the loss")
        return Outcome(
            **self._told_of(outputs, labels, found),
            class_counts=None if found.predictions is None else found.predictions.class_counts(),
            gradient=gradient,
            parameter_gradients={name: p.grad for name, p in self.module.named_parameters() if p.requires_grad},
        )

    @torch.no_grad()
    def evaluate(self, inputs: Tree, target: Tree) -> Outcome:
        """Run the part in evaluation mode, and take the loss."""
        self.module.eval()
        labels = self._target(target)
        outputs, found = self._finish(tree.to_device(inputs, self._backend.device), labels)
        return Outcome(**self._told_of(outputs, labels, found), class_counts=None)

    def _told_of(self, outputs: Any, labels: Any, found: WeightedLoss) -> dict[str, Any]:
        return {
            "loss": found.mean.item() if found.weight else math.nan,
            "weight": found.weight,
            "outputs": tree.map_leaves(torch.Tensor.detach, outputs)
            if isinstance(outputs, Tensor | tuple | dict)
            else outputs,
            "target": labels,
            "rows": tree.rows(labels, "target"),
            "score": None if found.predictions is None else found.predictions.score(),
        }

    def _leaf(self, tensor: Tensor) -> Tensor:
        moved = tensor.detach().to(self._backend.device)
        return moved.requires_grad_(moved.is_floating_point() or moved.is_complex())

    def _target(self, target: Tree) -> Any:
        labels = tree.to_device(target, self._backend.device)
        # losses take class indices as int64 only
        return labels.long() if self._backend.classification and is_integer(labels) else labels

    def _finish(self, inputs: Tree, labels: Any) -> tuple[Any, WeightedLoss]:
        """Return the outputs, and what the loss makes of them."""
        rows, backend = tree.rows(inputs, "activations"), self._backend
        arguments = inputs if isinstance(inputs, tuple) else (inputs,)
        try:
            outputs = run_on_batch(self.module, arguments, rows)
            found = weighted(backend.loss, outputs, labels, rows, classify=backend.classification)
        except PSLError:
            raise
        except Exception as exc:
            shown = ", ".join(
                f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape[1:])}" for t in tree.leaves(inputs)
            )
            theirs = ", ".join(str(tuple(t.shape)) for t in tree.leaves(labels))
            raise StepError(
                f"the server half or the loss failed on {rows} rows of activations {shown} with labels {theirs}: "
                f"{where(exc)}"
            ) from exc
        if found.broadcast:
            backend.tell_once(found.broadcast)
        if backend.classification and found.predictions is None:
            backend.tell_once(why_no_accuracy(outputs, labels))
        return outputs, found


class PartCopy(ServerPart):
    """A client's copy of a part that runs on the server, with an optimizer of its own."""

    def __init__(self, backend: LocalBackend, module: nn.Module, optimizer: RatedOptimizer) -> None:
        super().__init__(backend, module, 0)
        self._optimizer, self.first_row = optimizer, 0

    def forward_backward(self, inputs: Tree, target: Tree) -> Outcome:
        """Run the copy on its client's rows, take the loss, and back-propagate; see `ServerPart`."""
        try:
            return super().forward_backward(inputs, target)
        except LabelError as error:  # its rows are to be those of the step
            raise LabelError(str(error), [self.first_row + row for row in error.rows]) from error

    def step(self) -> None:
        """Step the copy's optimizer with the gradients of its last batch."""
        self._optimizer.step(self._backend.rate)


def _rate(optimizer: torch.optim.Optimizer) -> float:
    return float(optimizer.param_groups[0].get("lr", 1.0))


def _state(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def run_on_batch(module: nn.Module, inputs: Sequence[Any], batch_size: int) -> Any:
    """Run a module on a batch; batch norm that sees one value a channel normalises by its running statistics.

    An epoch may end in a batch of one example: with fixed quotas, or if a client is lost from the last step. Of one
    value a channel there are no statistics, and torch refuses it. Layers that see several positions of the example have
    statistics, and use them, as in centralised training.
    """
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.training] if batch_size == 1 else []
    hooks = [norm.register_forward_pre_hook(_choose_statistics) for norm in norms]
    try:
        return module(*inputs)
    finally:
        for norm, hook in zip(norms, hooks, strict=True):
            hook.remove()
            norm.train()


def _choose_statistics(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    values, channels = inputs[0].numel(), inputs[0].shape[1]
    norm.train(values > channels)
