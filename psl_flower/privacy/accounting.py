"""What training with noise gives away: differential privacy of gradients with normal noise, added up over rounds."""

from __future__ import annotations

import math
from collections.abc import Callable

from psl_flower.checks import check_float, check_int
from psl_flower.errors import ConfigError

_LARGEST = 1e6  # epsilon; beyond it nothing is promised


def epsilon(noise: float, rounds: int, delta: float) -> float:
    """Return the epsilon of (epsilon, delta)-differential privacy after some rounds.

    In a round each example is used exactly once, so rounds compose as so many Gaussian mechanisms do, and no more. With
    mu = sqrt(rounds) / noise,

        delta(epsilon) = Phi(mu / 2 - epsilon / mu) - e^epsilon Phi(-mu / 2 - epsilon / mu),

    which is exact (Balle & Wang 2018, arXiv 1805.06530, theorem 8; Dong et al., arXiv 1905.02383, corollary 3.3).
    Nothing is taken off for random batches, for clients can compute which examples are in one. Two data sets are
    neighbours if an example of one is blank in the other; for another example in its place, mu is twice as large.

    Parameters
    ----------
    noise : float
        Standard deviation of the noise in a sum, over the largest norm that one example can have in it.
    rounds : int
        Times that each example was used.
    delta : float
        Above 0 and below 1.

    Returns
    -------
    float
        Infinite without noise.
    """
    noise, rounds = check_float(noise, "noise", least=0), check_int(rounds, "rounds", least=0)
    delta = _check_delta(delta)
    if not rounds:
        return 0.0
    if not noise or _delta(math.sqrt(rounds) / noise, _LARGEST) > delta:
        return math.inf
    return smallest(lambda value: _delta(math.sqrt(rounds) / noise, value) <= delta, _LARGEST)


def noise_for(epsilon: float, rounds: int, delta: float) -> float:
    """Return the least noise with which so many rounds stay within (epsilon, delta); see `epsilon`."""
    target, rounds = check_float(epsilon, "target_epsilon", above=0), check_int(rounds, "rounds", least=1)
    delta = _check_delta(delta)
    return smallest(lambda value: _delta(math.sqrt(rounds) / value, target) <= delta, 1e6 * math.sqrt(rounds))


def _check_delta(delta: float) -> float:
    if check_float(delta, "delta", above=0) >= 1:  # the strategy, which knows the number, checks the rest
        raise ConfigError(f"delta must be below 1, well below one over the number of examples, got {delta}")
    return delta


def _delta(mu: float, epsilon: float) -> float:
    # Phi, which loses nothing in its lower tail
    first, second = (math.erfc((epsilon / mu - half) / math.sqrt(2)) / 2 for half in (mu / 2, -mu / 2))
    return first - math.exp(epsilon + math.log(second)) if second > 0 else first


def smallest(holds: Callable[[float], bool], largest: float, within: float = 0.0) -> float:
    """Return the smallest number from 0 to `largest` for which a rule holds that holds for all larger ones.

    It may be too large by `within`, or by what floats cannot tell apart.
    """
    low, high = 0.0, largest
    while high - low > within and low < (middle := (low + high) / 2) < high:
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high
