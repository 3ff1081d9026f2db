"""The clients that a plan is made for: how much each holds, of which classes, and how slow it is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from psl_flower.checks import as_int64, check_not_negative
from psl_flower.errors import ConfigError
from psl_flower.typing import FloatArray, IndexArray, IntArray


@dataclass(frozen=True, eq=False)
class Delays:
    """How slow each client is: a step to which client k contributes b > 0 examples takes latency_k + per_sample_k * b.

    Parameters
    ----------
    latency : (K,) float64
        Seconds a step, whatever the quota.
    per_sample : (K,) float64
        Seconds an example.

    Raises
    ------
    ConfigError
        If the shapes differ, or a value is negative, infinite or NaN.
    """

    latency: FloatArray
    per_sample: FloatArray

    def __post_init__(self) -> None:
        object.__setattr__(self, "latency", _as_seconds(self.latency, "latency"))
        object.__setattr__(self, "per_sample", _as_seconds(self.per_sample, "per_sample"))
        if self.latency.shape != self.per_sample.shape:
            raise ConfigError(
                f"latency and per_sample must name the same clients, got {len(self.latency)} and {len(self.per_sample)}"
            )

    def __len__(self) -> int:
        return len(self.latency)

    def take(self, rows: IndexArray) -> Delays:
        """Return the delays of the clients at `rows`."""
        return Delays(self.latency[rows], self.per_sample[rows])


@dataclass(frozen=True, eq=False)
class Population:
    """The clients of an epoch, in ascending id whatever order they were given in.

    Parameters
    ----------
    client_ids : (K,) int64
        Unique, not negative.
    sizes : (K,) int64
        Examples each client holds; 0 is allowed (such a client is never drawn).
    label_counts : (K, C) int64, optional
        Examples of each class; rows add up to `sizes`. Only some samplers need it.
    delays : Delays, optional
        Only delay-aware samplers need it.

    Raises
    ------
    ConfigError
        If it is empty, an id is duplicate or negative, a size is negative, all sizes are zero, or shapes do not match.
    """

    client_ids: IntArray
    sizes: IntArray
    label_counts: IntArray | None = None
    delays: Delays | None = None

    def __post_init__(self) -> None:
        ids, sizes = as_int64(self.client_ids, "client_ids"), as_int64(self.sizes, "sizes")
        if ids.ndim != 1 or sizes.ndim != 1 or len(ids) != len(sizes):
            raise ConfigError(f"client_ids and sizes must be 1-D and of one length, got {ids.shape} and {sizes.shape}")
        if not len(ids):
            raise ConfigError("a population needs at least one client, got none")
        if ids.min() < 0:
            raise ConfigError(f"client_ids must not be negative, got {ids.min()}")
        order = np.argsort(ids, kind="stable")
        ids, sizes = ids[order], sizes[order]
        repeated = ids[1:][ids[1:] == ids[:-1]]
        if repeated.size:
            raise ConfigError(f"client_ids must be unique, got {repeated[0]} more than once")
        if sizes.min() < 0:
            raise ConfigError(f"sizes must not be negative, got {sizes.min()} for client {ids[sizes.argmin()]}")
        if sum(sizes.tolist()) >= 2**63:
            raise ConfigError(f"all sizes together must fit in 64 bits, got {sum(sizes.tolist())} examples")
        if not sizes.sum():
            raise ConfigError("a population needs at least one example, all sizes are 0")
        ids.setflags(write=False)
        sizes.setflags(write=False)
        object.__setattr__(self, "client_ids", ids)
        object.__setattr__(self, "sizes", sizes)
        if self.label_counts is not None:
            object.__setattr__(self, "label_counts", self._checked_counts(self.label_counts, order))
        if self.delays is not None:
            if len(self.delays) != len(ids):
                raise ConfigError(f"delays must name all {len(ids)} clients, got {len(self.delays)}")
            object.__setattr__(self, "delays", self.delays.take(order))

    def _checked_counts(self, counts: ArrayLike, order: IndexArray) -> IntArray:
        table = as_int64(counts, "label_counts")
        if table.ndim != 2 or len(table) != len(self.client_ids):
            raise ConfigError(f"label_counts must have shape ({len(self.client_ids)}, classes), got {table.shape}")
        if table.size and table.min() < 0:
            raise ConfigError(f"label_counts must not be negative, got {table.min()}")
        table = table[order]
        wrong = np.flatnonzero(table.sum(axis=1) != self.sizes)
        if wrong.size:
            k = wrong[0]
            raise ConfigError(
                f"label_counts of client {self.client_ids[k]} add up to {table[k].sum()}, its size is {self.sizes[k]}"
            )
        table.setflags(write=False)
        return table

    def __len__(self) -> int:
        return len(self.client_ids)

    @property
    def num_examples(self) -> int:
        """N, the number of examples of all clients."""
        return int(self.sizes.sum())

    def same_data(self, other: Population) -> bool:
        """Return whether `other` is the same clients with as many examples each."""
        return np.array_equal(self.client_ids, other.client_ids) and np.array_equal(self.sizes, other.sizes)

    def with_data(self) -> Population:
        """Return the clients that hold examples (itself, if all do)."""
        rows = np.flatnonzero(self.sizes)
        if len(rows) == len(self):
            return self
        return Population(
            self.client_ids[rows],
            self.sizes[rows],
            None if self.label_counts is None else self.label_counts[rows],
            None if self.delays is None else self.delays.take(rows),
        )


def _as_seconds(values: ArrayLike, name: str) -> FloatArray:
    try:
        array = np.array(values, dtype=np.float64)
    except (TypeError, ValueError) as exc:
        raise ConfigError(f"{name} must be one number a client (seconds): {exc}") from exc
    if array.ndim != 1:
        raise ConfigError(f"{name} must be one number a client, got shape {array.shape}")
    check_not_negative(array, name, "seconds")
    array.setflags(write=False)
    return array
