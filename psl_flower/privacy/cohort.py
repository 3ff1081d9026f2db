"""Who gives a sum together, and who shares a mask with whom: what server and clients must agree about."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from psl_flower.typing import IntArray

KEY_BYTES = 32
FACTOR = 2**32  # parts of one that clients tell factors in


@dataclass(frozen=True, eq=False, kw_only=True)
class Cohort:
    """The clients of one attempt at a step: they give its sums together.

    Parameters
    ----------
    session : str
        Names the run; keys are made anew for each.
    attempt : int
        Rises within a run; every attempt has masks of its own.
    clients : (A,) int64
        Ids, ascending.
    counts : (A,) int64
        Examples of each.
    keys : (A, 32) uint8
        Public keys.
    degree : int
        Neighbours of each: even, or all others.
    places : dict of str to int
        Binary places of each sum.
    max_norm : float, optional
        L2 norm that each client scales its mean gradient of a part down to, before it masks it.
    """

    session: str
    attempt: int
    clients: IntArray
    counts: IntArray
    keys: NDArray[np.uint8]
    degree: int
    places: Mapping[str, int] = field(default_factory=dict)
    max_norm: float | None = None

    def __len__(self) -> int:
        return len(self.clients)

    @cached_property
    def digest(self) -> bytes:
        """The same for all who know the same of it; places may differ from stage to stage."""
        found = hashlib.sha256(f"{self.session} {self.attempt} {self.degree}".encode())
        for column in (self.clients, self.counts, self.keys):
            found.update(np.ascontiguousarray(column).tobytes())
        return found.digest()

    def terms(self, stage: str) -> bytes:
        """Return what the masks of a stage are made for: masks of clients that were told different things stay.

        Else the server could have all but one scale their gradients to nothing, or round them away.
        """
        return self.digest + f"{stage} {sorted(self.places.items())} {self.max_norm}".encode()

    @cached_property
    def is_sound(self) -> bool:
        """Whether all are named once, in order, and have a key of their own."""
        return len({self.key(i) for i in range(len(self))}) == len(self) and bool((np.diff(self.clients) > 0).all())

    def key(self, position: int) -> bytes:
        """Return a client's public key."""
        return bytes(self.keys[position])

    def neighbours(self) -> IntArray:
        """Return with whom each client shares masks, (A, degree) positions; it is mutual.

        With some of all others: they stand in a circle, in a random order, and everyone has the nearest on both sides.
        So the graph is connected, and nobody can say beforehand who will be next to whom.
        """
        size = len(self)
        if self.degree >= size - 1:
            return np.array([[j for j in range(size) if j != i] for i in range(size)], dtype=np.int64)
        order = np.random.default_rng(int.from_bytes(self.digest, "big")).permutation(size)
        place = np.argsort(order)
        steps = np.arange(1, self.degree // 2 + 1)
        return np.asarray(order[(place[:, None] + np.concatenate((-steps, steps))) % size], dtype=np.int64)
