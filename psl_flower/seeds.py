"""What is random by agreement: server and clients draw the same, from the seed of the run."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from psl_flower.typing import IntArray

_Words = NDArray[np.uint32]

_FEW = 12  # seeds that are made faster one by one

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


def step_seeds(seed: int, epoch: int, steps: IntArray, clients: IntArray) -> NDArray[np.uint64]:
    """Return the `step_seed` of many clients' steps at once, (E,) uint64.

    numpy promises that its SeedSequence stays as it is; here it is computed in arrays, a hundred times faster.

    Parameters
    ----------
    seed, epoch : int
    steps, clients : (E,) int64
    """
    longest = max(seed, epoch, int(steps.max(initial=0)), int(clients.max(initial=0)) + 1)
    if len(steps) < _FEW or longest >= 2**32:  # of more words
        each = zip(steps.tolist(), clients.tolist(), strict=True)
        return np.array([step_seed(seed, epoch, step, client) for step, client in each], dtype=np.uint64)
    low, high = _seed_words([seed, epoch, steps, clients + 1, 2])  # 2: the spawn key of step_seed
    return (high.astype(np.uint64) << np.uint64(31)) | (low >> np.uint32(1)).astype(np.uint64)


def _seed_words(entropy: list[int | IntArray]) -> tuple[_Words, _Words]:
    """Return the first two words of SeedSequences, given their entropy of four words and their spawn key's of one."""
    length = max(np.size(word) for word in entropy)
    *pool, key = (np.broadcast_to(np.asarray(word).astype(np.uint32), (length,)).copy() for word in entropy)
    constant: _Words = np.array([0x43B0D7E5], dtype=np.uint32)

    def hashed(value: _Words, factor: int) -> _Words:
        nonlocal constant
        value = value ^ constant
        constant = constant * np.uint32(factor)
        return _folded(value * constant)

    def mixed(x: _Words, y: _Words) -> _Words:
        return _folded(x * np.uint32(0xCA01F9DD) - y * np.uint32(0x4973F715))

    pool = [hashed(word, 0x931E8875) for word in pool]
    for source in range(4):
        for target in (i for i in range(4) if i != source):
            pool[target] = mixed(pool[target], hashed(pool[source], 0x931E8875))
    pool = [mixed(word, hashed(key, 0x931E8875)) for word in pool]
    constant = np.array([0x8B51F9DD], dtype=np.uint32)
    return hashed(pool[0], 0x58F38DED), hashed(pool[1], 0x58F38DED)


def _folded(value: _Words) -> _Words:
    return value ^ (value >> np.uint32(16))
