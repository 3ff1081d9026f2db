"""The augmentation that every client of every step draws by itself, for many of them at once.

A client seeds torch's generator for each of its steps (`psl_flower.seeds.step_seed`) and draws one crop and one
mirroring an image. Doing that one client after another takes longer than the GPU needs for the step. So torch's
generator, the Mersenne Twister MT19937 (Matsumoto & Nishimura 1998), is computed here for all clients together, in
arrays. What torch makes of its generator is compared with torch itself before it is relied on.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from psl_flower.app.images import Shifts, draw_each
from psl_flower.data import Seeds
from psl_flower.seeds import step_seeds
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
    seeds = step_seeds(seed, epoch, steps, clients)
    if counts.max(initial=0) > _MOST or not _as_torch_does():
        return draw_each(Seeds(seeds.tolist()), counts.tolist())
    return _draw_together(seeds, counts)


def _draw_together(seeds: NDArray[np.uint64], counts: IntArray) -> Shifts:
    words = _outputs(seeds.astype(np.uint32), 3 * int(counts.max()))  # (E, 3 * most); of a seed, it takes 32 bits
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
    seeds, counts = step_seeds(7, 2, np.array([0, 3, 900]), np.array([5, 0, 127])), np.array([1, 2, _MOST])
    return all(map(torch.equal, _draw_together(seeds, counts), draw_each(Seeds(seeds.tolist()), counts.tolist())))


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
