"""What is random by agreement: server and clients draw the same, from the seed of the run."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from psl_flower.typing import IntArray

# Blocks of a client's order of examples that were moved to its end, one after the other: (class or -1, start, count).
PutOff = tuple[tuple[int, int, int], ...]


def client_epoch_rng(seed: int, epoch: int, client: int) -> np.random.Generator:
    """Return the generator of a client's order of examples for an epoch."""
    return np.random.default_rng([seed, epoch, client])


def epoch_order(rng: np.random.Generator, size: int, left_out: Sequence[int], put_off: PutOff) -> IntArray:
    """Return a client's order of examples for an epoch, (n,) int64, as indices of its data.

    Parameters
    ----------
    rng : numpy.random.Generator
        Of `client_epoch_rng`.
    size : int
        Examples that it holds.
    left_out : sequence of int
        Those that it cannot read.
    put_off : PutOff
        What comes last instead; blocks of a class are for the order of that class.
    """
    order: IntArray = rng.permutation(size)
    if left_out:
        order = order[~np.isin(order, left_out)]
    for of_class, start, count in put_off:
        if of_class < 0:
            order = to_end(order, start, count)
    return order


def to_end(order: IntArray, start: int, count: int) -> IntArray:
    """Return an order of examples with a block of it moved to the end."""
    return np.concatenate((order[:start], order[start + count :], order[start : start + count]))


def step_seed(seed: int, epoch: int, step: int, client: int | None = None) -> int:
    """Return a 63-bit seed for one party's randomness in one step; `client` None means the server half."""
    # the spawn key keeps this apart from the orders of examples, see Note [Sampler streams] in samplers/base.py
    entropy = [seed, epoch, step, 0 if client is None else client + 1]
    return int(np.random.SeedSequence(entropy, spawn_key=(2,)).generate_state(1, np.uint64)[0] >> np.uint64(1))
