"""A split-learning client: its data, its batches, and its half of the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from psl_flower.data import (
    Batch,
    ClassNumbers,
    Examples,
    PadTexts,
    Seeds,
    agreed,
    bind_inputs,
    forward_signature,
    read_together,
    unwrapped,
)
from psl_flower.data.rows import TEST
from psl_flower.errors import BadRowsError, ConfigError, ProtocolError
from psl_flower.failures import Failure, Kind
from psl_flower.origin import where
from psl_flower.privacy import Secret
from psl_flower.protocol import Config, Description, Orders, WorkOrder
from psl_flower.seeds import PutOff, to_end
from psl_flower.split.half import Part as ModelPart
from psl_flower.tree import Tree, as_tree, rows
from psl_flower.typing import IntArray

# What an order of examples depends on.
_OrderKey = tuple[int, int, int, tuple[int, ...], PutOff]


class SplitClient:
    """Draws batches from its own data, runs the client half on them, and keeps no model state.

    Subclass it to make batches or run the forward pass your own way: override `batch`, `labels` or `forward`.
    Everything random in them must come from the global generators of Python, numpy or torch, which are seeded for each
    step: the same work order then gives the same result on any process.

    Parameters
    ----------
    train : Examples or map-style dataset
        See `psl_flower.data.Examples` for the forms of its rows.
    test : Examples or map-style dataset, optional
        For split evaluation.
    partition_id : int, optional
        As the node is configured.
    config : dict, optional
        The strategy's `train_config`.
    """

    def __init__(
        self,
        train: Any,
        test: Any = None,
        *,
        partition_id: int | None = None,
        config: Config | None = None,
    ) -> None:
        data = {"training data": train} if test is None else {"training data": train, TEST: test}
        self._known = [d if isinstance(d, Examples) else Examples(d, name=name) for name, d in data.items()]
        self.train: Any = self._known[0].dataset
        self.test: Any = None if test is None else self._known[1].dataset
        self.partition_id, self.config = partition_id, dict(config or {})
        self._unreadable: dict[int, str] = {}  # examples found so when all labels were read, and why
        self._labels: IntArray | None = None
        self._permutation: tuple[_OrderKey, IntArray] | None = None
        self._by_class: tuple[_OrderKey, IntArray, IntArray] | None = None

    # What is taken for the labels of some training examples, by their indices; as they are, where it is None.
    told_labels: Callable[[IntArray, IntArray], IntArray] | None = None
    # What becomes of the model's outputs for test examples, with their indices, where clients compute them.
    on_predict: Callable[[Tree, IntArray], Tree] | None = None

    # What only this client knows in the run, by which it draws examples where the server leaves that to it.
    secret: Callable[[], Secret] | None = None

    # --- to override -------------------------------------------------------------------------------------------------
    def batch(self, dataset: Any, indices: IntArray) -> Any:
        """Return the examples at `indices`: a `Batch`, or a pair of inputs and labels (trees of tensors).

        Reads the dataset in the fastest way it offers, see `psl_flower.data.Examples`.
        """
        return self._examples(dataset).batch(indices)

    def labels(self, dataset: Any) -> IntArray:
        """Return the class of every example, (n,) int64; -1 for examples that turned out not to be readable."""
        return self._examples(dataset).labels(self._unreadable)

    def forward(self, half: nn.Module, inputs: Tree) -> Tree:
        """Run the client half on a batch; the tensors returned cross the cut."""
        signature = half.signature() if isinstance(half, ModelPart) else forward_signature(half)
        arguments, named = bind_inputs(signature, inputs)
        try:
            return half(*arguments, **named)
        except (AttributeError, IndexError, TypeError) as error:  # so says a tensor that is taken for a dict
            if not (hint := unwrapped(signature, inputs)):
                raise
            raise ConfigError(f"{where(error)} ({hint})") from error

    # --- what the server asks ----------------------------------------------------------------------------------------
    def describe(self, *, label_counts: bool = False, method: str = "", model: str = "") -> Description:
        """Say how much data there is, and of which classes if asked."""
        labels = counts = None
        if label_counts:
            held = np.delete(self._train_labels(), list(self._unreadable))
            labels, counts = np.unique(held, return_counts=True)
            if labels.size and labels[0] < 0:
                raise ConfigError(f"labels must not be negative, got {labels[0]}")
        return Description(
            partition_id=self.partition_id,
            num_examples=len(self.train),
            num_test_examples=0 if self.test is None else len(self.test),
            labels=labels,
            counts=None if counts is None else counts.astype(np.int64),
            left_out=dict(self._unreadable),
            method=method,
            model=model,
        )

    def draw_batch(self, order: WorkOrder) -> Batch:
        """Return the examples of a work order."""
        dataset, indices = self._chosen(order)
        found = self.batch(dataset, indices)
        if isinstance(found, Batch):
            return found
        inputs, target = found
        batch = Batch(as_tree(inputs, "inputs"), as_tree(torch.as_tensor(target), "label"), len(indices))
        if (size := rows((batch.inputs, batch.target), "a batch")) != len(indices):
            raise ConfigError(f"{type(self).__name__}.batch was asked for {len(indices)} examples, it returned {size}")
        return batch

    @staticmethod
    def draw_together(clients: Sequence[SplitClient], orders: Orders, seed: Seeds) -> Batch | None:
        """Return the examples of several clients' orders as one batch; None where each must draw its own.

        Parameters
        ----------
        seed : Seeds
            Where what is random for each begins.
        """
        own = (SplitClient.draw_batch, SplitClient.batch)
        if any((type(client).draw_batch, type(client).batch) != own for client in clients):
            return None
        chosen = [client._chosen(order) for client, order in zip(clients, orders.each(), strict=True)]
        examples = [client._examples(dataset) for client, (dataset, _) in zip(clients, chosen, strict=True)]
        return read_together(examples, [indices for _, indices in chosen], seed)

    @property
    def padding(self) -> PadTexts | None:
        """What pads this client's texts; None if its batches are collated otherwise."""
        collate_fn = self._known[0].collate_fn
        return collate_fn if isinstance(collate_fn, PadTexts) else None

    def _chosen(self, order: WorkOrder) -> tuple[Any, IntArray]:
        """Return the dataset that an order is about, and the indices of its examples there."""
        return self.test if order.test else self.train, self.draw(order)

    def unreadable(self, error: BadRowsError) -> Failure:
        """Return what a client says of examples that it cannot read, with their classes where it knows them."""
        labels = {}
        if self._labels is not None:
            labels = {row: int(self._labels[row]) for row in error.rows if self._labels[row] >= 0}
        return Failure(Kind.UNREADABLE, error.message, error.rows, labels)

    # --- the order of examples ---------------------------------------------------------------------------------------
    def draw(self, order: WorkOrder) -> IntArray:
        """Return the indices of a work order's examples, (count,) int64.

        Raises
        ------
        ProtocolError
            If the order asks for more than there is.
        """
        if order.test:
            held = 0 if self.test is None else len(self.test)
            if order.count > held - len(order.left_out) - order.start:
                raise ProtocolError(f"asked for {order.count} test examples from {order.start} on, of {held}")
            return order.order_of(held)[order.start : order.start + order.count]
        if order.drawing is not None:
            return self._drawn(order)
        if order.class_starts is None or order.class_counts is None:
            permutation = self._epoch_permutation(order)
            if order.start < 0 or not 0 < order.count <= len(permutation) - order.start:
                raise ProtocolError(
                    f"asked for {order.count} examples from {order.start} on, of {len(permutation)}: a client's data "
                    "must not become fewer while a run lasts"
                )
            return permutation[order.start : order.start + order.count]
        indices, bounds = self._epoch_classes(order)
        # classes beyond those this client holds have no examples
        there = np.zeros(len(order.class_counts), dtype=np.int64)
        sizes = np.diff(bounds)[: len(there)]
        there[: len(sizes)] = sizes
        starts, counts = order.class_starts, order.class_counts
        wrong = np.flatnonzero((starts < 0) | (counts < 0) | (starts + counts > there))
        if wrong.size or counts.sum() != order.count:
            c = wrong[0] if wrong.size else 0
            raise ProtocolError(
                f"asked for {counts[c]} examples of class {c} from {starts[c]} on, of {there[c]} "
                f"({counts.sum()} in all classes, {order.count} in the order)"
            )
        taken = np.flatnonzero(counts)
        return np.concatenate([indices[bounds[c] + starts[c] : bounds[c] + starts[c] + counts[c]] for c in taken])

    def _drawn(self, order: WorkOrder) -> IntArray:
        """Return examples drawn by the client's secret: any so many of them are as likely as any others."""
        if self.secret is None:
            raise ProtocolError("this client has no secret to draw its examples by: make it with split_client_app")
        readable = np.arange(len(self.train))
        if order.left_out:
            readable = np.delete(readable, order.left_out)
        if not 0 < order.count <= len(readable):
            raise ProtocolError(f"asked to draw {order.count} examples, of {len(readable)}")
        lots = self.secret().uniform(order.lot(), np.zeros(1, dtype=np.int64), len(readable))[0]
        return np.sort(readable[np.argpartition(lots, order.count - 1)[: order.count]])

    def _epoch_permutation(self, order: WorkOrder) -> IntArray:
        key = (order.seed, order.epoch, order.client, order.left_out, order.put_off)
        if self._permutation is None or self._permutation[0] != key:
            permutation = order.order_of(len(self.train))
            self._permutation = (key, permutation)
        return self._permutation[1]

    def _epoch_classes(self, order: WorkOrder) -> tuple[IntArray, IntArray]:
        """Return the epoch's order of examples with class c's at ``bounds[c]:bounds[c + 1]``."""
        key = (order.seed, order.epoch, order.client, order.left_out, order.put_off)
        if self._by_class is None or self._by_class[0] != key:
            permutation = self._epoch_permutation(order)
            labels = self._train_labels()[permutation]
            permutation, labels = permutation[labels >= 0], labels[labels >= 0]
            indices = permutation[np.argsort(labels, kind="stable")]
            bounds = np.concatenate(([0], np.cumsum(np.bincount(labels))))
            for of_class, start, count in order.put_off:
                if 0 <= of_class < len(bounds) - 1:
                    part = slice(bounds[of_class], bounds[of_class + 1])
                    indices[part] = to_end(indices[part], start, count)
            self._by_class = (key, indices, bounds)
        return self._by_class[1], self._by_class[2]

    def class_numbers(self) -> ClassNumbers | None:
        """Return which number each class has, where the data say so by name.

        Raises
        ------
        ConfigError
            If a class has one number in some data, and another in others.
        """
        own = (type(self).draw_batch, type(self).batch) == (SplitClient.draw_batch, SplitClient.batch)
        told = [(data.name, each) for data in self._known for each in data.class_numbers()]
        return agreed((name, each if own else replace(each, sure=False)) for name, each in told)

    def classes(self) -> IntArray:
        """Return the classes that there are training examples of, ascending int64, whatever is told of them."""
        labels = self._true_labels()
        return np.unique(labels[labels >= 0])

    def _true_labels(self) -> IntArray:
        try:
            return self.labels(self.train)
        except BadRowsError as error:
            self._unreadable = dict(error.rows)
            return self.labels(self.train)

    def _train_labels(self) -> IntArray:
        if self._labels is None:
            self._labels = self._true_labels()
            if self.told_labels is not None:
                known = np.flatnonzero(self._labels >= 0)
                self._labels = self._labels.copy()
                self._labels[known] = self.told_labels(self._labels[known], known)
        return self._labels

    def _examples(self, dataset: Any) -> Examples:
        for examples in self._known:
            if examples.dataset is dataset:
                return examples
        return Examples(dataset)
