"""What noise gives away where each example is in a step by chance: Poisson-subsampled Gaussian mechanisms, added up.

An example is in a step with probability q, whatever the others are and whatever was before, and nobody from whom the
model is protected knows in which. So a step looks like a draw of P = (1 - q) N(0, s^2) + q N(1, s^2) with the example,
of Q = N(0, s^2) where it is blank, with s the noise over the largest norm. Steps are added up in Rényi divergences
(Mironov et al. 2019, arXiv 1908.10530), of which P from Q has the larger one (there, section 3.2); they become an
epsilon by Canonne et al. 2020, arXiv 2004.00010, proposition 12. It is an upper bound, some percent above the least.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache, lru_cache

import numpy as np

from psl_flower.errors import ConfigError
from psl_flower.privacy.accounting import smallest
from psl_flower.typing import FloatArray

# Orders of the divergences. Any would do: each gives a bound of its own, and the least is told.
_ORDERS = np.concatenate((1 + np.arange(1, 100) / 10, np.arange(11, 65), 2.0 ** np.arange(6.25, 12, 0.25)))

_LEAST = 0.1  # noise; below it an epsilon is in the hundreds, and is not computed
_PARTS = 1e4  # of one, that noise is rounded up to: server and clients must find the same, whatever their processors
_MOST = 1e6  # noise; it leaves nothing of a gradient


def epsilon_of_steps(noise: float, steps: Mapping[float, int], delta: float) -> float:
    """Return the epsilon of (epsilon, delta)-differential privacy after some steps.

    Parameters
    ----------
    noise : float
        Standard deviation of the noise in a step's sum, over the largest norm that one example can have in it.
    steps : dict of float to int
        By the rate at which examples were in them, above 0 and at most 1: how many.
    delta : float
        Above 0 and below 1.

    Returns
    -------
    float
        Infinite without noise.
    """
    if not any(steps.values()):
        return 0.0
    if noise < _LEAST:
        return math.inf
    total = sum((count * _moments(noise, rate) for rate, count in steps.items()), np.zeros(len(_ORDERS)))
    each = (total - math.log(delta) - np.log(_ORDERS)) / (_ORDERS - 1) + np.log1p(-1 / _ORDERS)
    return max(0.0, float(each.min()))


@cache
def noise_for_steps(epsilon: float, steps: int, rate: float, delta: float) -> float:
    """Return the least noise with which so many steps stay within (epsilon, delta), rounded up to a few places.

    Raises
    ------
    ConfigError
        If there is none.
    """

    def holds(noise: float) -> bool:
        return epsilon_of_steps(noise, {rate: steps}, delta) <= epsilon

    if not holds(_MOST):
        raise ConfigError(f"no noise keeps {steps} steps within epsilon {epsilon:g} and delta {delta:g}: allow more")
    return math.ceil(smallest(holds, _MOST, within=0.25 / _PARTS) * _PARTS) / _PARTS


@lru_cache(maxsize=256)
def _moments(noise: float, rate: float) -> FloatArray:
    """Return log E_Q[(P / Q)^a] for each order a: the divergence of that order, times a - 1.

    With P / Q = 1 - q + q exp((2 z - 1) / (2 s^2)), by the trapezoidal rule: points at a distance h err by about
    exp(-2 pi d / h) where the integrand has no singularity within d of the real axis, and that is pi s^2 here. What is
    not negligible for order a lies between 0 and a.
    """
    return np.array([_moment(noise, rate, order) for order in _ORDERS])


def _moment(noise: float, rate: float, order: float) -> float:
    if rate == 1:
        return order * (order - 1) / (2 * noise**2)
    width = order + 24 * noise
    points = np.linspace(-12 * noise, order + 12 * noise, math.ceil(width / min(noise / 4, noise**2 / 2)))
    shift = np.log(rate) + (2 * points - 1) / (2 * noise**2)
    terms = order * np.logaddexp(np.log1p(-rate), shift) - points**2 / (2 * noise**2)
    largest = terms.max()
    total = np.exp(terms - largest).sum() * (points[1] - points[0]) / (noise * math.sqrt(2 * math.pi))
    return max(0.0, float(largest + np.log(total)))
