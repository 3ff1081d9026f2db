"""Distance correlation: how much of one sample shows in another, in whatever way.

The plain one is differentiable and good as a penalty, but far from 0 for independent samples that are small or wide;
the bias-corrected one is about 0 for these, and what to measure with (Szekely and Rizzo 2013,
doi:10.1016/j.jmva.2013.02.012).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from psl_flower.typing import FloatArray


def distance_correlation(one: Tensor, other: Tensor) -> Tensor:
    """Return the distance correlation of two samples, row by row (Szekely et al. 2007, definition 5).

    Parameters
    ----------
    one, other : (n, ...) floating
        The same n examples.

    Returns
    -------
    () tensor
        From 0 to 1; 0 where all rows of one of them are equal. Differentiable. With few rows it is near 1 whatever they
        are: it says something from some dozens on. To measure, take `corrected_distance_correlation`.
    """
    a, b = _double_centred(one), _double_centred(other)
    product, variances = (a * b).mean(), (a * a).mean() * (b * b).mean()
    if not float(variances.detach()) > 0 or not float(product.detach()) > 0:
        return (product * 0).sum()
    return (product / variances.sqrt()).sqrt()


def _double_centred(sample: Tensor) -> Tensor:
    """Return the distances of all pairs of rows, less the means of their row and column, plus the mean of all."""
    flat = sample.reshape(len(sample), -1)
    # not by way of a matrix product, whose rounding is as large as small distances
    distances = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist")
    means = distances.mean(dim=0, keepdim=True)
    return distances - means - means.T + means.mean()


def corrected_distance_correlation(
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
    a, b = (_u_centred(torch.cdist(of.double(), of.double())) for of in (x, y))
    scale = float((a.square().sum() * b.square().sum()).sqrt())
    if not scale:
        return 0.0, np.zeros(permutations)

    def correlation(order: np.ndarray[tuple[int], np.dtype[np.int64]] | None) -> float:
        other = b if order is None else b[order][:, order]
        squared = float((a * other).sum()) / scale
        return float(np.sign(squared) * abs(squared) ** 0.5)

    return correlation(None), np.array([correlation(rng.permutation(len(a))) for _ in range(permutations)])


def _u_centred(distances: Tensor) -> Tensor:
    """Return distances with their means taken out so that independent samples correlate by 0 (U-centred)."""
    n = len(distances)
    rows = distances.sum(dim=1) / (n - 2)
    centred = distances - rows[:, None] - rows[None, :] + distances.sum() / ((n - 1) * (n - 2))
    return centred.fill_diagonal_(0.0)
