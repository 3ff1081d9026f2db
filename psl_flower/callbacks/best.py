"""What callbacks that look for the best round have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from psl_flower.callbacks.base import Callback
from psl_flower.monitor import BestValue


class BestRound(Callback):
    """Knows the round whose metric is the best.

    Parameters
    ----------
    monitor : str
        A metric's name.
    mode : str
        "min": less is better; "max": more; "auto": as the metric's name tells.
    min_delta : float
        By how much a value must be better, at least.

    Attributes
    ----------
    best_round : int or None
        None while there is none.
    best_value : float
        Its metric; NaN while there is none.
    """

    def __init__(self, monitor: str, *, mode: str, min_delta: float = 0.0) -> None:
        self._best = BestValue(monitor, type(self).__name__, mode=mode, min_delta=min_delta)

    @property
    def best_round(self) -> int | None:  # noqa: D102  # the class documents it
        return self._best.round

    @property
    def best_value(self) -> float:  # noqa: D102
        return self._best.value

    def on_run_start(self, config: Mapping[str, Any]) -> None:
        """Begin anew."""
        self._best.start(config)
