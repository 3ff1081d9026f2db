"""A batch, and whether it is the same when it is drawn again."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from psl_flower.errors import ConfigError
from psl_flower.tree import Tree, leaves

_MOST_SAMPLED = 1 << 16  # elements of a leaf that a checksum looks at: 0.2 ms for float32


@dataclass(frozen=True, eq=False)
class Batch:
    """Some examples of a client.

    Parameters
    ----------
    inputs : tree
        What the model's ``forward`` takes, batch rows first: a tensor, or a tuple or dict of such trees.
    target : tree or None
        What the loss compares the model's outputs with, batch rows first; None where it is not known here.
    size : int
        Rows.
    """

    inputs: Tree
    target: Tree | None
    size: int

    def __iter__(self) -> Iterator[Tree]:
        """Yield inputs and target: ``x, y = batch``."""
        yield self.inputs
        yield self.target


def checksum(batch: Batch) -> int:
    """Return a checksum of what a batch holds, below 2**32: equal where drawing again gave the same.

    Of a large leaf it looks at elements at an odd distance from each other, so that it takes less than a millisecond a
    leaf; random transforms change most elements of a row.
    """
    total = batch.size
    for tree in (batch.inputs, batch.target):
        for leaf in [] if tree is None else leaves(tree):
            total = zlib.crc32(f"{leaf.dtype} {tuple(leaf.shape)}".encode(), total)
            total = zlib.crc32(_sampled(leaf), total)
    return total


def _sampled(leaf: Tensor) -> bytes:
    flat = leaf.detach().reshape(-1)
    step = -(-len(flat) // _MOST_SAMPLED) | 1  # odd: it meets all columns of a picture whose width is a power of 2
    some = (flat[::step] if step > 1 else flat).contiguous().cpu()
    return some.view(torch.uint8).numpy().tobytes()


def check_drawn_again(batch: Batch, before: int, name: str) -> None:
    """Raise ConfigError unless a batch that was drawn again has the checksum it had before.

    Parameters
    ----------
    batch : Batch
        As drawn now.
    before : int
        `checksum` of the same examples as first drawn, with the same seed.
    name : str
        What data they are of, for the message: "training data".
    """
    if checksum(batch) != before:
        raise ConfigError(
            f"drawing the same examples of the {name} twice gave different data, so the two halves of a step would not "
            "fit together: something in the dataset, its transforms or collate_fn draws random numbers from a "
            "generator of its own, or keeps a state. Use the global generators of Python (random), numpy (np.random) "
            "or torch, which are seeded for each step"
        )
