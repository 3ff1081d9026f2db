"""What the server and the clients say to each other: requests, replies and the checks of a reply at the door.

Pure data: how a record becomes Flower records or frames is the business of ``psl_flower.exchange``.
"""

from __future__ import annotations

import cmath
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from psl_flower.errors import ProtocolError
from psl_flower.typing import IntArray

# Flower message types: "<category>.<action>".
DESCRIBE = "query.describe"
FORWARD = "train.forward"
BACKWARD = "train.backward"
EVALUATE = "evaluate.forward"
ATTACH = "train.attach"  # opens a stream, over which the others then travel

Config = Mapping[str, Any]


@dataclass(frozen=True, eq=False, kw_only=True)
class WorkOrder:
    """Which examples of its own a client takes to a step.

    Client k's order for an epoch is ``default_rng([seed, epoch, k]).permutation(n_k)``; the batch is
    ``order[start:start + count]``. With class quotas, class c's order is the label-c subsequence of that permutation
    and the batch is ``order_c[class_starts[c]:class_starts[c] + class_counts[c]]``, in ascending c. The client keeps no
    state: the same order always gives the same batch, on any process.

    Parameters
    ----------
    client : int
        Client id.
    seed, epoch, step : int
        Not negative.
    start, count : int
        Examples used before in this epoch, and examples to draw (at least 1).
    class_starts, class_counts : (C,) int64, optional
        The same for each class; both or neither.
    """

    client: int
    seed: int
    epoch: int
    step: int
    start: int
    count: int
    class_starts: IntArray | None = None
    class_counts: IntArray | None = None

    def epoch_rng(self) -> np.random.Generator:
        """Return the generator of the client's order of examples for the epoch."""
        return client_epoch_rng(self.seed, self.epoch, self.client)

    def step_seed(self) -> int:
        """Return the seed of everything random in the client's step (augmentation, dropout)."""
        return step_seed(self.seed, self.epoch, self.step, self.client)


def client_epoch_rng(seed: int, epoch: int, client: int) -> np.random.Generator:
    """Return the generator of a client's order of examples for an epoch."""
    return np.random.default_rng([seed, epoch, client])


def step_seed(seed: int, epoch: int, step: int, client: int | None = None) -> int:
    """Return a 63-bit seed for one party's randomness in one step; `client` None means the server half."""
    party = 0 if client is None else client + 1
    # the spawn key keeps this apart from the orders of examples, see Note [Sampler streams] in samplers/base.py
    state = np.random.SeedSequence([seed, epoch, step, party], spawn_key=(2,)).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))


@dataclass(frozen=True, eq=False)
class Weights:
    """The client half's state, by whole-model name.

    Parameters
    ----------
    parameters : dict of str to Tensor
        Those to return gradients for.
    constants : dict of str to Tensor
        Buffers and frozen parameters.
    version : str
        Names these values: no two states of any run share it.
    """

    parameters: Mapping[str, Tensor]
    constants: Mapping[str, Tensor]
    version: str


@dataclass(frozen=True, eq=False)
class DescribeRequest:
    """Ask a client who it is and how much data it holds."""

    label_counts: bool
    config: Config = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class ForwardRequest:
    """Ask for the cut-layer activations of a batch; `delay` is how many seconds a simulated straggler waits first."""

    order: WorkOrder
    weights: Weights
    config: Config = field(default_factory=dict)
    delay: float = 0.0


@dataclass(frozen=True, eq=False)
class BackwardRequest:
    """Ask for the parameter gradients of a batch, given the gradients of its activations (None: not differentiable)."""

    order: WorkOrder
    weights: Weights
    gradients: tuple[Tensor | None, ...]
    config: Config = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class EvaluateRequest:
    """Ask for the activations of test examples ``start:start + count``, in their own order.

    `config` is that of training, which says what the data is; `evaluate_config` comes on top.
    """

    start: int
    count: int
    weights: Weights
    config: Config = field(default_factory=dict)
    evaluate_config: Config = field(default_factory=dict)


Request = DescribeRequest | ForwardRequest | BackwardRequest | EvaluateRequest


@dataclass(frozen=True, eq=False)
class Description:
    """What a client says of itself.

    Parameters
    ----------
    partition_id : int, optional
        From its node configuration.
    num_examples, num_test_examples : int
        Sizes of its training and test data.
    labels, counts : (m,) int64, optional
        The classes it holds and how many examples of each; only if asked for.
    """

    partition_id: int | None
    num_examples: int
    num_test_examples: int
    labels: IntArray | None = None
    counts: IntArray | None = None

    def same_data(self, other: Description) -> bool:
        """Return whether `other` speaks of as many training examples, of the same classes."""
        mine, theirs = ((d.num_examples, _listed(d.labels), _listed(d.counts)) for d in (self, other))
        return mine == theirs

    def check(self, request: DescribeRequest) -> None:
        """Raise ProtocolError if the numbers are impossible."""
        if self.num_examples < 0 or self.num_test_examples < 0:
            raise ProtocolError(f"sizes must not be negative, got {self.num_examples} and {self.num_test_examples}")
        if self.partition_id is not None and self.partition_id < 0:
            raise ProtocolError(f"partition-id must not be negative, got {self.partition_id}")
        if self.num_examples > MAX_EXAMPLES:
            raise ProtocolError(f"num_examples must be at most {MAX_EXAMPLES}, got {self.num_examples}")
        if not request.label_counts:
            return
        if (
            self.labels is None
            or self.counts is None
            or self.labels.shape != self.counts.shape
            or self.labels.ndim != 1
        ):
            raise ProtocolError("label counts were asked for: expected one count for each label")
        if self.labels.size and (self.labels.min() < 0 or self.counts.min() < 0):
            raise ProtocolError("labels and their counts must not be negative")
        if self.labels.size and self.labels.max() >= MAX_CLASSES:
            raise ProtocolError(f"labels must be below {MAX_CLASSES}, got {self.labels.max()}")
        if len(np.unique(self.labels)) != len(self.labels):
            raise ProtocolError("labels must be unique")
        # each count on its own first: the sum of huge ones wraps around
        if (self.counts > self.num_examples).any() or self.counts.sum() != self.num_examples:
            raise ProtocolError(f"label counts add up to {self.counts.sum()}, num_examples is {self.num_examples}")


