"""The server's part of a step, in pure torch: the master copy of both halves and the one optimizer over them."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from psl_flower.devices import seeded
from psl_flower.errors import ConfigError, DivergenceError, PSLError, StepError
from psl_flower.protocol import Activations, Gradients, Weights
from psl_flower.typing import IntArray

Loss = Callable[[Tensor, Tensor], Tensor]
OptimizerFn = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


@dataclass(frozen=True, eq=False)
class StepOutcome:
    """What the server half made of a global batch.

    Parameters
    ----------
    loss : float
        Mean over the global batch.
    correct : int or None
        Right predictions; None unless it is classification.
    predictions : int
        Predictions made: examples, times positions for dense prediction.
    class_counts : (C,) int64 or None
        Labels of each class in the batch; None unless it is classification.
    cut_gradients : dict of int to tuple of Tensor
        By client id: the gradient of each of its activation tensors, None for those that are not differentiable.
    """

    loss: float
    correct: int | None
    predictions: int
    class_counts: IntArray | None
    cut_gradients: Mapping[int, tuple[Tensor | None, ...]]


class SplitTrainer:
    """Trains both halves: the server half here, the client half through the gradients the clients return.

    Parameters
    ----------
    client, server : nn.Module
        The halves; their parameters and buffers are named as in the whole model. Changed in place.
    optimizer : callable
        Makes the one optimizer over the trainable parameters of both halves, in the whole model's order.
    loss : callable
        Takes (outputs, labels) and returns the mean over the batch.
    device : torch.device
        Where both live.
    classification : bool
        Whether labels are class indices: they are checked, and accuracy is computed.
    order : iterable of str
        The whole model's parameter names, in order.
    """

    def __init__(
        self,
        client: nn.Module,
        server: nn.Module,
        *,
        optimizer: OptimizerFn,
        loss: Loss,
        device: torch.device,
        classification: bool,
        order: Iterable[str],
    ) -> None:
        self.client, self.server = client.to(device), server.to(device)
        self.device = device
        self._loss = loss
        self._classification = classification
        self._client_parameters = {n: p for n, p in self.client.named_parameters() if p.requires_grad}
        self._client_constants = {
            **{n: p for n, p in self.client.named_parameters() if not p.requires_grad},
            **dict(self.client.named_buffers()),
        }
        # all names of tied parameters: a half may know one by another name first than the whole model does
        halves = (self.client, self.server)
        named = {name: p for half in halves for name, p in half.named_parameters(remove_duplicate=False)}
        parameters = [named[name] for name in order if name in named and named[name].requires_grad]
        if not parameters:
            raise ConfigError("the model has no parameter to train: set requires_grad on some")
        self.optimizer = optimizer(parameters)
        self._session = secrets.token_hex(8)
        self._version = 0
        self._weights: Weights | None = None

    # --- state -------------------------------------------------------------------------------------------------------
    def weights(self) -> Weights:
        """Return the client half's state; the same object until it changes."""
        if self._weights is None:
            self._weights = Weights(
                {name: p.detach() for name, p in self._client_parameters.items()},
                {name: t.detach() for name, t in self._client_constants.items()},
                f"{self._session}.{self._version}",
            )
        return self._weights

    def state(self) -> dict[str, Tensor]:
        """Return a copy of both halves' state, on the CPU."""
        both = {**self.client.state_dict(), **self.server.state_dict()}
        return {name: t.detach().to("cpu", copy=True) for name, t in both.items()}

    def saved(self) -> dict[str, Any]:
        """Return what `restore` needs to go on from here: state, and the optimizer's."""
        state = self.state()
        passing = {name: t for name, t in self.server.named_buffers() if name not in state}  # not persistent
        return {"state": state, "buffers": passing, "optimizer": self.optimizer.state_dict()}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Go on from what `saved` returned."""
        for half in (self.client, self.server):
            half.load_state_dict({name: saved["state"][name] for name in half.state_dict()})
        buffers = dict(self.server.named_buffers())
        with torch.no_grad():
            for name, t in saved["buffers"].items():
                buffers[name].copy_(t)
        self.optimizer.load_state_dict(saved["optimizer"])
        self._version += 1
        self._weights = None

    # --- training ----------------------------------------------------------------------------------------------------
    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Make a step all or nothing: what happened before an error is undone.

        The optimizer steps last, so only the server half's buffers (batch norm) and the gradients need undoing; its
        randomness is seeded for each step and leaves torch's generators as they were.
        """
        before = {name: t.clone() for name, t in self.server.named_buffers()}
        try:
            yield
        except BaseException:
            self._clear_gradients()
            with torch.no_grad():
                for name, t in self.server.named_buffers():
                    t.copy_(before[name])
            raise

    def forward_backward(self, batch: Mapping[int, Activations], seed: int) -> StepOutcome:
        """Run the server half on the global batch, forward and backward.

        Parameters
        ----------
        batch : dict of int to Activations
            By client id; concatenated in this order.
        seed : int
            Of everything random in the server half.

        Raises
        ------
        StepError
            If the server half cannot take the activations, or labels are no class indices.
        DivergenceError
            If the loss or its gradients at the cut are not finite.
        """
        counts = {client: len(part.labels) for client, part in batch.items()}
        inputs = [self._leaf(parts) for parts in zip(*(part.tensors for part in batch.values()), strict=True)]
        labels = self._labels(batch.values())
        self._clear_gradients()
        self.server.train()
        with seeded(seed, self.device):
            outputs, loss, classes = self._finish(inputs, labels, counts)
            value = loss.item()
            if not torch.isfinite(loss):
                raise DivergenceError(f"the loss is {value}: training diverges, lower the learning rate")
            torch.autograd.backward(loss)
        for x in inputs:
            if x.grad is not None and not torch.isfinite(x.grad).all():
                raise DivergenceError("the gradients at the cut are not finite: training diverges, see the loss")
        sizes = list(counts.values())
        sliced = [[None] * len(sizes) if x.grad is None else torch.split(x.grad, sizes) for x in inputs]
        return StepOutcome(
            loss=value,
            correct=int((outputs.argmax(dim=1) == labels).sum()) if classes else None,
            predictions=labels.numel(),
            class_counts=torch.bincount(labels.flatten(), minlength=classes).cpu().numpy() if classes else None,
            cut_gradients={client: tuple(g[i] for g in sliced) for i, client in enumerate(batch)},
        )

    def commit(self, gradients: Iterable[Gradients]) -> None:
        """Sum the clients' parameter gradients and step the optimizer over both halves.

        The loss was a mean over the global batch already, so the sum is the exact gradient.
        """
        for part in gradients:
            for name, gradient in part.tensors.items():
                parameter = self._client_parameters[name]
                if parameter.grad is None:
                    parameter.grad = gradient.to(self.device, copy=True)
                else:
                    parameter.grad += gradient.to(self.device)
        self.optimizer.step()
        self._version += 1
        self._weights = None

    def _clear_gradients(self) -> None:
        # of all parameters, also of those the optimizer leaves out
        self.client.zero_grad(set_to_none=True)
        self.server.zero_grad(set_to_none=True)

    def _leaf(self, parts: tuple[Tensor, ...]) -> Tensor:
        tensor = torch.cat(parts).to(self.device)
        return tensor.requires_grad_(tensor.is_floating_point() or tensor.is_complex())

    # --- evaluation --------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def evaluate(self, part: Activations, client: int) -> tuple[float, int | None, int]:
        """Finish one client's evaluation batch.

        Returns
        -------
        loss : float
            Sum over the examples.
        correct : int or None
            Right predictions.
        predictions : int
            Predictions made.
        """
        self.server.eval()
        inputs, labels = [t.to(self.device) for t in part.tensors], self._labels([part])
        outputs, loss, classes = self._finish(inputs, labels, {client: len(labels)})
        correct = int((outputs.argmax(dim=1) == labels).sum()) if classes else None
        return loss.item() * len(labels), correct, labels.numel()

    # --- both --------------------------------------------------------------------------------------------------------
    def _labels(self, parts: Iterable[Activations]) -> Tensor:
        labels = torch.cat([part.labels for part in parts]).to(self.device)
        # losses take class indices as int64 only
        return labels.long() if self._classification and _is_integer(labels) else labels

    def _finish(self, inputs: list[Tensor], labels: Tensor, counts: Mapping[int, int]) -> tuple[Tensor, Tensor, int]:
        """Return the server half's outputs, the loss, and the number of classes (0 unless it is classification)."""
        try:
            outputs = run_on_batch(self.server, inputs, len(labels))
            classes = self._check_labels(outputs, labels, counts)
            loss = self._loss(outputs, labels)
        except PSLError:
            raise
        except Exception as exc:
            spec = Activations(tuple(inputs), labels).spec()
            raise StepError(
                f"the server half failed on activations {spec} with labels {tuple(labels.shape)}: "
                f"{type(exc).__name__}: {exc}"
            ) from exc
        if loss.ndim:
            raise ConfigError(f"the loss must be the mean over the batch, got shape {tuple(loss.shape)}")
        return outputs, loss, classes

    def _check_labels(self, outputs: Tensor, labels: Tensor, counts: Mapping[int, int]) -> int:
        """Return the number of classes (0 unless it is classification), or raise StepError naming the clients."""
        if not self._classification:
            return 0
        if outputs.ndim < 2 or not _is_integer(labels):
            raise ConfigError(
                "classification needs outputs (batch, classes, ...) and integer labels, got outputs "
                f"{tuple(outputs.shape)} and {labels.dtype} labels: pass classification=False for other losses"
            )
        classes = outputs.shape[1]
        if not bool(((labels < 0) | (labels >= classes)).any()):
            return classes
        failures = {}
        for client, part in zip(counts, torch.split(labels, list(counts.values())), strict=True):
            wrong = part[(part < 0) | (part >= classes)]
            if wrong.numel():
                failures[client] = f"labels: expected integers from 0 to {classes - 1}, got {int(wrong[0])}"
        raise StepError("labels must be class indices", failures)


def run_on_batch(module: nn.Module, inputs: Sequence[Tensor], batch_size: int) -> Tensor:
    """Run a module on a batch; batch norm that sees one value a channel normalises by its running statistics.

    An epoch may end in a batch of one example: with fixed quotas, or if a client is lost from the last step. Of one
    value a channel there are no statistics, and torch refuses it. Layers that see several positions of the example have
    statistics, and use them, as in centralised training.
    """
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.training] if batch_size == 1 else []
    hooks = [norm.register_forward_pre_hook(_choose_statistics) for norm in norms]
    try:
        outputs: Tensor = module(*inputs)
    finally:
        for norm, hook in zip(norms, hooks, strict=True):
            hook.remove()
            norm.train()
    return outputs


def _choose_statistics(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    values, channels = inputs[0].numel(), inputs[0].shape[1]
    norm.train(values > channels)


def _is_integer(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)
