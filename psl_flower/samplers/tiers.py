"""Few speeds in place of many: clients in tiers by the seconds they take for a single example."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from psl_flower.samplers.suppliers import Suppliers
from psl_flower.typing import FloatArray, IndexArray


def merged_tiers(suppliers: Suppliers, num_steps: int, most: int, *, up: bool) -> tuple[FloatArray, IndexArray]:
    """Sort clients into at most so many tiers of about equal speed, such that an epoch's time changes little.

    Parameters
    ----------
    suppliers : Suppliers
        K clients.
    num_steps : int
        T.
    most : int
        Greatest number of tiers.
    up : bool
        Whether a tier counts as slow as its slowest client, or as fast as its fastest.

    Returns
    -------
    seconds : (G,) float64
        Ascending: what a client of the tier takes for a single example.
    tier : (K,) intp
        Each client's.
    """
    speeds, tier = np.unique(suppliers.first_reply, return_inverse=True)
    # The steps that need clients of a speed or slower are about as many as those that hold all of such clients' data of
    # one class, whichever class asks for most.
    held = np.zeros((len(speeds), suppliers.counts.shape[1]))
    np.add.at(held, tier, suppliers.counts)
    share = (held[::-1].cumsum(axis=0)[::-1] / held.sum(axis=0).clip(1)).max(axis=1)
    kept = merge_levels(speeds, -np.diff(share, append=0.0) * num_steps, most, up=up)
    return speeds[kept], np.searchsorted(kept, tier, side="left" if up else "right") - (0 if up else 1)


def merge_levels(levels: ArrayLike, lengths: ArrayLike, most: int, *, up: bool = True) -> IndexArray:
    """Choose which of many step durations to keep when the others are rounded to a neighbour at the least cost.

    Parameters
    ----------
    levels : (n,) float
        Durations, ascending.
    lengths : (n,) float
        Number of steps of each.
    most : int
        How many to keep, at least 1.
    up : bool
        Round up (the last is kept) or down (the first is kept).

    Returns
    -------
    (m,) intp
        Indices of what is kept, ascending.
    """
    levels, lengths = np.asarray(levels, dtype=np.float64), np.asarray(lengths, dtype=np.float64).copy()
    kept = np.arange(len(levels))
    while len(kept) > most:
        gaps = np.diff(levels[kept])
        if up:
            gone = int(np.argmin(lengths[:-1] * gaps))
            lengths[gone + 1] += lengths[gone]
        else:
            gone = int(np.argmin(lengths[1:] * gaps)) + 1
            lengths[gone - 1] += lengths[gone]
        kept, lengths = np.delete(kept, gone), np.delete(lengths, gone)
    return kept
