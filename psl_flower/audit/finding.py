"""What an attack found: a figure, beside the one that somebody who sees nothing gets."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

SURE = 0.05  # the largest p-value that counts as more than chance


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One figure of an attack.

    Parameters
    ----------
    attack : str
    party : str
        Who can make it.
    measure : str
        What is measured, with its unit.
    value : float
    floor : float
        What it is where nothing leaks.
    low, high : float, optional
        A 95 % interval.
    p_value : float, optional
        How often chance does as well, where there is no interval.
    less : bool
        Whether less of it is worse for the clients, as of errors.
    detection : bool
        Whether it is about how well clients notice, and no leak.
    """

    attack: str
    party: str
    measure: str
    value: float
    floor: float
    low: float | None = None
    high: float | None = None
    p_value: float | None = None
    less: bool = False
    detection: bool = False

    @property
    def leaks(self) -> bool:
        """Whether it is more than chance: the interval leaves the floor out, or the p-value is small."""
        if self.detection:
            return False
        if self.p_value is not None:
            return self.p_value <= SURE
        if self.less:
            return (self.value if self.high is None else self.high) < self.floor
        return (self.value if self.low is None else self.low) > self.floor

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON can have it, without what is not known."""
        return {**{k: v for k, v in asdict(self).items() if v is not None}, "leaks": self.leaks}


@dataclass(frozen=True, eq=False, kw_only=True)
class Gallery:
    """Images to look at, (n, C, H, W) each: the first of the clients, not the best."""

    attack: str
    originals: Tensor
    reconstructions: Tensor
    floor: Tensor


@dataclass(eq=False)
class Found:
    """What came of an attack."""

    findings: list[Finding] = field(default_factory=list)
    gallery: Gallery | None = None
