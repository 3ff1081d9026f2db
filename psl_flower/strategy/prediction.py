"""What the model says of the clients' examples, without training: what `ParallelSplitLearning.predict` returns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from psl_flower import tree
from psl_flower.data import IGNORED
from psl_flower.errors import ConfigError
from psl_flower.precision import widened
from psl_flower.protocol import Orders
from psl_flower.tree import Tree
from psl_flower.typing import IntArray


@dataclass(frozen=True, eq=False)
class Prediction:
    """What the model says of some of a client's test examples.

    Parameters
    ----------
    rows : (n,) int64
        Their places in the client's test data, ascending.
    outputs : tree
        Of the model in evaluation mode, a row an example, on the CPU, bfloat16 as float32. In a U shape what the
        client's `on_predict` has returned; None where that is nothing, as it is for all clients then.
    labels : tree
        As the client tells them, a row an example; None where they stay there.
    """

    rows: IntArray
    outputs: Tree
    labels: Tree


def by_client(
    batches: Iterable[tuple[Orders, Tree, Tree]], on_batch: Callable[[int, Prediction], Any] | None = None
) -> dict[int, Prediction]:
    """Return what was predicted for each client, or tell it batch by batch and keep nothing.

    Parameters
    ----------
    batches : iterable of (Orders, tree, tree)
        Orders of test data, outputs and labels.
    on_batch : callable, optional
        Takes a client's id and its share of a batch.
    """
    found: dict[int, list[Prediction]] = {}
    for orders, outputs, labels in batches:
        pieces = (_split(each, orders.counts.tolist()) for each in (outputs, labels))
        for order, *theirs in zip(orders.each(), *pieces, strict=True):
            end = order.start + order.count
            share = Prediction(order.order_of(end + len(order.left_out))[order.start : end], *theirs)
            if on_batch is None:
                found.setdefault(order.client, []).append(share)
            else:
                on_batch(order.client, share)
    return {client: _joined(found[client]) for client in sorted(found)}


def _split(rows: Tree, counts: Sequence[int]) -> list[Tree]:
    if not tree.leaves(rows):
        return [rows] * len(counts)
    return tree.split(widened(tree.to_device(rows, torch.device("cpu"))), counts, "outputs")


def _joined(shares: Sequence[Prediction]) -> Prediction:
    """Return a client's shares as one; shorter texts end in zeros, their labels in what no loss counts."""
    given = [bool(tree.leaves(share.outputs)) for share in shares]
    if any(given) and not all(given):
        raise ConfigError(
            "on_predict must return rows for every batch of every client, or None for all: it gave rows in "
            f"{sum(given)} of {len(given)} batches of a client"
        )
    return Prediction(
        np.concatenate([share.rows for share in shares]),
        tree.join([share.outputs for share in shares], "outputs", fill=0),
        tree.join([share.labels for share in shares], "labels", fill=IGNORED),
    )
