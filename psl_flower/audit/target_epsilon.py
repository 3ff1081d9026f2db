"""Differential privacy of the model, as an audit compares it with what clients do about rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from psl_flower.checks import check_float
from psl_flower.errors import ConfigError
from psl_flower.privacy import DPSGD


@dataclass(frozen=True)
class TargetEpsilon:
    """Among the defences of an audit: trains with DP-SGD, on batches that are drawn by chance.

    Parameters
    ----------
    epsilon : float
        After the last round.
    clip : float
        Largest norm of an example's gradient.
    delta : float
    """

    epsilon: float
    clip: float = 1.0
    delta: float = 1e-5

    def __post_init__(self) -> None:
        check_float(self.epsilon, "epsilon", above=0)
        check_float(self.clip, "clip", above=0)

    def options(self, *, rounds: int, batch_size: int, examples: int) -> DPSGD:
        """Return how a training comes to it."""
        return DPSGD.for_epsilon(
            self.epsilon, rounds=rounds, clip=self.clip, batch_size=batch_size, examples=examples, delta=self.delta
        )


def apart(defences: Sequence[Any]) -> tuple[list[Any], TargetEpsilon | None]:
    """Return the defences of rows, and that of the model, if there is one.

    Raises
    ------
    ConfigError
        If there are several.
    """
    of_model = [each for each in defences if isinstance(each, TargetEpsilon)]
    if len(of_model) > 1:
        raise ConfigError(f"a model has one epsilon, got {of_model}: leave others out")
    return [each for each in defences if not isinstance(each, TargetEpsilon)], of_model[0] if of_model else None
