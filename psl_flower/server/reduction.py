"""Whether a loss is the mean over its batch or the sum, told by what it does."""

from __future__ import annotations

import math
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
    """Finds out, once, what a loss does: of a batch repeated n times, a sum is n times as large, and a mean the same.

    Until a loss is seen that is neither 0 nor NaN, it is taken for a mean.
    """

    def __init__(self) -> None:
        self._is_sum: bool | None = None

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
            self._is_sum = asked is not None and all(_is_times(n, asked, outputs, labels, value) for n in (2, 3))
        return bool(self._is_sum)


def _is_times(n: int, loss: Any, outputs: Any, labels: Any, value: float) -> bool:
    """Return whether the loss of a batch repeated n times is n times that of the batch."""
    put_back = generators()
    try:
        with torch.no_grad():
            repeated = [tree.map_leaves(lambda t: torch.cat([t] * n), each) for each in (outputs, labels)]
            return math.isclose(float(loss(*repeated)), n * value, rel_tol=_CLOSE)
    except Exception:  # the user's code, with more than it was made for: no sum that could be told
        return False
    finally:
        put_back()
