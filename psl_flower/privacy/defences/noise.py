"""Noise on activations, from a secret of the client."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from psl_flower.checks import check_float
from psl_flower.privacy.defences.base import Defence, OutgoingRows, like


@dataclass(frozen=True)
class GaussianNoise(Defence):
    """Adds normal noise to the activations that leave; their gradient comes back unchanged.

    It is the same for an example at the same weights, so that asking again averages nothing out. No differential
    privacy follows: activations have no bound.

    Parameters
    ----------
    sigma : float
        Standard deviation, in units of the activations. 0: none.
    """

    sigma: float

    def __post_init__(self) -> None:
        check_float(self.sigma, "sigma", least=0)

    def rows(self, rows: Tensor, of: OutgoingRows) -> Tensor:
        """Add the noise."""
        return rows + self.sigma * of.normal(rows) if self.sigma else rows


@dataclass(frozen=True)
class LaplaceNoise(Defence):
    """Adds noise of the Laplace distribution to the activations that leave; otherwise as `GaussianNoise`.

    Parameters
    ----------
    scale : float
        Mean absolute value, in units of the activations; the standard deviation is 1.41 times as much. 0: none.
    """

    scale: float

    def __post_init__(self) -> None:
        check_float(self.scale, "scale", least=0)

    def rows(self, rows: Tensor, of: OutgoingRows) -> Tensor:
        """Add the noise."""
        if not self.scale:
            return rows
        centred = of.uniform(rows) - 0.5
        return rows + self.scale * like(-np.sign(centred) * np.log1p(-2 * np.abs(centred)), rows)
