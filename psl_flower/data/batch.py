"""A batch, and whether it is the same when it is drawn again."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

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
    """Return a checksum of what a batch holds, below 2**32: equal where drawing again gave the same."""
    return checksums(batch, [batch.size])[0]


def checksums(batch: Batch, counts: Sequence[int]) -> list[int]:
    """Return the `checksum` of each client's part of a batch.

    Of a large leaf it looks at elements at an odd distance from each other, so that it takes less than a millisecond a
    leaf; random transforms change most elements of a row.

    Parameters
    ----------
    counts : sequence of int
        Rows of each client, in their order.
    """
    totals = list(counts)
    for tree in (batch.inputs, batch.target):
        for leaf in [] if tree is None else leaves(tree):
            width, item = leaf.numel() // max(len(leaf), 1), leaf.element_size()
            raw = leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            forms = {count: f"{leaf.dtype} {(count, *leaf.shape[1:])}".encode() for count in set(counts)}
            begin = 0
            for i, count in enumerate(counts):
                some = raw[begin : begin + count * width * item]
                begin += len(some)
                step = -(-count * width // _MOST_SAMPLED) | 1  # odd: it meets all columns of a picture of any width
                if step > 1:
                    some = np.ascontiguousarray(some.reshape(-1, item)[::step])
                totals[i] = zlib.crc32(some.data, zlib.crc32(forms[count], totals[i]))
    return totals


def check_drawn_again(drawn: int, before: int, name: str) -> None:
    """Raise ConfigError unless a batch that was drawn again has the checksum it had before.

    Parameters
    ----------
    drawn : int
        `checksum` of the examples as drawn now.
    before : int
        That of the same examples as first drawn, with the same seed.
    name : str
        What data they are of, for the message: "training data".
    """
    if drawn != before:
        raise ConfigError(
            f"drawing the same examples of the {name} twice gave different data, so the two halves of a step would not "
            "fit together: something in the dataset, its transforms or collate_fn draws random numbers from a "
            "generator of its own, or keeps a state. Use the global generators of Python (random), numpy (np.random) "
            "or torch, which are seeded for each step"
        )
