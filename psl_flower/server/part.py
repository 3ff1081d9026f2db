"""A part of the model that runs on the server, in one step: forward, loss, backward."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from psl_flower import tree
from psl_flower.devices import seeded
from psl_flower.errors import DivergenceError, LabelError, PSLError, StepError
from psl_flower.origin import where
from psl_flower.privacy.per_example import clipped_sum, finite_rows
from psl_flower.server.examples import example_gradients
from psl_flower.server.loss import Loss, WeightedLoss, loss_target, weighted
from psl_flower.server.metrics import why_no_accuracy
from psl_flower.server.optimizer import RatedOptimizer
from psl_flower.server.outcome import Outcome
from psl_flower.server.reduction import SUMMED, Reduction
from psl_flower.tree import Tree

log = logging.getLogger("flwr.psl_flower")

CLIENT = "client"  # where a part lives, as in `psl_flower.methods`


class Backend(Protocol):
    """What a part knows of the backend it belongs to."""

    device: torch.device
    loss: Loss
    classification: bool
    reduction: Reduction
    bound: float | None  # largest norm of one example's gradient of a part

    def divisor(self, rows: int) -> int:
        """Return what the losses of so many examples are divided by."""

    @property
    def rate(self) -> float:
        """The present learning rate, as a share of the first."""

    def clear_gradients(self) -> None:
        """Forget all gradients."""

    def computing(self) -> AbstractContextManager[Any]:
        """Return what forward passes and losses run in."""

    def tell_once(self, sentence: str) -> None:
        """Warn of something that holds for every batch."""

    def look_at(self, loss: Tensor, known: Iterable[Tensor]) -> None:
        """Tell, once, of what a loss depends on that does not train."""

    def check_rows(self, run: Callable[[Tree], Any], inputs: Tree, module: nn.Module) -> None:
        """Refuse a part in which examples have to do with each other, as soon as a batch can show it."""


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

    def __init__(self, backend: Backend, module: nn.Module, seed: int, *, training: bool = True) -> None:
        self._backend, self.module, self.seed, self._training = backend, module, seed, training

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
        self.module.train(self._training)
        rows = tree.rows(received, "activations")
        grad = torch.set_grad_enabled(self._training)
        with seeded(self.seed, self._backend.device), grad, self._told(received):
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
        self.module.train()
        with torch.enable_grad(), seeded(self.seed, backend.device):
            outputs, found = self._finish(leaves, labels)
            if backend.bound is None:
                _check_counts(found)
                backend.look_at(found.mean, [*tree.leaves(leaves), *self.module.parameters()])
                back = self._backward([found.mean], None, leaves)
            else:
                rows = tree.rows(leaves, "activations")
                with self._told(leaves, labels), backend.computing():
                    divisor = backend.divisor(rows)
                    found, given = example_gradients(backend.loss, outputs, labels, rows, found, divisor)
                back = self._backward_rows(given, leaves, outputs)
        return Outcome(
            **self._told_of(outputs, labels, found),
            class_counts=None if found.predictions is None else found.predictions.class_counts(),
            gradient=back.gradient,
            parameter_gradients=back.parameter_gradients,
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
            "loss": found.mean.item(),
            "weight": found.weight,
            "summed": found.summed,
            "outputs": tree.map_leaves(_detached, outputs) if isinstance(outputs, Tensor | tuple | dict) else outputs,
            "target": labels,
            "rows": tree.rows(labels, "target"),
            "score": None if found.predictions is None else found.predictions.score(),
        }

    def _leaf(self, tensor: Tensor) -> Tensor:
        moved = tensor.detach().to(self._backend.device)
        return moved.requires_grad_(moved.is_floating_point() or moved.is_complex())

    def _target(self, target: Tree) -> Any:
        return loss_target(target, self._backend.device, classify=self._backend.classification)

    def _backward_rows(self, given: Mapping[int, Tensor], received: Tree, outputs: Any) -> Gradients:
        """Back-propagate gradients of the outputs, by the position of the leaf."""
        attached, bound = tree.leaves(tree.as_tree(outputs, "outputs")), self._backend.bound
        back = self._backward([attached[at] for at in given], list(given.values()), received)
        if bound is None:
            return back
        self._backend.check_rows(partial(_run, self.module), received, self.module)
        clipped = clipped_sum(self._cast_run, self.module, received, given, bound, who="the server half")
        return Gradients(tree.map_leaves(finite_rows, back.gradient), dict(clipped))

    def _backward(self, roots: list[Tensor], weights: list[Tensor] | None, received: Tree) -> Gradients:
        self._backend.clear_gradients()
        self.module.zero_grad(set_to_none=True)  # a copy is none of the backend's parts
        torch.autograd.backward(roots, weights)
        gradient = tree.map_leaves(lambda leaf: leaf.grad, received)
        if self._backend.bound is None and not all(map(tree.is_finite, tree.leaves(gradient))):
            raise DivergenceError("the gradients at the cut are not finite: training diverges, see the loss")
        return Gradients(gradient, {name: p.grad for name, p in self.module.named_parameters() if p.requires_grad})

    def _run(self, inputs: Tree, rows: int) -> Any:
        with self._backend.computing():
            return run_on_batch(self.module, inputs if isinstance(inputs, tuple) else (inputs,), rows)

    def _cast_run(self, module: nn.Module, inputs: Tree) -> Any:
        with self._backend.computing():
            return _run(module, inputs)

    def _finish(self, inputs: Tree, labels: Any) -> tuple[Any, WeightedLoss]:
        """Return the outputs, and what the loss makes of them."""
        rows, backend = tree.rows(inputs, "activations"), self._backend
        with self._told(inputs, labels), backend.computing():
            outputs = self._run(inputs, rows)
            found = weighted(
                backend.loss, outputs, labels, rows, classify=backend.classification, reduction=backend.reduction
            )
        if found.summed:
            backend.tell_once(SUMMED)
        if found.remark:
            backend.tell_once(found.remark)
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
        if part._backend.bound is not None:
            self.outputs = tree.map_leaves(finite_rows, self.outputs)

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
        attached = enumerate(tree.named_leaves(self._attached, "output"))
        rows = {at: given[n].to(t.device) for at, (n, t) in attached if n in given and t.requires_grad}
        return self._part._backward_rows(rows, self._received, self._attached)


def _detached(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf  # a model may return a number beside its outputs


def _check_counts(found: WeightedLoss) -> None:
    """Raise unless there is something to learn from a loss."""
    if not found.weight and not torch.isfinite(found.mean):  # a mean over nothing; a sum of nothing is a loss of 0
        raise NothingCountsError("no target of the batch counts in the loss")
    found.check_gradient()
    value = found.mean.item()
    if not math.isfinite(value):
        raise DivergenceError(f"the loss is {value}: training diverges, lower the learning rate")


def _run(module: nn.Module, inputs: Tree) -> Any:
    return module(*inputs) if isinstance(inputs, tuple) else module(inputs)


class PartCopy(ServerPart):
    """A client's copy of a part that runs on the server, with an optimizer of its own."""

    def __init__(self, backend: Backend, module: nn.Module, optimizer: RatedOptimizer) -> None:
        super().__init__(backend, module, 0)
        self._optimizer, self.first_row = optimizer, 0

    def forward_backward(self, inputs: Tree, target: Tree) -> Outcome:
        """Run the copy on its client's rows, take the loss, and back-propagate; see `ServerPart`."""
        try:
            return super().forward_backward(inputs, target)
        except LabelError as error:  # its rows are to be those of the step
            raise LabelError(str(error), [self.first_row + row for row in error.rows], error.rule) from error

    def step(self) -> None:
        """Step the copy's optimizer with the gradients of its last batch."""
        self._optimizer.step(self._backend.rate)


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
