"""Whether a loss is the mean over its batch or the sum, and of all rows at once, told by what it does."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from psl_flower import tree
from psl_flower.devices import generators
from psl_flower.server.apart import apart

SUMMED = (
    "the loss is the sum over a batch, not the mean: gradients grow with the batch, and what is told of a round or an "
    "evaluation is the sum over all its examples (for means, give the loss reduction='mean')"
)
_CLOSE = 1e-2  # rounding in half precision


class Reduction:
    """Finds out, once, what a loss does with a batch that is repeated.

    Of a batch repeated n times, a sum is n times as large, and a mean the same; one that goes row by row takes n times
    as many means. Until a loss is seen that is neither 0 nor NaN, it is taken for a mean.
    """

    def __init__(self) -> None:
        self._is_sum: bool | None = None
        self._by_rows: bool | None = None

    def is_sum(self, loss: Any, outputs: Any, labels: Any, value: float) -> bool:
        """Return whether a loss is a sum.

        Parameters
        ----------
        loss : callable
            A copy of it is called twice, the first time that this is asked.
        outputs, labels
            What it was given.
        value : float
            What it returned.
        """
        if self._is_sum is None and value and math.isfinite(value):
            asked = apart(loss)
            self._is_sum = asked is not None and all(
                math.isclose(_repeated(n, asked, outputs, labels), n * value, rel_tol=_CLOSE) for n in (2, 3)
            )
        return bool(self._is_sum)

    def goes_by_rows(
        self, loss: Any, outputs: Any, labels: Any, rows: int, terms: int, count: Callable[[Any, Any, Any], int]
    ) -> bool:
        """Return whether a loss is made of means of its examples, one by one.

        Parameters
        ----------
        loss : callable
            A copy of it is called once, the first time that this may be.
        outputs, labels
            What it was given.
        rows : int
            Examples in the batch.
        terms : int
            How many means it is made of.
        count : callable
            Takes a loss, outputs and labels, and returns these.
        """
        if self._by_rows is None and terms and (terms > 1 or rows == 1):
            asked = apart(loss)
            self._by_rows = asked is not None and _repeated(2, partial(count, asked), outputs, labels) == 2 * terms
        return bool(self._by_rows)


def _repeated(n: int, function: Any, outputs: Any, labels: Any) -> float:
    """Return what a function says of a batch repeated n times; NaN where it cannot take it."""
    put_back = generators()
    try:
        with torch.no_grad():
            repeated = [tree.map_leaves(lambda t: torch.cat([t] * n), each) for each in (outputs, labels)]
            return float(function(*repeated))
    except Exception:  # the user's code, with more than it was made for
        return math.nan
    finally:
        put_back()
