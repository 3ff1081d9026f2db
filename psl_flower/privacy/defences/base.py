"""What a defence is: something that a client does, of its own accord, to what leaves it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from psl_flower.privacy.secret import Secret
from psl_flower.tree import Tree
from psl_flower.typing import FloatArray, IntArray


@dataclass(frozen=True, eq=False, kw_only=True)
class OutgoingRows:
    """Whose rows leave, and what random numbers they have.

    Parameters
    ----------
    secrets : sequence of Secret
        Of each client.
    counts : (A,) int64
        Rows of each, in the same order.
    examples : (n,) int64
        Which example of its client's data a row is of.
    purpose : bytes
        Names what leaves, and the defence.
    weights : callable
        Returns a digest of the weights that it was computed with.
    """

    secrets: Sequence[Secret]
    counts: IntArray
    examples: IntArray
    purpose: bytes
    weights: Callable[[], bytes]

    def uniform(self, rows: Tensor) -> FloatArray:
        """Return a number above 0 and below 1 for each entry of rows, (n, entries) float64.

        At the same weights an example always has the same numbers, whatever it is asked for with and how often; at
        other weights it has others.
        """
        purpose, width = self.purpose + self.weights(), rows[0].numel() if len(rows) else 0
        examples = np.split(self.examples, np.cumsum(self.counts)[:-1])
        drawn = [s.uniform(purpose, some, width) for s, some in zip(self.secrets, examples, strict=True)]
        return np.concatenate(drawn)

    def normal(self, rows: Tensor) -> Tensor:
        """Return standard normal numbers of the shape, dtype and device of rows, drawn in the same way."""
        return like(torch.special.ndtri(torch.from_numpy(self.uniform(rows))).numpy(), rows)


class Defence:
    """What a client does to what leaves it; a subclass overrides what it has a say in. Its arguments are its strength.

    Defences hang on the kinds of what leaves, and know no method: rows of activations, rows that are gradients of the
    loss at a cut, labels.

    Attributes
    ----------
    of_gradients : bool
        Whether it is about gradients at a cut: they leave clients only where those take the loss.
    """

    of_gradients: ClassVar[bool] = False

    @property
    def packing(self) -> int | None:
        """Bits that an entry of its rows has; 0 where few entries are other than zero, None where neither is so."""
        return None

    def meet(self, classes: IntArray, secret: Secret) -> None:
        """Take note of the classes that a client holds training examples of, (C,) int64 ascending.

        A subclass that overrides it is told before the client first draws; labels are read for it.
        """

    def rows(self, rows: Tensor, of: OutgoingRows) -> Tensor:
        """Return what leaves in place of activations, (n, ...); differentiable, the gradient comes back this way."""
        return rows

    def gradients(self, rows: Tensor, of: OutgoingRows) -> Tensor:
        """Return what leaves in place of gradients at a cut, (n, ...)."""
        return rows

    def penalty(self, inputs: Tree, rows: Tree, of: OutgoingRows) -> Tensor | None:
        """Return a term that is added to the loss, (); None for none.

        Parameters
        ----------
        inputs : tree
            Of the batch.
        rows : tree
            The activations that are to leave, before any defence, with their graph.
        """
        return None

    def labels(self, labels: IntArray, examples: IntArray, secret: Secret, purpose: bytes) -> IntArray:
        """Return what is taken for the labels of some examples of one client, (n,) int64."""
        return labels


def like(numbers: FloatArray, rows: Tensor) -> Tensor:
    """Return numbers as a tensor of the shape, dtype and device of rows."""
    return torch.from_numpy(numbers).to(rows.device, rows.dtype).reshape(rows.shape)
