"""How many examples of each class every global batch of an epoch holds, before anyone asks who delivers them."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from psl_flower.checks import check_choice
from psl_flower.samplers.rounding import round_to_sum, spread_evenly
from psl_flower.typing import FloatArray, IndexArray, IntArray

TARGETS = ("random", "stratified")


def class_targets(kind: str, class_counts: ArrayLike, batch_size: int, rng: np.random.Generator) -> IntArray:
    """Draw the class targets of an epoch of ``T = ceil(N / batch_size)`` steps whose sizes differ by at most 1.

    Parameters
    ----------
    kind : {"random", "stratified"}
        "random": a draw from the pooled data without replacement, as in centralised training. "stratified": every class
        is spread evenly over the epoch, so that every batch has nearly the pooled class distribution.
    class_counts : (C,) int
        Examples of each class in the pooled data, N in all.
    batch_size : int
        From 1 to N.
    rng : np.random.Generator
        Draws.

    Returns
    -------
    (T, C) int64
        Columns add up to `class_counts`.

    Raises
    ------
    ConfigError
        If there is no such kind.
    """
    check_choice(kind, "targets", TARGETS)
    counts = np.asarray(class_counts, dtype=np.int64)
    if kind == "random":
        labels = np.repeat(np.arange(len(counts)), counts)
        rng.shuffle(labels)
    else:
        labels = _interleaved(counts, rng)
    num_steps = -(-len(labels) // batch_size)
    steps = np.arange(len(labels)) * num_steps // len(labels)
    table = np.bincount(steps * len(counts) + labels, minlength=num_steps * len(counts))
    return table.reshape(num_steps, len(counts))


def tilted_targets(
    targets: IntArray, level: IndexArray, tilt: FloatArray, most: int, rng: np.random.Generator
) -> IntArray:
    """Exchange classes between the steps of different levels.

    Parameters
    ----------
    targets : (T, C) int64
        Examples of each class in each step.
    level : (T,) intp
        Level of each step.
    tilt : (G, C) float64
        By how many examples of each class the steps of each level should exceed their targets, in all; rows and columns
        add up to 0. It is rounded, and cut back where `most` or the examples there are do not allow it.
    most : int
        How many examples a step exchanges at most; but those of the lowest level present make up for all others, and
        exchange what it takes.
    rng : np.random.Generator
        Rounds and deals.

    Returns
    -------
    (T, C) int64
        Rows and columns add up to what they did. Examples are taken from steps that have most of their class, and given
        to ones that have least.
    """
    result = targets.copy()
    lowest = int(level.min())
    reserve = np.flatnonzero(level == lowest)
    spare = targets[reserve].sum(axis=0)
    owed = np.zeros_like(spare)  # what the others have too much of each class
    for g in range(len(tilt) - 1, lowest, -1):
        steps = np.flatnonzero(level == g)
        wanted = np.minimum(np.ceil(tilt[g].clip(0) - 1e-6).astype(np.int64), spare - owed.clip(0))
        given_up = (-tilt[g]).clip(0)
        if not (wanted.any() and given_up.any()):
            continue
        wanted = spread_evenly(wanted, min(int(wanted.sum()), most * len(steps)), rng)
        before = result[steps].sum(axis=0)
        vacated = _remove(result, steps, round_to_sum(given_up, int(wanted.sum()), rng), most, rng)
        wanted = spread_evenly(wanted, int(vacated.sum()), rng)
        _add(result, steps, vacated, wanted, rng)
        owed += result[steps].sum(axis=0) - before
    # as evenly as possible, but all of it
    vacated = _remove(result, reserve, owed.clip(0), -(-int(owed.clip(0).sum()) // len(reserve)), rng)
    still_owed = (owed - (targets[reserve] - result[reserve]).sum(axis=0)).clip(0)
    vacated += _remove(result, reserve, still_owed, int(targets.sum(axis=1).max()), rng)
    _add(result, reserve, vacated, (-owed).clip(0), rng)
    return result


def _interleaved(counts: IntArray, rng: np.random.Generator) -> IntArray:
    """Return every label as often as it counts, in an order that spreads each evenly, (N,) int64.

    The i-th of n examples of a class stands at (i + u) / n of the way, with one random u a class.
    """
    labels = np.repeat(np.arange(len(counts)), counts)
    ranks = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    places = (ranks + rng.random(len(counts))[labels]) / counts[labels]
    return labels[np.argsort(places, kind="stable")]


def _remove(table: IntArray, steps: IndexArray, counts: IntArray, most: int, rng: np.random.Generator) -> IntArray:
    """Take `counts` of each class, or what there is, from steps that have most of it; return the vacant places, (n,).

    No step gives more than `most`.
    """
    vacant = np.zeros(len(steps), dtype=np.int64)
    for label in np.flatnonzero(counts):
        count = int(counts[label])
        while count and len(able := np.flatnonzero((vacant < most) & (table[steps, label] > 0))):
            chosen = able[np.lexsort((rng.random(len(able)), -table[steps[able], label]))][:count]
            table[steps[chosen], label] -= 1
            vacant[chosen] += 1
            count -= len(chosen)
    return vacant


def _add(table: IntArray, steps: IndexArray, vacant: IntArray, counts: IntArray, rng: np.random.Generator) -> None:
    """Put `counts` of each class into the vacant places, as many in all, of steps that have least of it."""
    vacant = vacant.copy()
    for label in np.flatnonzero(counts):
        count = int(counts[label])
        while count:
            able = np.flatnonzero(vacant)
            chosen = able[np.lexsort((rng.random(len(able)), table[steps[able], label]))][:count]
            table[steps[chosen], label] += 1
            vacant[chosen] -= 1
            count -= len(chosen)
