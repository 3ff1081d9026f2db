"""The schedule of an epoch: which clients contribute how many examples to each step."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np

from psl_flower.checks import as_int64
from psl_flower.errors import ConfigError
from psl_flower.population import Population
from psl_flower.typing import IndexArray, IntArray


@dataclass(frozen=True, eq=False)
class PlanStep:
    """One step of a plan: who contributes how much.

    Parameters
    ----------
    clients : (A,) int64
        Ids of the clients that take part, ascending.
    quotas : (A,) int64
        Examples each contributes, at least 1.
    class_quotas : (A, C) int64, optional
        Examples of each class; rows add up to `quotas`. None where the sampler leaves the classes to chance.
    """

    clients: IntArray
    quotas: IntArray
    class_quotas: IntArray | None = None

    @property
    def batch_size(self) -> int:
        """Examples in the step's global batch."""
        return int(self.quotas.sum())


@dataclass(frozen=True, eq=False)
class BatchPlan(Sequence[PlanStep]):
    """An epoch's schedule of quotas, sparse: entries of step t are ``offsets[t]:offsets[t + 1]``.

    Parameters
    ----------
    population : Population
        The clients the plan is for.
    offsets : (T + 1,) int64
        Where each step's entries begin.
    clients : (E,) int64
        Client ids, ascending within a step.
    quotas : (E,) int64
        Examples, at least 1.
    class_quotas : (E, C) int64, optional
        Examples of each class.

    Raises
    ------
    ConfigError
        If the shapes do not fit each other. What the entries say is checked by `validate`.
    """

    population: Population
    offsets: IntArray
    clients: IntArray
    quotas: IntArray
    class_quotas: IntArray | None = None

    def __post_init__(self) -> None:
        for name in ("offsets", "clients", "quotas", "class_quotas"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, as_int64(getattr(self, name), name, copy=False))
        offsets, entries = self.offsets, self.clients.shape
        if len(entries) != 1 or self.quotas.shape != entries:
            raise ConfigError(
                f"clients and quotas must be 1-D and of one length, got {entries} and {self.quotas.shape}"
            )
        if self.class_quotas is not None and (self.class_quotas.ndim != 2 or len(self.class_quotas) != entries[0]):
            raise ConfigError(f"class_quotas must have shape ({entries[0]}, classes), got {self.class_quotas.shape}")
        if offsets.ndim != 1 or not len(offsets) or offsets[0] != 0 or offsets[-1] != entries[0]:
            raise ConfigError(f"offsets must be 1-D and lead from 0 to {entries[0]} entries, got {offsets}")
        if (np.diff(offsets) < 0).any():
            raise ConfigError(f"offsets must not decrease, got {offsets}")

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, index: int) -> PlanStep: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[PlanStep]: ...
    def __getitem__(self, index: int | slice) -> PlanStep | Sequence[PlanStep]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"step {index} of a plan of {len(self)} steps")
        index %= len(self)
        entries = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
        return PlanStep(
            self.clients[entries],
            self.quotas[entries],
            None if self.class_quotas is None else self.class_quotas[entries],
        )

    def __iter__(self) -> Iterator[PlanStep]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        sizes = self.batch_sizes()
        batches = f"batches of {sizes.min()} to {sizes.max()}" if len(sizes) else "no batch"
        return f"BatchPlan({len(self)} steps, {len(self.population)} clients, {batches})"

    def batch_sizes(self) -> IntArray:
        """Return the size of every step's global batch, (T,) int64."""
        return np.diff(np.concatenate(([0], np.cumsum(self.quotas)))[self.offsets])

    def active_clients(self) -> IntArray:
        """Return the number of clients that take part in every step, (T,) int64."""
        return np.diff(self.offsets)

    def steps(self) -> IntArray:
        """Return the step every entry belongs to, (E,) int64."""
        return np.repeat(np.arange(len(self), dtype=np.int64), self.active_clients())

    def rows(self) -> IndexArray:
        """Return the row in ``population`` of every entry's client, (E,)."""
        ids = self.population.client_ids
        if ids[-1] - ids[0] == len(ids) - 1:  # consecutive, the usual case: no search
            rows: IndexArray = np.subtract(self.clients, ids[0], dtype=np.intp)
            return rows
        return np.searchsorted(ids, self.clients)

    def dense(self) -> IntArray:
        """Return the whole schedule as a (T, K) int64 table; columns in ascending client id."""
        table = np.zeros((len(self), len(self.population)), dtype=np.int64)
        table[self.steps(), self.rows()] = self.quotas
        return table

    def shuffled(self, rng: np.random.Generator) -> BatchPlan:
        """Return the same steps in a random order: an epoch's time is a sum, so it stays (docs/method.md, 1)."""
        return self.take(rng.permutation(len(self)))

    def take(self, steps: IndexArray) -> BatchPlan:
        """Return the plan of some of the steps, by index and in this order."""
        lengths = self.active_clients()[steps]
        offsets = np.concatenate(([0], np.cumsum(lengths)))
        # entry j of new step t is old entry offsets[steps[t]] + j
        entries = np.arange(offsets[-1]) + np.repeat(self.offsets[:-1][steps] - offsets[:-1], lengths)
        return BatchPlan(
            self.population,
            offsets,
            self.clients[entries],
            self.quotas[entries],
            None if self.class_quotas is None else self.class_quotas[entries],
        )

    def of_at_least(self, clients: int) -> BatchPlan:
        """Return the plan with its steps of fewer clients joined to others, each example once as before.

        Of at least one client it is the plan as it is, with steps that are empty.

        Steps of few clients are joined to each other as long as each brings a new client, until there are enough; what
        is left over is added to the smallest steps. With fewer clients in all, nothing can be done.
        """
        if clients <= 1:
            return self
        active, sizes = self.active_clients(), self.batch_sizes().tolist()
        goes, over = np.arange(len(self)), list[int]()
        group, members = list[int](), set[int]()
        for step in np.flatnonzero(active < clients).tolist():
            here = set(self.clients[self.offsets[step] : self.offsets[step + 1]].tolist())
            if here <= members:
                over.append(step)
                continue
            group, members = [*group, step], members | here
            if len(members) >= clients:
                goes[group] = group[0]
                group, members = [], set()
        over += group
        whole = np.bincount(goes, self.batch_sizes(), minlength=len(self))
        smallest = [(whole[step], step) for step in np.flatnonzero(whole > 0).tolist() if step not in set(over)]
        if not smallest or (not over and (goes == np.arange(len(self))).all()):
            return self
        heapq.heapify(smallest)
        for step in sorted(over):
            size, goes[step] = smallest[0]
            heapq.heapreplace(smallest, (size + sizes[step], int(goes[step])))
        return self._joined(goes)

    def _joined(self, goes: IntArray) -> BatchPlan:
        """Return the plan with each step's entries in the one of that index, (T,); steps that are empty then go."""
        kept, steps = np.unique(goes, return_inverse=True)
        entries = np.stack([steps[self.steps()], self.clients], axis=1)
        entries, at = np.unique(entries, axis=0, return_inverse=True)

        def added(column: IntArray) -> IntArray:
            total = np.zeros((len(entries), *column.shape[1:]), dtype=np.int64)
            np.add.at(total, at.reshape(-1), column)
            return total

        return BatchPlan(
            self.population,
            np.searchsorted(entries[:, 0], np.arange(len(kept) + 1)),
            entries[:, 1],
            added(self.quotas),
            None if self.class_quotas is None else added(self.class_quotas),
        )

    def validate(self) -> None:
        """Check the promises every plan makes.

        Raises
        ------
        ConfigError
            If a quota is below 1, a step is empty or names a client twice or an unknown one, class quotas do not add up
            to their quotas, or the plan does not use every example of every client exactly once.
        """
        population = self.population
        if self.quotas.size and self.quotas.min() < 1:
            raise ConfigError(f"quotas must be at least 1, got {self.quotas.min()}")
        empty = np.flatnonzero(self.active_clients() == 0)
        if empty.size:
            raise ConfigError(f"step {empty[0]} has no client")
        rows, steps = self.rows(), self.steps()
        nearest = population.client_ids[rows.clip(0, len(population) - 1)]
        unknown = self.clients[nearest != self.clients]
        if unknown.size:
            raise ConfigError(f"the plan names client {unknown[0]}, which is not in its population")
        unordered = np.flatnonzero((np.diff(self.clients) <= 0) & (np.diff(steps) == 0))
        if unordered.size:
            raise ConfigError(f"clients of step {steps[unordered[0]]} are not unique and ascending")
        used = np.bincount(rows, weights=self.quotas, minlength=len(population)).astype(np.int64)
        wrong = np.flatnonzero(used != population.sizes)
        if wrong.size:
            k = wrong[0]
            raise ConfigError(
                f"client {population.client_ids[k]} holds {population.sizes[k]} examples, {used[k]} are used"
            )
        if self.class_quotas is not None:
            self._validate_classes(self.class_quotas, rows)

    def _validate_classes(self, quotas: IntArray, rows: IndexArray) -> None:
        if quotas.size and quotas.min() < 0:
            raise ConfigError(f"class quotas must not be negative, got {quotas.min()}")
        if not np.array_equal(quotas.sum(axis=1), self.quotas):
            raise ConfigError("class quotas do not add up to their quotas")
        counts = self.population.label_counts
        if counts is None:
            return
        if quotas.shape[1] != counts.shape[1]:
            raise ConfigError(f"class quotas are of {quotas.shape[1]} classes, label_counts of {counts.shape[1]}")
        used = np.zeros_like(counts)
        np.add.at(used, rows, quotas)
        if not np.array_equal(used, counts):
            k, c = np.argwhere(used != counts)[0]
            raise ConfigError(
                f"client {self.population.client_ids[k]} holds {counts[k, c]} examples of class {c}, "
                f"{used[k, c]} are used"
            )
