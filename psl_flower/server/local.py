"""The server backend of one process, in pure torch: forward, backward, commit, rollback, state."""

from __future__ import annotations

import logging
import math
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from psl_flower import tree
from psl_flower.devices import seeded
from psl_flower.errors import ConfigError, DivergenceError, PSLError, StepError
from psl_flower.origin import where
from psl_flower.protocol import Weights
from psl_flower.server.loss import Loss, WeightedLoss, loss_target, weighted
from psl_flower.server.metrics import Scores, why_no_accuracy
from psl_flower.server.optimizer import make_optimizer
from psl_flower.tree import Tree
from psl_flower.typing import IntArray

log = logging.getLogger("flwr.psl_flower")

OptimizerFn = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]

CLIENT = "client"  # where a part lives, as in `psl_flower.methods`


class NothingCountsError(StepError):
    """No target of a batch counts in the loss: there is nothing to learn from it."""


@dataclass(frozen=True, eq=False)
class Gradients:
    """What came back through a server part.

    Parameters
    ----------
    gradient : tree
        Of the inputs, None for what is not differentiable.
    parameter_gradients : dict of str to Tensor or None
        Of the part, by whole-model name.
    """

    gradient: Tree
    parameter_gradients: Mapping[str, Tensor | None]


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a server part made of a batch.

    Parameters
    ----------
    loss : float
        Mean over the batch.
    weight : float
        What the mean was taken over: examples, or what the loss counts of them; 0 where nothing counts.
    outputs, target
        Of the model, without a graph; the target as the loss was given it. None where they stay with the clients.
    rows : int
        Examples.
    score : (int, int) or None
        Right predictions, and those that count; None unless it is classification.
    class_counts : (C,) int64 or None
        Labels of each class in the batch; None unless it is classification.
    gradient : tree or None
        Of the inputs, None for what is not differentiable. None in evaluation.
    parameter_gradients : dict of str to Tensor or None
        Of the part, by whole-model name.
    """

    loss: float
    weight: float
    outputs: Any
    target: Any
    rows: int
    score: tuple[int, int] | None
    class_counts: IntArray | None
    gradient: Tree = None
    parameter_gradients: Mapping[str, Tensor | None] | None = None

    @property
    def accuracy(self) -> float | None:
        """Share of right predictions, where it is classification and some count."""
        return None if self.score is None or not self.score[1] else self.score[0] / self.score[1]

    def add_to(self, scores: Scores) -> None:
        """Count it in."""
        total = self.loss * self.weight if self.weight else 0.0
        scores.add(self.outputs, self.target, self.rows, loss=(total, self.weight), score=self.score)


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
        before = [{name: t.clone() for name, t in part.named_buffers()} for part in on_server]
        try:
            yield
        except BaseException:
            self.clear_gradients()
            with torch.no_grad():
                for part, values in zip(on_server, before, strict=True):
                    for name, t in part.named_buffers():  # by name: another tensor may stand in its place
                        t.copy_(values[name])
            raise

    def commit(self, gradients: Mapping[str, Mapping[str, Tensor | None] | None]) -> None:
        """Step the optimizer.

        Parameters
        ----------
        gradients : dict of str to dict
            By part, its parameters' gradients by name; None for those that took no part.
        """
        found: dict[nn.Parameter, Tensor | None] = {}  # a parameter that two parts share has the gradients of both
        for part, tensors in gradients.items():
            parameters = dict(self.parts[part].named_parameters())
            for name, gradient in (tensors or {}).items():
                moved = None if gradient is None else gradient.to(self.device)
                found[parameters[name]] = tree.add(found.get(parameters[name]), moved)
        for parameter, total in found.items():
            parameter.grad = total
        self.optimizer.step()
        self._changed()

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
    training : bool
        The mode of `forward`.
    """

    def __init__(self, backend: LocalBackend, module: nn.Module, seed: int, *, training: bool = True) -> None:
        self._backend, self._module, self._seed, self._training = backend, module, seed, training

    def forward(self, inputs: Tree) -> ServerPass:
        """Run the part on the global batch; what it returns has a row an example, and goes back to the clients.

        Parameters
        ----------
        inputs : tree
            Rows.

        Raises
        ------
        StepError
            If the part cannot take the inputs, or returns something else.
        """
        received = tree.map_leaves(self._leaf, inputs)
        self._module.train(self._training)
        rows = tree.rows(received, "activations")
        grad = torch.set_grad_enabled(self._training)
        with seeded(self._seed, self._backend.device), grad, self._told(received):
            outputs = tree.as_tree(self._run(received, rows), "what the server's part returns")
        if (found := tree.rows(outputs, "outputs")) != rows:
            raise StepError(f"the server's part must return a row an example, got {found} of {rows}")
        return ServerPass(self, received, outputs)

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
        self._module.train()
        with seeded(self._seed, backend.device):
            outputs, found = self._finish(leaves, labels)
            if not found.weight:
                raise NothingCountsError("no target of the batch counts in the loss")
            value = found.mean.item()
            if not math.isfinite(value):
                raise DivergenceError(f"the loss is {value}: training diverges, lower the learning rate")
            back = self._backward([found.mean], None, leaves)
        return Outcome(
            **self._told_of(outputs, labels, found),
            class_counts=None if found.predictions is None else found.predictions.class_counts(),
            gradient=back.gradient,
            parameter_gradients=back.parameter_gradients,
        )

    @torch.no_grad()
    def evaluate(self, inputs: Tree, target: Tree) -> Outcome:
        """Run the part in evaluation mode, and take the loss."""
        self._module.eval()
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
        return loss_target(target, self._backend.device, classify=self._backend.classification)

    def _backward(self, roots: list[Tensor], weights: list[Tensor] | None, received: Tree) -> Gradients:
        self._backend.clear_gradients()
        torch.autograd.backward(roots, weights)
        gradient = tree.map_leaves(lambda leaf: leaf.grad, received)
        if not all(bool(torch.isfinite(g).all()) for g in tree.leaves(gradient)):
            raise DivergenceError("the gradients at the cut are not finite: training diverges, see the loss")
        return Gradients(gradient, {name: p.grad for name, p in self._module.named_parameters() if p.requires_grad})

    def _run(self, inputs: Tree, rows: int) -> Any:
        return run_on_batch(self._module, inputs if isinstance(inputs, tuple) else (inputs,), rows)

    def _finish(self, inputs: Tree, labels: Any) -> tuple[Any, WeightedLoss]:
        """Return the outputs, and what the loss makes of them."""
        rows, backend = tree.rows(inputs, "activations"), self._backend
        with self._told(inputs, labels):
            outputs = self._run(inputs, rows)
            found = weighted(backend.loss, outputs, labels, rows, classify=backend.classification)
        if found.broadcast:
            backend.tell_once(found.broadcast)
        if backend.classification and found.predictions is None:
            backend.tell_once(why_no_accuracy(outputs, labels))
        return outputs, found

    @contextmanager
    def _told(self, inputs: Tree, labels: Tree = None) -> Iterator[None]:
        """Say of an error in the model's code, or the loss, what it was given."""
        try:
            yield
        except PSLError:
            raise
        except Exception as exc:
            rows = len(tree.leaves(inputs)[0])
            shown = ", ".join(
                f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape[1:])}" for t in tree.leaves(inputs)
            )
            who, theirs = "the server half", ""
            if labels is not None:
                who += " or the loss"
                theirs = " with labels " + ", ".join(f"{t.dtype} {tuple(t.shape)}" for t in tree.leaves(labels))
            raise StepError(f"{who} failed on {rows} rows of activations {shown}{theirs}: {where(exc)}") from exc


class ServerPass:
    """A server part's pass over a global batch, to be back-propagated once.

    Attributes
    ----------
    outputs : tree
        Rows, without a graph.
    """

    def __init__(self, part: ServerPart, received: Tree, outputs: Tree) -> None:
        self._part, self._received, self._attached = part, received, outputs
        self.outputs = tree.map_leaves(Tensor.detach, outputs)

    def backward(self, gradient: Tree) -> Gradients:
        """Back-propagate the gradient of the outputs.

        Parameters
        ----------
        gradient : tree
            Of the form of the outputs; None for what has none.

        Raises
        ------
        DivergenceError
            If the gradients of the inputs are not finite.
        """
        given = dict(zip(tree.paths(gradient, "output"), tree.leaves(gradient), strict=True))
        attached = zip(tree.paths(self._attached, "output"), tree.leaves(self._attached), strict=True)
        pairs = [(leaf, given[path].to(leaf.device)) for path, leaf in attached if path in given and leaf.requires_grad]
        return self._part._backward([leaf for leaf, _ in pairs], [each for _, each in pairs], self._received)


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
