"""A part of the model at work on a client, in pure torch: it takes on weights, runs, and is differentiated."""

from __future__ import annotations

import copy
import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from psl_flower import tree
from psl_flower.errors import ConfigError, ProtocolError, PSLError
from psl_flower.origin import where
from psl_flower.protocol import Weights
from psl_flower.server import (
    REFUSED,
    Additivity,
    Loss,
    Reduction,
    WeightedLoss,
    example_gradients,
    loss_target,
    weighted,
)
from psl_flower.split import CannotTellError, find_mixing, shortened
from psl_flower.split.stored import held_names, is_plain
from psl_flower.tree import Tree

log = logging.getLogger("flwr.psl_flower")

_CHECKS = 16  # batches of a process that a loss is looked at in: of several clients


class ClientPart:
    """One part of the model in one process, for all clients there: they all have the same weights in a step.

    The weights that arrive are copied into the module's own memory and stay there until others arrive: a backward pass
    that runs some of the forward pass again (activation checkpointing) finds them.

    Parameters
    ----------
    name : str
        As the method calls it.
    module : nn.Module
        Returns a tensor or a tree of tensors. Its own weights are never read.
    device : torch.device
        Where it runs.
    """

    def __init__(self, name: str, module: nn.Module, device: torch.device) -> None:
        self.name, self.device = name, device
        self.module = module.to(device)
        self._mode: bool | None = None
        self._ran_once = False  # in training
        self._versions: tuple[str, str] | None = None
        self._held = held_names(module)
        self._caches: set[str] = set()  # of these, what forward sets: left to it
        self._seen_apart: list[bool] = []  # not empty, once rows were seen to be treated one by one; of copies, too
        self.parameters: dict[str, nn.Parameter] = {}

    def load(self, weights: Weights) -> None:
        """Take on weights, unless they are there.

        Raises
        ------
        ProtocolError
            If they are not this part's, or not finite.
        """
        versions = (weights.version, weights.constants_version)
        if versions == self._versions:
            return
        own = {name: t for name, t in self._tensors().items() if name in weights.constants or name not in self._held}
        constants = {n: t for n, t in weights.constants.items() if n in own or not self._left_to_forward(n)}
        self._check(own, {**weights.parameters, **constants})
        if wrong := [name for name, tensor in weights.parameters.items() if not tree.is_finite(tensor)]:
            raise ProtocolError(f"the server's weights are not finite: {wrong[0]!r} holds NaN or infinite values")
        old = self._versions
        self._versions = None
        given = dict(weights.parameters)
        if old is None or old[1] != weights.constants_version:
            given |= constants
        with torch.no_grad():
            for name, tensor in given.items():
                if own[name].dtype == tensor.dtype:
                    own[name].copy_(tensor)
                else:  # the server's model has another dtype: it decides
                    own[name].data = tensor.to(self.device, copy=True)
        self.parameters = {name: p for name, p in self.module.named_parameters() if name in weights.parameters}
        for name, p in self.module.named_parameters():
            p.requires_grad_(name in weights.parameters)
        self._versions = versions

    def _tensors(self) -> dict[str, Tensor]:
        found = {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}
        return {name: tensor for name, tensor in found.items() if name not in self._caches}

    def weights(self) -> Weights:
        """Return the weights as they are now; not copied."""
        own = self._tensors()
        constants = {name: t for name, t in own.items() if name not in self.parameters}
        return Weights(self.parameters, constants, version="", constants_version="")

    def digest(self) -> bytes:
        """Return a digest of the weights as they are now: equal where they are, whoever names them."""
        found = hashlib.sha256()
        for name, tensor in self._tensors().items():
            found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return found.digest()

    def copy(self) -> ClientPart:
        """Return another part of the same weights, which go their own way from here."""
        other = ClientPart(self.name, copy.deepcopy(self.module), self.device)
        other._seen_apart, other._ran_once = self._seen_apart, self._ran_once
        other._caches = set(self._caches)
        other.parameters = {name: p for name, p in other.module.named_parameters() if name in self.parameters}
        return other

    @contextmanager
    def running(self, *, training: bool) -> Iterator[nn.Module]:
        """Give the module in training or evaluation mode.

        Raises
        ------
        ConfigError
            If its forward pass changes a buffer or parameter: the change would be lost, for clients keep no state.
        """
        if self._mode is not training:  # at first, too: a model's own train() may freeze layers
            self._mode = training
            self.module.train(training)
        state = self._tensors()
        before = {name: t._version for name, t in state.items()}
        watched = {n: t.detach() for n, t in state.items() if training and _moves(t)}
        held = watched if self._ran_once else {n: t.clone() for n, t in watched.items()}
        try:
            with torch.set_grad_enabled(training):
                yield self.module
        except BaseException:
            self._versions = None  # who knows what it has changed
            raise
        after = self._tensors()
        # written to in place, or another tensor put in its place
        changed = {name for name, t in state.items() if after.get(name) is not t or t._version != before[name]}
        # by .data, of which no version tells: other values in place are seen in the first pass only
        changed |= {n for n, t in held.items() if t.data_ptr() != state[n].data_ptr() and not _same(t, state[n])}
        self._caches |= changed & self._held
        changed -= self._held
        self._ran_once |= training and not changed
        if changed:
            self._versions = None
        if changed and training:  # evaluation needs no state afterwards
            name = min(changed)
            kind = "buffer" if name in dict(self.module.named_buffers()) else "parameter"
            raise ConfigError(
                f"{self.called}'s forward pass changes its {kind} {name!r}, but clients keep no state between "
                "steps: replace that layer (see replace_batch_norm), or cut the model before it"
            )

    def shortened(self, tensors: Tree, length: int | None, *, given: bool = False) -> Tree:
        """Return what the server has padded to the length of the step's longest text at the length it was sent.

        Parameters
        ----------
        tensors : tree
            What the part takes; if `given`, the gradients of what it gives.
        length : int or None
            Of the texts here; None: there are none.
        given : bool
        """
        return shortened(tensors, getattr(self.module, "gives" if given else "takes", ()), length)

    def check_rows(self, run: Callable[[Any], Any], inputs: Tree) -> None:
        """Refuse a part that does not treat each example by itself, as soon as a batch can show it.

        Parameters
        ----------
        run : callable
            Runs the module on `inputs`, with weights that are there.
        inputs : tree
            Rows, on the part's device.

        Raises
        ------
        ConfigError
            If it does not.
        """
        if self._seen_apart or tree.rows(inputs, "inputs") < 2:
            return
        with self.running(training=True):
            try:
                mixing = find_mixing(run, inputs, module=self.module, who=self.called)
            except CannotTellError:
                return  # another batch may tell
        if mixing:
            raise ConfigError(mixing)
        self._seen_apart.append(True)

    @property
    def called(self) -> str:
        """What messages call it."""
        return "the client half" if self.name == "head" else f"the {self.name}"

    def _left_to_forward(self, name: str) -> bool:
        """Return whether a tensor that the server may have is not a buffer here, but what a forward pass sets."""
        return name in self._caches or is_plain(self.module, name)

    def _check(self, own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
        rule = "server and client must cut the same model in the same place"
        if different := sorted(given.keys() ^ own.keys()):
            where = "the server's" if different[0] in given else "the client's"
            raise ProtocolError(
                f"{rule}: {len(different)} names of the client half differ, {different[0]!r} is only in {where}"
            )
        for name, mine in own.items():
            if given[name].is_floating_point() != mine.is_floating_point():
                raise ProtocolError(
                    f"{rule}: dtype of {name!r}: {mine.dtype} here, the server's is {given[name].dtype}"
                )
            if (other := given[name].shape) != mine.shape:
                raise ProtocolError(
                    f"{rule}: shape of {name!r}: the client's is {tuple(mine.shape)}, the server's {tuple(other)}"
                )


def _moves(tensor: Tensor) -> bool:
    """Return whether a tensor is trained, or a buffer: what is frozen may be large."""
    return (tensor.requires_grad or not isinstance(tensor, nn.Parameter)) and tensor.layout is torch.strided


def _same(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors hold the same values; NaN equals NaN."""
    return (one.dtype, one.shape) == (other.dtype, other.shape) and (
        torch.equal(one, other)
        or (one.is_floating_point() and torch.equal(one.nan_to_num(), other.detach().nan_to_num()))
    )


@dataclass(frozen=True)
class LossFn:
    """A user's loss, where it is computed on the clients.

    Parameters
    ----------
    function : callable
        Takes (outputs, target) and returns the mean over the batch.
    classification : bool
        Whether targets are class indices.
    """

    function: Loss
    classification: bool
    reduction: Reduction = field(default_factory=Reduction)
    additivity: Additivity = field(default_factory=lambda: Additivity(_CHECKS))

    def __call__(self, outputs: Any, target: Tree, rows: int, device: torch.device) -> WeightedLoss:
        """Return the loss of the last part's outputs; see `weighted` for errors.

        Of what else the user's code raises, only the kind and the place are told: its text may hold labels.
        """
        labels = loss_target(target, device, classify=self.classification)
        options: dict[str, Any] = {"classify": self.classification, "reduction": self.reduction}
        try:
            found = weighted(self.function, outputs, labels, rows, **options)
        except PSLError:
            raise
        except Exception as exc:
            log.error("the loss failed: %s", where(exc), exc_info=exc)
            shown = ", ".join(f"{t.dtype} {tuple(t.shape[1:])}" for t in tree.leaves(labels))
            raise ConfigError(
                f"the loss failed on labels {shown} a row: {where(exc, text=False)}; what it says is in the log of the "
                "client, for it may tell labels"
            ) from exc
        if self.additivity.refuted(self.function, outputs, labels, rows, found, **options):
            raise ConfigError(REFUSED)
        return found

    def each(
        self, outputs: Any, target: Tree, rows: int, whole: WeightedLoss, device: torch.device
    ) -> tuple[WeightedLoss, dict[int, Tensor]]:
        """Return the mean of the losses of single examples, and its gradients; see `example_gradients`."""
        labels = loss_target(target, device, classify=self.classification)
        return example_gradients(self.function, outputs, labels, rows, whole)


def parameter_gradients(
    parameters: Mapping[str, Tensor],
    outputs: Tree,
    gradients: Tree,
    *,
    again: bool = False,
    penalty: Tensor | None = None,
) -> dict[str, Tensor | None]:
    """Return the gradients of parameters, given those of what they went into.

    Parameters
    ----------
    parameters : dict of str to Tensor
        Leaves.
    outputs : tree
        Attached to the graph.
    gradients : tree
        Of the same form; None for tensors that have none.
    again : bool
        Whether the graph is needed again.
    penalty : () tensor, optional
        What comes on top of the loss.

    Returns
    -------
    dict of str to Tensor or None
        On the CPU; None for parameters that took no part.

    Raises
    ------
    ConfigError
        If the gradients do not fit the outputs.
    """
    pairs = with_gradients(outputs, gradients)
    roots: list[Tensor] = []
    if pairs:
        given = [gradient for *_, gradient in pairs]
        roots.append(_Given.apply(given, *(output for _, output, _ in pairs)))  # type: ignore[no-untyped-call]
    if penalty is not None and penalty.requires_grad:
        roots.append(penalty)
    if not roots or not parameters:
        return dict.fromkeys(parameters)
    found = torch.autograd.grad(roots, list(parameters.values()), retain_graph=again, allow_unused=True)
    return {name: None if g is None else g.cpu() for name, g in zip(parameters, found, strict=True)}


class _Given(torch.autograd.Function):
    """A number whose gradients by tensors are those that are given.

    Given to torch.autograd.grad itself, they would have it import torch's symbolic shapes and all of sympy, half a
    second in every process before its first step.
    """

    @staticmethod
    def forward(ctx: Any, gradients: list[Tensor], *outputs: Tensor) -> Tensor:
        ctx.gradients = gradients
        return outputs[0].new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        return None, *ctx.gradients


def with_gradients(outputs: Tree, gradients: Tree) -> list[tuple[int, Tensor, Tensor]]:
    """Return which outputs have gradients, themselves, and these.

    Raises
    ------
    ConfigError
        If the gradients do not fit the outputs.
    """
    given = dict(zip(tree.paths(gradients, "output"), tree.leaves(gradients), strict=True))
    found = []
    for at, (path, output) in enumerate(zip(tree.paths(outputs, "output"), tree.leaves(outputs), strict=True)):
        gradient = given.pop(path, None)
        if gradient is None or not output.requires_grad:
            continue
        if gradient.shape != output.shape or gradient.dtype != output.dtype:
            raise ConfigError(
                f"the gradient of {path} must be {output.dtype} {tuple(output.shape)}, "
                f"got {gradient.dtype} {tuple(gradient.shape)}"
            )
        found.append((at, output, gradient.to(output.device)))
    if given:
        raise ConfigError(f"gradients of what did not cross the cut: {', '.join(given)[:200]}")
    return found
