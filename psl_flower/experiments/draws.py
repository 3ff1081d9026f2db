"""The augmentation that every client of every step draws by itself, for many of them at once.

A client seeds torch's generator for each of its steps (`psl_flower.protocol.step_seed`) and draws one crop and one
mirroring an image. Doing that one client after another takes longer than the GPU needs for the step. So numpy's
SeedSequence and torch's generator, the Mersenne Twister MT19937 (Matsumoto & Nishimura 1998), are computed here for all
clients together, in arrays. numpy promises that SeedSequence stays as it is; what torch makes of its generator is
compared with torch itself before it is relied on.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from psl_flower.app.images import Shifts, draw_shifts
from psl_flower.protocol import step_seed
from psl_flower.typing import IntArray

UIntArray = NDArray[np.uint32]

_STATE, _SHIFT = 624, 397  # words of MT19937's state, and how far apart those are that make the next one
_MOST = (_STATE - _SHIFT) // 3  # images whose draws come from the state that a seed gives, without another round
_CROPS = 3  # a crop's choices with crop_flip's padding of 1


def draw_all(seed: int, epoch: int, steps: IntArray, clients: IntArray, counts: IntArray) -> Shifts:
    """Draw what `crop_flip` draws for `counts` images of each client in a step, seeded for each as the client does.

    Parameters
    ----------
    seed, epoch : int
    steps, clients, counts : (E,) int64

    Returns
    -------
    Shifts
        Of all images, entry after entry, on the CPU.
    """
    numbers = [seed, epoch, int(steps.max(initial=0)), int(clients.max(initial=0)) + 1]
    if counts.max(initial=0) > _MOST or max(numbers) >= 2**32 or not _as_torch_does():
        return _draw_one_by_one(seed, epoch, steps, clients, counts)
    return _draw_together(_step_seeds(seed, epoch, steps, clients), counts)


def _draw_one_by_one(seed: int, epoch: int, steps: IntArray, clients: IntArray, counts: IntArray) -> Shifts:
    generator, drawn = torch.Generator(), []
    for step, client, count in zip(steps.tolist(), clients.tolist(), counts.tolist(), strict=True):
        generator.manual_seed(step_seed(seed, epoch, step, client))
        drawn.append(draw_shifts(count, generator=generator))
    top, left, mirrored = (torch.cat(parts) for parts in zip(*drawn, strict=True))
    return Shifts(top, left, mirrored)


def _draw_together(seeds: UIntArray, counts: IntArray) -> Shifts:
    words = _outputs(seeds, 3 * int(counts.max()))  # (E, 3 * most)
    image = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)  # within its entry
    entry, count = np.repeat(np.arange(len(counts)), counts), np.repeat(counts, counts)
    # in the order of draw_shifts: all tops, all lefts, then whether a 24-bit fraction is below one half
    top, left, fraction = (words[entry, image + i * count] for i in range(3))
    mirrored = (fraction >> np.uint32(23)) & np.uint32(1) == 0
    crops = [torch.from_numpy((words % _CROPS).astype(np.int64)) for words in (top, left)]
    return Shifts(crops[0], crops[1], torch.from_numpy(mirrored))


@lru_cache(maxsize=1)
def _as_torch_does() -> bool:
    """Return whether this torch draws what `_draw_together` expects."""
    steps, clients, counts = np.array([0, 3, 900]), np.array([5, 0, 127]), np.array([1, 2, _MOST])
    together = _draw_together(_step_seeds(7, 2, steps, clients), counts)
    return all(map(torch.equal, together, _draw_one_by_one(7, 2, steps, clients, counts)))


def _outputs(seeds: UIntArray, count: int) -> UIntArray:
    """Return the first `count` outputs of an MT19937 for each seed, (E, count); at most 227."""
    state = np.empty((_SHIFT + count, len(seeds)), dtype=np.uint32)
    state[0] = seeds
    for i in range(1, len(state)):
        state[i] = np.uint32(1812433253) * (state[i - 1] ^ (state[i - 1] >> np.uint32(30))) + np.uint32(i)
    here, following = state[:count], state[1 : count + 1]
    y = (here & np.uint32(0x80000000)) | (following & np.uint32(0x7FFFFFFF))
    words: UIntArray = state[_SHIFT:] ^ (y >> np.uint32(1)) ^ ((following & np.uint32(1)) * np.uint32(0x9908B0DF))
    words ^= words >> np.uint32(11)
    words ^= (words << np.uint32(7)) & np.uint32(0x9D2C5680)
    words ^= (words << np.uint32(15)) & np.uint32(0xEFC60000)
    words ^= words >> np.uint32(18)
    return words.T


def _step_seeds(seed: int, epoch: int, steps: IntArray, clients: IntArray) -> UIntArray:
    """Return the 32 bits of `step_seed` that seed an MT19937, for all clients of all steps: (E,) uint32."""
    low, high = _seed_words([seed, epoch, steps, clients + 1, 2])  # 2: the spawn key of step_seed
    return (low >> np.uint32(1)) | (high << np.uint32(31))


def _seed_words(entropy: list[int | IntArray]) -> tuple[UIntArray, UIntArray]:
    """Return the first two words of SeedSequences, given their entropy of four words and their spawn key's of one."""
    length = max(np.size(word) for word in entropy)
    *pool, key = (np.broadcast_to(np.asarray(word).astype(np.uint32), (length,)).copy() for word in entropy)
    constant: UIntArray = np.array([0x43B0D7E5], dtype=np.uint32)

    def hashed(value: UIntArray, factor: int) -> UIntArray:
        nonlocal constant
        value = value ^ constant
        constant = constant * np.uint32(factor)
        return _folded(value * constant)

    def mixed(x: UIntArray, y: UIntArray) -> UIntArray:
        return _folded(x * np.uint32(0xCA01F9DD) - y * np.uint32(0x4973F715))

    pool = [hashed(word, 0x931E8875) for word in pool]
    for source in range(4):
        for target in (i for i in range(4) if i != source):
            pool[target] = mixed(pool[target], hashed(pool[source], 0x931E8875))
    pool = [mixed(word, hashed(key, 0x931E8875)) for word in pool]
    constant = np.array([0x8B51F9DD], dtype=np.uint32)
    return hashed(pool[0], 0x58F38DED), hashed(pool[1], 0x58F38DED)


def _folded(value: UIntArray) -> UIntArray:
    return value ^ (value >> np.uint32(16))
