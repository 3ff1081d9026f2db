"""How long each step of an epoch may take, before anyone asks who delivers what in it.

Steps come in few durations ("levels"). A level decides how many examples each client can deliver in such a step, its
capacity. A linear program chooses how many steps there are of each, which (by their class targets), and how much of
each client's data goes where, such that the epoch is shortest; then steps become whole.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from psl_flower.samplers.aligned.relaxation import PooledSuppliers, Relaxation, solve_relaxation
from psl_flower.samplers.suppliers import SAME_TIME, Suppliers
from psl_flower.samplers.tiers import merge_levels
from psl_flower.typing import FloatArray, IndexArray, IntArray

# Note [Choosing levels]: the program is quick with a dozen levels; there are thousands of durations a step can have.
# So it is first solved on a grid of durations and without looking at single steps: only at their mean target, from
# which a level may tilt by what choosing among random targets yields (`_CHOICE` of their spread). That takes a tenth of
# a second. The levels of the full program are then what those in use really need, and, if these are few, the next
# longer durations, in which a client that is at its capacity could deliver one more.
_GRID = 20
_CHOICE = 0.5

# Candidates of either side when steps change places.
_SWAPS = 32

# Note [Sampled steps]: the program looks at steps one by one. Of many, a random sample stands for all, and the dual
# values of places tell which of the others are worth being long. How many it looks at depends on the levels and
# classes: places in all, of a (step, level, class), and at least so many steps. With 10 classes and a dozen levels
# these are 300 steps and a third of a second; twice as many steps shorten the epoch by a percent at most.
_MOST_PLACES = 36_000
_LEAST_SAMPLE = 64


@dataclass(frozen=True, eq=False)
class Durations:
    """Durations of an epoch's steps, and who should be at work in them.

    Parameters
    ----------
    seconds : (G,) float64
        Durations, ascending.
    level : (T,) intp
        Which of them each step has.
    work : (G, P) float64
        Examples of each (client, class) pair of the suppliers that the steps of each level should take.
    tilt : (G, C) float64
        By how many examples of each class the steps of a level should exceed their targets, in all.
    """

    seconds: FloatArray
    level: IndexArray
    work: FloatArray
    tilt: FloatArray


def choose_durations(
    suppliers: Suppliers, targets: IntArray, tilt: int, most_levels: int, rng: np.random.Generator
) -> Durations:
    """Choose every step's duration.

    Parameters
    ----------
    suppliers : Suppliers
        K clients.
    targets : (T, C) int64
        Columns add up to the clients' examples of each class.
    tilt : int
        How many of its examples a step may exchange for ones of other classes. If there are but two levels, the short
        steps have no limit of their own: they make up for the long ones.
    most_levels : int
        Greatest number of durations, at least 2.
    rng : np.random.Generator
        Draws the sample of steps of a long epoch.
    """
    num_steps, num_classes = targets.shape
    pool = PooledSuppliers.of(suppliers, int(targets.sum(axis=1).max()))
    levels, even = _candidates(suppliers, num_steps)
    if len(levels) == 1:
        nothing = np.zeros((1, len(suppliers.pairs[0])))
        return Durations(levels, np.zeros(num_steps, dtype=np.intp), nothing, np.zeros((1, num_classes)))
    if len(levels) > most_levels:
        mean = targets.mean(axis=0)
        choice = _CHOICE * np.abs(targets - mean).sum(axis=1).mean() / 2
        rough = solve_relaxation(pool, mean[None, :], num_steps, levels, tilt + choice)
        levels = _refined(pool, levels, rough, even, most_levels)
    sample, scale = _sampled(targets, len(levels), rng)
    relaxed = solve_relaxation(pool, sample, scale, levels, tilt, shortest_tilts_freely=len(levels) == 2)
    if len(sample) == num_steps:
        # the more of a step is in a level or longer ones, the sooner it is chosen for it
        urgency = relaxed.share[:, ::-1].cumsum(axis=1)[:, ::-1]
    else:
        merit = targets @ relaxed.place_duals.T + relaxed.step_duals  # least in the level that a step is best for
        at_least = np.minimum.accumulate(merit[:, ::-1], axis=1)[:, ::-1]
        urgency = np.zeros_like(merit)
        urgency[:, 1:] = np.minimum.accumulate(merit, axis=1)[:, :-1] - at_least[:, 1:]
    work = pool.work_of_clients(levels, relaxed.work)
    return Durations(levels, _whole_levels(urgency, relaxed.length), work, relaxed.tilt)


def cover(suppliers: Suppliers, targets: IntArray, seconds: FloatArray, level: IndexArray) -> IndexArray:
    """Return the levels of steps, with as few of them moved as let slow clients deliver all they have.

    Clients that are too slow for the levels below g need places for each of their classes in the steps of level g and
    longer. Where the targets lack some, steps of level g change places with shorter ones if that helps, and otherwise
    the step that has most of what is missing is moved up to g.

    Parameters
    ----------
    suppliers : Suppliers
        K clients.
    targets : (T, C) int64
        Columns add up to the clients' examples of each class.
    seconds : (G,) float64
        Durations of the levels.
    level : (T,) intp
        Level of each step.
    """
    level = level.copy()
    for g in range(len(seconds) - 1, 0, -1):
        slow = suppliers.first_reply > seconds[g - 1] * (1 + SAME_TIME)
        needed = suppliers.counts[slow].sum(axis=0)
        while (missing := needed - targets[level >= g].sum(axis=0)).max() > 0:
            below, here = np.flatnonzero(level < g), np.flatnonzero(level == g)
            # the steps that bring most of what is missing, and those that are missed least
            brings = np.minimum(targets[below], missing.clip(0)).sum(axis=1)
            below = below[np.argsort(-brings, kind="stable")[:_SWAPS]]
            lost = (targets[here] + missing).clip(0).sum(axis=1)
            here = here[np.argsort(lost, kind="stable")[:_SWAPS]]
            after = (missing + targets[here][:, None] - targets[below]).clip(0).sum(axis=2)
            if after.size and after.min() < missing.clip(0).sum():
                leaves, enters = np.unravel_index(after.argmin(), after.shape)
                level[here[leaves]] = level[below[enters]]
                level[below[enters]] = g
            else:
                level[below[0]] = g
    return level


def _candidates(suppliers: Suppliers, num_steps: int) -> tuple[FloatArray, float]:
    """Return durations to choose from, and the one in which all clients can deliver at an even pace."""
    even_loads = -(-suppliers.sizes // num_steps)
    even = float((suppliers.latency + suppliers.per_sample * even_loads).max())
    if even == 0:
        return np.zeros(1), even
    longest = 1.5 * even
    loads = np.minimum(suppliers.capacity(np.asarray(longest), int(suppliers.sizes.max())), suppliers.sizes)
    loads[suppliers.per_sample == 0] = 1
    units = np.arange(1, int(loads.max()) + 1)
    replies = suppliers.latency[:, None] + suppliers.per_sample[:, None] * units
    replies = np.unique(replies[units <= loads[:, None]])
    if len(replies) > _GRID:
        least = max(float(replies[0]), longest * 1e-6)
        grid = np.geomspace(least, longest, _GRID)
        replies = np.unique(replies[np.searchsorted(replies, grid * (1 + SAME_TIME), side="right").clip(1) - 1])
    return np.union1d(replies[np.append(np.diff(replies) > SAME_TIME * even, True)], even), even


def _sampled(targets: IntArray, num_levels: int, rng: np.random.Generator) -> tuple[FloatArray, float]:
    """Return the targets of steps that stand for all, (S, C), and for how many each; Note [Sampled steps]."""
    classes_a_step = np.count_nonzero(targets) / len(targets)
    most = max(_LEAST_SAMPLE, int(_MOST_PLACES / (num_levels * classes_a_step)))
    if len(targets) <= most:
        return targets.astype(np.float64), 1.0
    sample = targets[rng.choice(len(targets), most, replace=False)]
    scale = len(targets) / most
    total, seen = targets.sum(axis=0), scale * sample.sum(axis=0)
    # the sample's share of each class is made that of all steps, from which it differs by chance
    spread = np.divide(total, seen, out=np.zeros(len(total)), where=seen > 0)
    return sample * spread + np.where(seen > 0, 0, total / len(targets)), scale


def _refined(pool: PooledSuppliers, levels: FloatArray, relaxed: Relaxation, even: float, most: int) -> FloatArray:
    """Return at most so many levels that suit the suppliers better than the grid; Note [Choosing levels]."""
    suppliers = pool.suppliers
    used = np.flatnonzero(relaxed.length > 1e-6 * relaxed.length.sum())
    lengths = relaxed.length[used]
    capacity = pool.client_capacity(levels[used])
    whole = pool.capacity(levels[used])
    # what a client delivers in a step, if the clients of a unit do so in proportion to their capacities
    busy = (relaxed.work[used].sum(axis=2) / (lengths[:, None] * whole.clip(1)))[:, pool.unit]
    loads = np.ceil(busy * capacity - 1e-6).astype(np.int64)
    needed = suppliers.reply(loads).max(axis=1)
    order = np.argsort(needed, kind="stable")
    kept = needed[order][merge_levels(needed[order], lengths[order], most)]

    one_more = suppliers.latency + suppliers.per_sample * (capacity + 1)
    full = (busy > 1 - 1e-6) & (suppliers.per_sample > 0) & (one_more > needed[:, None] * (1 + SAME_TIME))
    longer = [even] if kept[-1] < even else []  # with a level as long as this the program always has a solution
    for g in np.argsort(-lengths * levels[used], kind="stable"):
        following = np.sort(one_more[g, full[g]])
        longer += [*following[:1], *following[len(following) // 2 :][:1]]
    result = kept
    for level in longer:
        if len(result) < most and np.abs(result - level).min() > SAME_TIME * even:
            result = np.append(result, level)
    return np.sort(result)


def _whole_levels(urgency: FloatArray, length: FloatArray) -> IndexArray:
    """Return a level for each step: ever more steps for ever shorter levels, the most urgent first.

    Parameters
    ----------
    urgency : (T, G) float64
        How much each step should be in a level or a longer one.
    length : (G,) float64
        Number of steps of each level; rounded so that no level, counted with the longer ones, gets fewer.
    """
    level = np.zeros(len(urgency), dtype=np.intp)
    wanted = np.ceil(length[::-1].cumsum()[::-1] - 1e-6)
    for g in range(len(length) - 1, 0, -1):
        free = np.flatnonzero(level == 0)
        count = int(wanted[g]) - (len(level) - len(free))
        if count > 0:
            level[free[np.argsort(-urgency[free, g], kind="stable")[:count]]] = g
    return level
