"""Class counts with noise: what a delay-aware sampler may know of clients whose labels stay with them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from psl_flower.checks import check_float, check_int
from psl_flower.privacy.secret import Secret
from psl_flower.typing import IntArray


@dataclass(frozen=True, kw_only=True)
class LabelNoise:
    """Counts of classes are told with noise: epsilon-differential privacy for the label of each example.

    To each count a number of the two-sided geometric distribution is added, the discrete Laplace. It is drawn once a
    run and client, so that asking again shows nothing new. Runs add up: ten with epsilon 0.1 are as one with epsilon 1.

    Parameters
    ----------
    epsilon : float
        How much of one label may show. At 1, each count is off by 2 or so (standard deviation 2.8).
    classes : int
        Their number, those that a client does not have included: they are told with noise, too.

    Raises
    ------
    ConfigError
        If a value is out of range.
    """

    epsilon: float
    classes: int

    def __post_init__(self) -> None:
        check_float(self.epsilon, "epsilon", above=0)
        check_int(self.classes, "classes", least=2)

    def draw(self, secret: Secret) -> IntArray:
        """Return the noise of one client in one run, (C,)."""
        rng = np.random.default_rng(int.from_bytes(secret.key(b"class counts"), "little"))
        # another label changes two counts by one each
        p = -math.expm1(-self.epsilon / 2)
        return np.asarray(rng.geometric(p, self.classes) - rng.geometric(p, self.classes), dtype=np.int64)

    def add(self, counts: IntArray, noise: IntArray) -> IntArray:
        """Return counts with noise, not negative and with the same sum, which is known anyway."""
        total = int(counts.sum())
        values = np.maximum(counts + noise, 0)
        shares = total * (values / values.sum() if values.any() else np.full(len(values), 1 / len(values)))
        result: IntArray = np.floor(shares).astype(np.int64)
        result[np.argsort(result - shares, kind="stable")[: total - int(result.sum())]] += 1
        return result
