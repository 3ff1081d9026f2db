"""Distance correlation: whether what crosses has anything to do with the inputs, in whatever way."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from psl_flower.audit.attacks.base import SERVER
from psl_flower.audit.finding import Finding, Found
from psl_flower.audit.scene import Scene
from psl_flower.audit.statistics import p_value
from psl_flower.typing import FloatArray

NAME = "distance correlation"
_ROWS, _PERMUTATIONS = 600, 199


def measure_dependence(scene: Scene) -> Found:
    """Measure the dependence of activations on inputs, with a permutation test.

    No attack by itself: it says how much there is to be found, not how. The estimate is the bias-corrected one, which
    is about 0 for what is independent, however many dimensions there are; the plain one tends to 1 then (Szekely and
    Rizzo 2013, doi:10.1016/j.jmva.2013.02.012; NoPeek, arXiv 2008.09161, has the plain one).
    """
    rows = scene.rows("activations")
    if rows is None:
        return Found()
    rng = scene.rng()
    chosen = torch.from_numpy(rng.permutation(np.flatnonzero(~rows.shadow))[:_ROWS])
    value, by_chance = distance_correlation(rows.inputs[chosen].flatten(1), rows.flat()[chosen], rng, _PERMUTATIONS)
    finding = Finding(
        attack=NAME,
        party=SERVER,
        measure="bias-corrected dCor",
        value=value,
        floor=float(by_chance.mean()),
        p_value=p_value(value, by_chance),
    )
    return Found([finding])


def distance_correlation(
    x: Tensor, y: Tensor, rng: np.random.Generator, permutations: int = 0
) -> tuple[float, FloatArray]:
    """Return the bias-corrected distance correlation of two samples, and what it is when their pairing is shuffled.

    Parameters
    ----------
    x, y : (n, p) and (n, q) float Tensor
        At least 4 rows.
    permutations : int
        How many.

    Returns
    -------
    float
        The root of the estimate of the squared correlation, with the sign of that: -1 to 1.
    (permutations,) float64
    """
    a, b = (_centred(torch.cdist(of.double(), of.double())) for of in (x, y))
    scale = float((a.square().sum() * b.square().sum()).sqrt())
    if not scale:
        return 0.0, np.zeros(permutations)

    def correlation(order: np.ndarray[tuple[int], np.dtype[np.int64]] | None) -> float:
        other = b if order is None else b[order][:, order]
        squared = float((a * other).sum()) / scale
        return float(np.sign(squared) * abs(squared) ** 0.5)

    return correlation(None), np.array([correlation(rng.permutation(len(a))) for _ in range(permutations)])


def _centred(distances: Tensor) -> Tensor:
    """Return distances with their means taken out so that independent samples correlate by 0 (U-centred)."""
    n = len(distances)
    rows = distances.sum(dim=1) / (n - 2)
    centred = distances - rows[:, None] - rows[None, :] + distances.sum() / ((n - 1) * (n - 2))
    return centred.fill_diagonal_(0.0)
