"""A split-learning client: its data, its batches, and its half of the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Subset, TensorDataset, default_collate

from psl_flower.client.worker import Graph, Half, Worker
from psl_flower.devices import seeded
from psl_flower.errors import ConfigError
from psl_flower.protocol import (
    Activations,
    BackwardRequest,
    Config,
    DescribeRequest,
    Description,
    EvaluateRequest,
    ForwardRequest,
    Gradients,
    WorkOrder,
)
from psl_flower.typing import IntArray


class SplitClient:
    """Draws batches from its own data, runs the client half forward and backward, and keeps no model state.

    Subclass it to make batches or run the forward pass your own way: override `batch`, `labels` or `forward`.
    Everything random in them must come from torch's global generators, which are seeded for each step: the same work
    order then gives the same result on any process.

    Parameters
    ----------
    half : nn.Module
        The client half, without layers that use batch statistics.
    train : map-style dataset of (input, label)
        See `batch` for the ways it is read.
    test : map-style dataset, optional
        For split evaluation.
    partition_id : int, optional
        As the node is configured.
    config : dict, optional
        The strategy's `train_config`.
    device : torch.device
        Where the half runs.
    """

    def __init__(
        self,
        half: nn.Module,
        train: Any,
        test: Any = None,
        *,
        partition_id: int | None = None,
        config: Config | None = None,
        device: torch.device | None = None,
    ) -> None:
        for dataset, name in ((train, "training"), (() if test is None else test, "test")):
            if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
                raise ConfigError(
                    f"the {name} data must be a map-style dataset (len and indexing), got {dataset!r:.80}"
                )
        self.train, self.test, self.partition_id = train, test, partition_id
        self.config = dict(config or {})
        self.worker = Worker(half, device or torch.device("cpu"))
        self._labels: IntArray | None = None
        self._permutation: tuple[tuple[int, int, int], IntArray] | None = None
        self._by_class: tuple[tuple[int, int, int], IntArray, IntArray] | None = None

    # --- to override -------------------------------------------------------------------------------------------------
    def batch(self, dataset: Any, indices: IntArray) -> tuple[Any, Tensor]:
        """Return the inputs (a tensor, or a tuple of tensors) and labels of the examples at `indices`.

        Reads the dataset in the fastest way it offers: its own ``get_batch(indices)``; the tensors of a
        ``TensorDataset``; ``__getitems__`` (torch's batched fetch); or one example at a time.
        """
        if hasattr(dataset, "get_batch"):
            inputs, labels = dataset.get_batch(indices)
        elif isinstance(dataset, TensorDataset):
            rows = torch.from_numpy(indices)
            *inputs, labels = (tensor[rows] for tensor in dataset.tensors)
            inputs = inputs[0] if len(inputs) == 1 else tuple(inputs)
        else:
            fetch = getattr(dataset, "__getitems__", None)
            examples = fetch(indices.tolist()) if fetch else [dataset[i] for i in indices.tolist()]
            inputs, labels = default_collate([_pair(example) for example in examples])
        return inputs, labels

    def labels(self, dataset: Any) -> IntArray:
        """Return the class of every example, (n,) int64: the dataset's `targets` or `labels` if it has them."""
        found = _listed_labels(dataset)
        if found is None:
            rows = [np.arange(i, min(i + _READ_ROWS, len(dataset))) for i in range(0, len(dataset), _READ_ROWS)]
            with seeded(0, torch.device("cpu")):  # reading an example may augment it
                parts = [np.asarray(self.batch(dataset, some)[1]) for some in rows]
            found = np.concatenate(parts) if parts else []
        array = np.asarray(found)
        if array.shape != (len(dataset),) or (len(array) and not np.issubdtype(array.dtype, np.integer)):
            raise ConfigError(
                f"this sampler plans by class: expected one whole number a label, got {array.dtype} {array.shape}; "
                "use a sampler that needs no label counts"
            )
        return array.astype(np.int64)

    def forward(self, half: Half, inputs: Any) -> tuple[Tensor, ...]:
        """Run the client half on a batch; the tensors returned cross the cut."""
        return half(*inputs) if isinstance(inputs, tuple | list) else half(inputs)

    # --- what the server asks ----------------------------------------------------------------------------------------
    def describe(self, request: DescribeRequest) -> Description:
        """Say how much data there is, and of which classes if asked."""
        labels = counts = None
        if request.label_counts:
            labels, counts = np.unique(self._train_labels(), return_counts=True)
            if labels.size and labels[0] < 0:
                raise ConfigError(f"labels must not be negative, got {labels[0]}")
        return Description(
            partition_id=self.partition_id,
            num_examples=len(self.train),
            num_test_examples=0 if self.test is None else len(self.test),
            labels=labels,
            counts=None if counts is None else counts.astype(np.int64),
        )

    def run_forward(self, request: ForwardRequest) -> Graph:
        """Draw the batch of a work order and run the client half on it."""
        order, device = request.order, self.worker.device
        with seeded(order.step_seed(), device):
            inputs, labels = self.batch(self.train, self.draw(order))
            with self.worker.bound(request.weights, training=True) as (half, parameters):
                activations = self.forward(half, to_device(inputs, device))
        return Graph(activations, torch.as_tensor(labels), parameters)

    def run_backward(self, request: BackwardRequest, graph: Graph) -> Gradients:
        """Return the parameter gradients of a batch."""
        gradients, unused = graph.backward(request.gradients)
        return Gradients(gradients, unused, request.order.step)

    def evaluate(self, request: EvaluateRequest) -> Activations:
        """Return the activations of a slice of the test data."""
        if self.test is None or request.start < 0 or not 0 < request.count <= len(self.test) - request.start:
            held = 0 if self.test is None else len(self.test)
            raise ConfigError(f"asked for {request.count} test examples from {request.start} on, of {held}")
        with seeded(0, self.worker.device):
            inputs, labels = self.batch(self.test, np.arange(request.start, request.start + request.count))
            with self.worker.bound(request.weights, training=False) as (half, _):
                activations = self.forward(half, to_device(inputs, self.worker.device))
        return Activations(activations, torch.as_tensor(labels))

    # --- the order of examples ---------------------------------------------------------------------------------------
    def draw(self, order: WorkOrder) -> IntArray:
        """Return the indices of a work order's examples, (count,) int64.

        Raises
        ------
        ConfigError
            If the order asks for more than there is.
        """
        if order.class_starts is None or order.class_counts is None:
            permutation = self._epoch_permutation(order)
            if order.start < 0 or not 0 < order.count <= len(permutation) - order.start:
                raise ConfigError(f"asked for {order.count} examples from {order.start} on, of {len(permutation)}")
            return permutation[order.start : order.start + order.count]
        indices, bounds = self._epoch_classes(order)
        # classes beyond those this client holds have no examples
        held = np.zeros(len(order.class_counts), dtype=np.int64)
        sizes = np.diff(bounds)[: len(held)]
        held[: len(sizes)] = sizes
        starts, counts = order.class_starts, order.class_counts
        wrong = np.flatnonzero((starts < 0) | (counts < 0) | (starts + counts > held))
        if wrong.size or counts.sum() != order.count:
            c = wrong[0] if wrong.size else 0
            raise ConfigError(
                f"asked for {counts[c]} examples of class {c} from {starts[c]} on, of {held[c]} "
                f"({counts.sum()} in all classes, {order.count} in the order)"
            )
        taken = np.flatnonzero(counts)
        return np.concatenate([indices[bounds[c] + starts[c] : bounds[c] + starts[c] + counts[c]] for c in taken])

    def _epoch_permutation(self, order: WorkOrder) -> IntArray:
        key = (order.seed, order.epoch, order.client)
        if self._permutation is None or self._permutation[0] != key:
            self._permutation = (key, order.epoch_rng().permutation(len(self.train)))
        return self._permutation[1]

    def _epoch_classes(self, order: WorkOrder) -> tuple[IntArray, IntArray]:
        """Return the epoch's order of examples with class c's at ``bounds[c]:bounds[c + 1]``."""
        key = (order.seed, order.epoch, order.client)
        if self._by_class is None or self._by_class[0] != key:
            permutation = self._epoch_permutation(order)
            labels = self._train_labels()[permutation]
            indices = permutation[np.argsort(labels, kind="stable")]
            self._by_class = (key, indices, np.concatenate(([0], np.cumsum(np.bincount(labels)))))
        return self._by_class[1], self._by_class[2]

    def _train_labels(self) -> IntArray:
        if self._labels is None:
            self._labels = self.labels(self.train)
        return self._labels


# Examples read at once where only their labels are wanted.
_READ_ROWS = 256


def _listed_labels(dataset: Any) -> Any:
    """Return the labels a dataset lists apart from its examples, or None."""
    if isinstance(dataset, TensorDataset):
        return dataset.tensors[-1]
    if isinstance(dataset, Subset):
        found = _listed_labels(dataset.dataset)
        return None if found is None else np.asarray(found)[np.asarray(dataset.indices, dtype=np.int64)]
    return getattr(dataset, "targets", getattr(dataset, "labels", None))


def _pair(example: Any) -> Any:
    if isinstance(example, tuple | list) and len(example) == 2:
        return example
    kind = type(example).__name__ + (f" of {len(example)}" if isinstance(example, tuple | list) else "")
    raise ConfigError(
        f"examples must be pairs (input, label), got a {kind}: convert them in data_fn, or override SplitClient.batch"
    )


def to_device(inputs: Any, device: torch.device) -> Any:
    """Return a batch's inputs on a device."""
    if isinstance(inputs, Tensor):
        return inputs.to(device)
    if isinstance(inputs, Sequence) and not isinstance(inputs, str):
        return tuple(to_device(part, device) for part in inputs)
    raise ConfigError(f"a batch's inputs must be a tensor or a tuple of tensors, got {type(inputs).__name__}")
