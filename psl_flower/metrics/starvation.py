"""Classes that a schedule keeps from the model for too long."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from psl_flower.errors import ConfigError
from psl_flower.typing import IntArray

# Note [Starved classes]: a class is starved in a stretch of steps that holds less than a quarter of the examples of it
# that a random stretch would. Two things go wrong. A model forgets a class that stays away for tens of steps (LDS in
# its natural order, the stragglers' classes all coming first, lost 10 points where they alone hold two classes; the
# tail of FLS makes it collapse): any starved stretch of 20 steps counts. And steps in a random order that hold a class
# in plenty or not at all still make for noisier gradients (on the same data, LDS shuffled lost 0.8 points with the two
# classes scarce in 45 % of the steps, Aligned up to 2 with 43 % at tilt 0.3, and nothing with 19 % at tilt 0.1): if a
# third of the short stretches is starved, that counts. Stretches are long enough for chance not to starve them: a
# Poisson count of mean 30 falls below a quarter of it once in a million times, one of mean 8 once in seventy.
_STARVED = 0.25
_LONG_STEPS, _LONG_EXPECTED = 20, 30
_SHORT_STEPS, _SHORT_EXPECTED = 1, 8
_SHORT_SHARE = 1 / 3


@dataclass(frozen=True)
class StarvedClass:
    """A class that a schedule serves badly.

    Parameters
    ----------
    label : int
        The class.
    longest : int
        Steps of the longest run in which it had less than a quarter of its share; 0 if none is long enough to matter.
    scarce : float
        Share of the epoch in which it had less than a quarter of its share, step by step.
    """

    label: int
    longest: int
    scarce: float

    def __str__(self) -> str:
        run = f"for {self.longest} steps in a row" if self.longest else f"in {self.scarce:.0%} of the steps"
        return f"class {self.label} is (nearly) absent {run}"


def starved_classes(class_counts: ArrayLike) -> list[StarvedClass]:
    """Return the classes that stay away from the batches for so long, or so often, that the model may lose them.

    Parameters
    ----------
    class_counts : (T, C) int
        Examples of each class in each step's global batch, in the order of training, see
        `psl_flower.metrics.simulate.draw_class_counts`.

    Returns
    -------
    list of StarvedClass
        Ascending by class. Classes too rare in the epoch to tell are left out.

    Raises
    ------
    ConfigError
        If the table is not 2-D or has an empty batch.
    """
    counts = np.asarray(class_counts)
    if counts.ndim != 2 or not len(counts):
        raise ConfigError(f"class_counts must have shape (steps, classes) with at least a step, got {counts.shape}")
    sizes = counts.sum(axis=1)
    if not sizes.all():
        raise ConfigError(f"every batch needs an example, that of step {sizes.argmin()} has none")
    starved = []
    for label in np.flatnonzero(counts.sum(axis=0)):
        own = counts[:, label]
        expected = sizes * (own.sum() / sizes.sum())
        long_runs = _starved(own, expected, _LONG_STEPS, _LONG_EXPECTED)
        scarce = float(_starved(own, expected, _SHORT_STEPS, _SHORT_EXPECTED).mean())
        if long_runs.any() or scarce > _SHORT_SHARE:
            starved.append(StarvedClass(int(label), _longest_run(long_runs), scarce))
    return starved


def _starved(own: IntArray, expected: np.ndarray, steps: int, examples: int) -> np.ndarray:
    """Return which steps lie in a starved stretch of at least so many steps and expected examples, (T,) bool."""
    window = max(steps, int(np.ceil(examples / expected.mean())))
    result = np.zeros(len(own), dtype=np.bool_)
    if window > len(own):
        return result
    ones = np.ones(window)
    hit = np.convolve(own, ones, "valid") < _STARVED * np.convolve(expected, ones, "valid")
    return np.convolve(hit, ones, "full") > 0.5


def _longest_run(flags: np.ndarray) -> int:
    edges = np.flatnonzero(np.diff(np.concatenate(([False], flags, [False])).astype(np.int8)))
    return int(np.diff(edges)[::2].max(initial=0))
