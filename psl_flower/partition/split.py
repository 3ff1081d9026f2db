"""Splits of one dataset among partitions, as arrays of indices (pure numpy: no dataset library)."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from psl_flower.checks import check_float, check_int
from psl_flower.errors import ConfigError
from psl_flower.samplers.rounding import round_to_sum
from psl_flower.typing import IndexArray, IntArray

Rows = IndexArray


def iid_split(num_examples: int, num_partitions: int, rng: np.random.Generator | int) -> list[Rows]:
    """Deal examples out at random into partitions whose sizes differ by at most 1.

    Parameters
    ----------
    num_examples : int
        N, at least `num_partitions`.
    num_partitions : int
        At least 1.
    rng : numpy.random.Generator or int
        Deals; a whole number is a seed.

    Returns
    -------
    list of (n_k,) intp
        The ascending indices of each partition: disjoint, together ``range(N)``.

    Raises
    ------
    ConfigError
        If a partition would be empty.
    """
    num_examples = check_int(num_examples, "num_examples", least=1)
    check_partitions(num_partitions, num_examples)
    rng = _generator(rng)
    return [np.sort(part) for part in np.array_split(rng.permutation(num_examples), num_partitions)]


def extended_dirichlet_split(
    labels: ArrayLike,
    num_partitions: int,
    num_classes_per_partition: int,
    alpha: float,
    rng: np.random.Generator | int,
) -> list[Rows]:
    """Give each partition a few classes, and spread each class over its holders (extended Dirichlet split).

    Each partition draws C distinct classes, with probabilities proportional to ``exp(-num_classes * times already
    chosen)``, so that classes have almost equally many holders; each class's examples are then shared among its holders
    in Dirichlet(alpha) proportions. The draw of classes is conditional on every class having a holder; a partition left
    without examples is given one of one of its classes, by the holder that has most of it.

    Parameters
    ----------
    labels : (N,) array
        The class of every example: any values that can be compared (whole numbers, strings), none missing.
    num_partitions : int
        K, from 1 to N.
    num_classes_per_partition : int
        C, from 1 to the number of classes, and enough that K * C reaches it.
    alpha : float
        Concentration, greater than 0: the smaller, the more uneven.
    rng : numpy.random.Generator or int
        Draws everything; a whole number is a seed.

    Returns
    -------
    list of (n_k,) intp
        The ascending indices of each partition: disjoint, none empty, together ``range(N)``.

    Raises
    ------
    ConfigError
        If an argument is out of range, a label is missing, or some partition cannot have an example of its classes.

    References
    ----------
    Extended Dirichlet strategy of arXiv 2302.01633.
    """
    values = _checked_labels(labels)
    check_partitions(num_partitions, len(values))
    check_int(num_classes_per_partition, "num_classes_per_partition", least=1)
    check_float(alpha, "alpha", above=0)
    rng = _generator(rng)

    # one stable sort groups the examples by class; what it sorts is shuffled, so each class is in random order
    order = rng.permutation(len(values))
    order = order[np.argsort(values[order], kind="stable")]
    grouped = values[order]
    starts = np.flatnonzero(np.concatenate(([True], grouped[1:] != grouped[:-1])))
    class_sizes = np.diff(starts, append=len(values))
    check_classes(num_partitions, num_classes_per_partition, len(starts))

    chosen = _choose_classes(num_partitions, len(starts), num_classes_per_partition, rng)
    by_class = np.argsort(chosen, axis=None, kind="stable")  # entry e is partition e // C's class number e % C
    holders = np.split(by_class, np.cumsum(np.bincount(chosen.ravel()))[:-1])
    counts = np.zeros(chosen.shape, dtype=np.int64)
    for entries, size in zip(holders, class_sizes, strict=True):
        counts.flat[entries] = round_to_sum(rng.dirichlet(np.full(len(entries), alpha)), size, rng)
    _fill_empty(chosen, counts, holders, names=grouped[starts])

    owners = np.empty(len(values), dtype=np.intp)
    owners[order] = np.repeat(by_class // num_classes_per_partition, counts.flat[by_class])
    return np.split(np.argsort(owners, kind="stable"), np.cumsum(counts.sum(axis=1))[:-1])


def _generator(rng: np.random.Generator | int) -> np.random.Generator:
    return rng if isinstance(rng, np.random.Generator) else np.random.default_rng(check_int(rng, "rng", least=0))


def check_partitions(num_partitions: int, num_examples: int) -> None:
    """Refuse more partitions than examples.

    Raises
    ------
    ConfigError
        If some partition would be empty, or there is none.
    """
    check_int(num_partitions, "num_partitions", least=1)
    if num_partitions > num_examples:
        raise ConfigError(
            f"every partition (client) needs at least one example, got {num_examples} examples for {num_partitions} "
            "partitions: take fewer"
        )


def check_classes(num_partitions: int, num_classes_per_partition: int, num_classes: int) -> None:
    """Refuse partitions of so many classes that there are not as many, or of so few that a class would have no holder.

    Raises
    ------
    ConfigError
        If they are refused.
    """
    if num_classes_per_partition > num_classes:
        raise ConfigError(
            "the classes of a partition (client) must not exceed the number of classes, got "
            f"{num_classes_per_partition} for {num_classes} classes: take fewer"
        )
    if num_partitions * num_classes_per_partition < num_classes:
        raise ConfigError(
            f"every class needs a holder, but {num_partitions} partitions of {num_classes_per_partition} classes each "
            f"hold at most {num_partitions * num_classes_per_partition} of {num_classes} classes: take more partitions "
            "(clients), or more classes each"
        )


def _checked_labels(labels: ArrayLike) -> NDArray[Any]:
    try:
        values = np.asarray(labels)
        missing = np.not_equal(values, values) | np.equal(values, np.array(None))  # NaN differs from itself
        if values.dtype == object and values.size and not missing.any():
            np.minimum.reduce(values)  # compares each with the least so far: numbers among strings cannot be
    except (TypeError, ValueError) as exc:
        raise ConfigError(f"labels must be comparable with each other, all numbers or all strings: {exc}") from exc
    if values.ndim != 1 or not len(values):
        raise ConfigError(f"labels must be one value an example, got shape {values.shape}")
    if missing.any():
        raise ConfigError(
            f"every example needs a label, got {values[missing][0]} for {missing.sum()} of {len(values)}, first at "
            f"index {missing.argmax()}: leave those examples out"
        )
    return values


def _choose_classes(num_partitions: int, num_classes: int, per_partition: int, rng: np.random.Generator) -> IntArray:
    """Draw each partition's distinct classes until every class has a holder, (K, C).

    Adding Gumbel noise to log-probabilities and taking the C largest draws C times without replacement; unlike the
    exponentials themselves, the log-probabilities ``-num_classes * times`` cannot underflow. The hardest case, two
    classes over two partitions, succeeds at the first attempt with probability 0.88.
    """
    while True:
        times = np.zeros(num_classes, dtype=np.int64)
        chosen = np.empty((num_partitions, per_partition), dtype=np.int64)
        for row in chosen:
            keys = rng.gumbel(size=num_classes) - num_classes * times
            row[:] = np.argpartition(keys, num_classes - per_partition)[num_classes - per_partition :]
            times[row] += 1
        if times.all():
            return chosen


def _fill_empty(chosen: IntArray, counts: IntArray, holders: Sequence[Rows], names: NDArray[Any]) -> None:
    """Move examples between holders of one class, in place, until every partition has one.

    An empty partition takes an example from a holder of one of its classes that has more than one in all. Where all
    holders have just one, such a holder gives its own and takes one of its other classes instead, and so on: the
    breadth-first search for an augmenting path, which finds a way if there is one.

    Parameters
    ----------
    chosen : (K, C) int64
        Classes of each partition.
    counts : (K, C) int64
        Examples of each; changed.
    holders : sequence of (h_c,) intp
        For every class, its entries in the flattened tables.
    names : (classes,) array
        Labels, for the error.
    """
    per_partition = chosen.shape[1]
    totals = counts.sum(axis=1)
    for empty in np.flatnonzero(totals == 0):
        # for each partition reached: the entry it would take an example into, and the entry that it would come from
        moves: dict[int, list[tuple[int, int]]] = {int(empty): []}
        queue, seen = deque(moves), set[int]()
        path: list[tuple[int, int]] | None = None
        while queue and path is None:
            taker = queue.popleft()
            for column, label in enumerate(chosen[taker].tolist()):
                if label in seen:
                    continue
                seen.add(label)
                into = taker * per_partition + column
                stocked = holders[label][counts.flat[holders[label]] > 0]
                rich = stocked[totals[stocked // per_partition] > 1]
                if rich.size:
                    path = [*moves[taker], (into, int(rich[counts.flat[rich].argmax()]))]
                    break
                for entry in stocked.tolist():
                    giver = entry // per_partition
                    if giver not in moves:
                        moves[giver] = [*moves[taker], (into, entry)]
                        queue.append(giver)
        if path is None:
            raise ConfigError(
                f"every partition needs at least one example of its classes, but {len(moves)} partitions drew only "
                f"classes {', '.join(map(repr, names[sorted(seen)].tolist()))}, which have {len(moves) - 1} examples: "
                f"lower num_partitions or raise num_classes_per_partition"
            )
        for into, source in path:
            counts.flat[into] += 1
            counts.flat[source] -= 1
        totals[empty] += 1
        totals[path[-1][1] // per_partition] -= 1