# What clients report decides how much memory a plan and a (clients, classes) table take: bound it.
MAX_EXAMPLES = 10**9
MAX_CLASSES = 100_000


@dataclass(frozen=True)
class TensorSpec:
    """What a tensor must look like; `shape` leaves out the batch dimension."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @staticmethod
    def of(tensor: Tensor) -> TensorSpec:
        """Return the spec a batch of examples obeys."""
        return TensorSpec(tensor.dtype, tuple(tensor.shape[1:]))

    def difference(self, tensor: Tensor, count: int) -> str | None:
        """Return how `tensor` differs from `count` examples of this spec, or None."""
        expected = (count, *self.shape)
        if tuple(tensor.shape) != expected:
            return f"shape: expected {expected}, got {tuple(tensor.shape)}"
        if tensor.dtype != self.dtype:
            return f"dtype: expected {self.dtype}, got {tensor.dtype}"
        return None


@dataclass(frozen=True)
class CutSpec:
    """What crosses the cut: one spec for each activation tensor, and the labels'."""

    activations: tuple[TensorSpec, ...]
    labels: TensorSpec

    def __str__(self) -> str:
        return ", ".join(f"{str(s.dtype).removeprefix('torch.')} {s.shape}" for s in self.activations)


@dataclass(frozen=True, eq=False)
class Activations:
    """The smashed data of a batch, and its labels; every tensor's first dimension is the batch."""

    tensors: tuple[Tensor, ...]
    labels: Tensor
    step: int | None = None

    def spec(self) -> CutSpec:
        """Return what this reply says crosses the cut."""
        return CutSpec(tuple(map(TensorSpec.of, self.tensors)), TensorSpec.of(self.labels))

    def check(self, count: int, spec: CutSpec, step: int | None = None) -> None:
        """Raise ProtocolError unless this is `count` examples of `spec`, all finite, for `step`."""
        if self.step != step:
            raise ProtocolError(f"reply to another step: expected step {step}, got {self.step}")
        if len(self.tensors) != len(spec.activations):
            raise ProtocolError(f"activations: expected {len(spec.activations)} tensors, got {len(self.tensors)}")
        for i, (tensor, expected) in enumerate(zip(self.tensors, spec.activations, strict=True)):
            if difference := expected.difference(tensor, count):
                raise ProtocolError(f"activations[{i}]: {difference}")
            _check_finite(tensor, f"activations[{i}]")
        if difference := spec.labels.difference(self.labels, count):
            raise ProtocolError(f"labels: {difference}")
        _check_finite(self.labels, "labels")


@dataclass(frozen=True, eq=False)
class Gradients:
    """A client's parameter gradients.

    Parameters
    ----------
    tensors : dict of str to Tensor
        By whole-model name.
    unused : tuple of str
        Parameters that took no part in the batch's forward pass; with `tensors` they are all parameters asked for.
    step : int
        Echo of the order's step.
    """

    tensors: Mapping[str, Tensor]
    unused: tuple[str, ...] = ()
    step: int | None = None

    def check(self, parameters: Mapping[str, Tensor], step: int) -> None:
        """Raise ProtocolError unless there is a finite gradient for each of `parameters`."""
        if self.step != step:
            raise ProtocolError(f"reply to another step: expected step {step}, got {self.step}")
        named = set(self.tensors) | set(self.unused)
        if missing := sorted(set(parameters) - named):
            raise ProtocolError(f"gradients: {len(missing)} missing, the first is {missing[0]!r}")
        if unknown := sorted(named - set(parameters)):
            raise ProtocolError(f"gradients: {len(unknown)} of unknown parameters, the first is {unknown[0]!r}")
        for name, tensor in self.tensors.items():
            expected = parameters[name]
            if tensor.shape != expected.shape:
                shapes = f"expected {tuple(expected.shape)}, got {tuple(tensor.shape)}"
                raise ProtocolError(f"gradient of {name!r}: shape: {shapes}")
            if tensor.dtype != expected.dtype:
                raise ProtocolError(f"gradient of {name!r}: dtype: expected {expected.dtype}, got {tensor.dtype}")
            _check_finite(tensor, f"gradient of {name!r}")


def _listed(values: IntArray | None) -> list[int] | None:
    return None if values is None else [int(v) for v in values]


Reply = Description | Activations | Gradients


def _check_finite(tensor: Tensor, name: str) -> None:
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return
    # A sum is finite only if all its terms are, and takes a tenth of the time. It may overflow by itself: then look.
    if cmath.isfinite(tensor.sum().item()):
        return
    wrong = int((~torch.isfinite(tensor)).sum())
    if wrong:
        raise ProtocolError(f"{name}: expected finite values, got {wrong} NaN or infinite")
