"""Replies far larger than all others: whoever sends activations times a million ruins a model that is not guarded.

A reply is compared with what all clients have sent: the logarithm of its norm, an example, must not lie more than
`bound` robust standard deviations above the median (1.4826 times the median absolute deviation, the "modified z-score"
of Iglewicz and Hoaglin 1993). What most clients of a step do at once is the model's doing, and passes.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from psl_flower.typing import FloatArray, IntArray

# The least standard deviation of log norms: honest clients differ in scale, and gradients have longer tails. With the
# default bound of 10, a thousand and twenty thousand times the median are let in whatever the others send.
SPREAD_OF_ROWS, SPREAD_OF_GRADIENTS = 0.7, 1.0
_NORMAL = 1.4826  # from median absolute deviation to standard deviation, of a normal distribution
_HISTORY = 20  # replies to a stage that are remembered
_MOST_KEPT = 512  # norms remembered of each
_FEWEST = 3  # norms to compare with
_FEWEST_CLIENTS = 3  # for a majority, where nothing is remembered yet


class NormBounds:
    """Knows what norms are usual, by what is sent.

    Parameters
    ----------
    bound : float
        Robust standard deviations above the median.
    """

    def __init__(self, bound: float) -> None:
        self._bound = bound
        self._seen: dict[str, deque[FloatArray]] = {}
        self._met: Counter[str] = Counter()

    def outliers(self, name: str, norms: FloatArray, senders: IntArray, spread: float) -> dict[int, str]:
        """Return whose norms are out of bounds, with the reason; remember the others.

        Parameters
        ----------
        name : str
            Of what was sent.
        norms : (n,) float64
            Of n examples, or sums over some.
        senders : (n,) int64
            Whose each is.
        spread : float
            The least standard deviation of their logarithms.
        """
        self._met[name] += len(norms)
        active = norms > 0  # an example may well activate nothing
        logs, senders = np.log(norms[active]), senders[active]
        seen = self._seen.setdefault(name, deque(maxlen=_HISTORY))
        found: dict[int, str] = {}
        rest = np.ones(len(logs), dtype=np.bool_)
        now = set(senders.tolist())
        comparable = bool(seen) or len(now) >= _FEWEST_CLIENTS
        while comparable and rest.any():
            largest = int(np.flatnonzero(rest)[logs[rest].argmax()])
            others = rest & (senders != senders[largest])
            limit = self._limit([*seen, logs[others]], spread)
            if logs[largest] <= limit:
                break
            found[int(senders[largest])] = (
                f"{name}: norm {_shown(logs[largest])} an example, expected at most {_shown(limit)}: "
                "far above those of all clients (FaultPolicy.outlier_bound)"
            )
            rest = others
        if len(now) > 1 and 2 * len(found) > len(now):  # most of them: it is the model
            found, rest = {}, np.ones(len(logs), dtype=np.bool_)
        if rest.any():
            seen.append(logs[rest][:: math.ceil(rest.sum() / _MOST_KEPT)])
        return found

    def knows(self, name: str) -> bool:
        """Return whether enough was sent of it to compare a sum with, whatever that is of."""
        return self._met[name] >= _FEWEST

    def state_dict(self) -> dict[str, Any]:
        """Return what is known, for a checkpoint: a resumed run has as much to compare with."""
        return {"seen": {name: list(each) for name, each in self._seen.items()}, "met": dict(self._met)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self._seen = {name: deque(each, maxlen=_HISTORY) for name, each in state["seen"].items()}
        self._met = Counter(state["met"])

    def _limit(self, logs: list[FloatArray], spread: float) -> float:
        known = np.concatenate(logs) if logs else np.empty(0)
        if len(known) < _FEWEST:
            return math.inf
        median = float(np.median(known))
        deviation = _NORMAL * float(np.median(np.abs(known - median)))
        return median + self._bound * max(deviation, spread)


def row_norms(tensor: Tensor) -> FloatArray:
    """Return the L2 norm of each row, (n,) float64; infinite where it is beyond the dtype's range."""
    flat = tensor.detach().reshape(len(tensor), -1)
    flat = flat.float() if flat.dtype in (torch.float16, torch.bfloat16) else flat
    return np.asarray(torch.linalg.vector_norm(flat, dim=1).double())


def sum_norm(tensors: Iterable[Tensor]) -> FloatArray:
    """Return the L2 norm of several tensors as one vector, (1,) float64."""
    norms = [torch.linalg.vector_norm(t.detach(), dtype=torch.float64) for t in tensors]
    return torch.linalg.vector_norm(torch.stack(norms)).reshape(1).numpy() if norms else np.zeros(1)


def _shown(log_norm: float) -> str:
    return "beyond range" if math.isinf(log_norm) or log_norm > 700 else f"{math.exp(log_norm):.3g}"
