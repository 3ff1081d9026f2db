"""Whole numbers out of real shares: the one place where quotas are rounded."""

import numpy as np
from numpy.typing import ArrayLike

from psl_flower.checks import check_int, check_not_negative
from psl_flower.errors import ConfigError
from psl_flower.typing import IntArray

_TIE_DECIMALS = 9  # fractions that differ by less are equal: 0.1 * 3 and 0.3 must have the same chance


def round_to_sum(weights: ArrayLike, total: int, rng: np.random.Generator) -> IntArray:
    """Share `total` out in proportion to `weights`, in whole numbers that add up exactly (largest remainder).

    Every share is rounded down, and what is left goes, one each, to the largest fractions; ties are broken at random.

    Parameters
    ----------
    weights : (n,) float
        Not negative, not all zero; their scale does not matter.
    total : int
        What to share out, not negative.
    rng : numpy.random.Generator
        Breaks ties.

    Returns
    -------
    (n,) int64
        Each within 1 of ``total * weights / weights.sum()``; 0 where the weight is 0.

    Raises
    ------
    ConfigError
        If `weights` is empty, not 1-D, negative, infinite, NaN or all zero, or `total` is negative.
    """
    total = check_int(total, "total", least=0)
    values = np.asarray(weights, dtype=np.float64)
    if values.ndim != 1 or not values.size:
        raise ConfigError(f"weights must be 1-D and not empty, got shape {values.shape}")
    check_not_negative(values, "weights")
    if not values.any():
        raise ConfigError("weights must not all be 0: there is nothing to share in proportion to")
    scaled = values / values.max()  # the largest is 1: neither the sum nor the product can overflow
    shares = scaled / scaled.sum() * total
    result: IntArray = np.floor(shares).astype(np.int64)
    fractions = (shares - result).round(_TIE_DECIMALS)
    order = np.lexsort((rng.random(len(values)), -fractions))
    result[order[: total - int(result.sum())]] += 1
    return result


def spread_evenly(room: IntArray, total: int, rng: np.random.Generator) -> IntArray:
    """Spread `total` over places in proportion to their room, in whole numbers, none more than its room (systematic).

    Parameters
    ----------
    room : (n,) int64
        Not negative. Its sum times `total` must fit in 64 bits.
    total : int
        From 0 to the sum of `room`.
    rng : numpy.random.Generator
        Where the pattern begins.

    Returns
    -------
    (n,) int64
        Within 1 of ``total * room / room.sum()``, and so is the sum over any stretch of neighbouring places.
    """
    ends = np.cumsum(room)
    if not total:
        return np.zeros_like(room)
    shares = (ends * total + rng.integers(ends[-1])) // ends[-1]
    result: IntArray = np.diff(shares, prepend=0)
    return result
