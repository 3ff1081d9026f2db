"""The data a sampler reads (``Population``), the plan it makes (``BatchPlan``) and its base class (``Sampler``)."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from psl_flower.checks import check_int
from psl_flower.errors import ConfigError

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]

# Note [Sampler streams]: numpy's SeedSequence pads short entropy with zeros, so ``default_rng([seed, epoch])`` and the
# ``default_rng([seed, epoch, 0])`` that orders client 0's examples would be ONE stream. A spawn key keeps them apart.
_SAMPLER_STREAM = 1


def epoch_rng(seed: int, epoch: int, replan: int = 0) -> np.random.Generator:
    """Return the generator a sampler uses for an epoch's plan, independent of every client's order of examples.

    Every new plan for the rest of the epoch (`replan` 1, 2, ...) has a stream of its own.
    """
    key = (_SAMPLER_STREAM, replan) if replan else (_SAMPLER_STREAM,)
    return np.random.default_rng(np.random.SeedSequence([seed, epoch], spawn_key=key))


def as_int64(values: ArrayLike, name: str, *, copy: bool = True) -> IntArray:
    """Return `values` as a read-only int64 array, refusing anything that is not whole numbers.

    Parameters
    ----------
    values : array_like
        Integers, or floats without a fraction.
    name : str
        What the error calls them.
    copy : bool
        Without it, an int64 array is viewed, not copied.

    Raises
    ------
    ConfigError
        If a value is not a whole number, or does not fit in 64 bits.
    """
    try:
        array = np.asarray(values)
    except ValueError as exc:
        raise ConfigError(f"{name} must be an array of whole numbers: {exc}") from exc
    if array.size and array.dtype.kind not in "iuf":
        raise ConfigError(f"{name} must be whole numbers, got dtype {array.dtype}: pass an int64 array")
    if array.dtype.kind == "f":
        numbers = array.astype(np.float64)
        broken = array[~(np.isfinite(numbers) & (numbers == np.floor(numbers)))]
        if broken.size:
            raise ConfigError(f"{name} must be whole numbers, got {broken.flat[0]}")
        too_large = array[np.abs(numbers) >= 2.0**63]
    else:
        too_large = array[array > np.iinfo(np.int64).max] if array.dtype.kind == "u" else array[:0]
    if too_large.size:
        raise ConfigError(f"{name} must fit in 64 bits, got {too_large.flat[0]}")
    result = array.astype(np.int64, copy=copy).view()
    result.setflags(write=False)
    return result


def _as_seconds(values: ArrayLike, name: str) -> FloatArray:
    try:
        array = np.array(values, dtype=np.float64)
    except (TypeError, ValueError) as exc:
        raise ConfigError(f"{name} must be one number a client (seconds): {exc}") from exc
    if array.ndim != 1:
        raise ConfigError(f"{name} must be one number a client, got shape {array.shape}")
    broken = array[~(np.isfinite(array) & (array >= 0))]
    if broken.size:
        raise ConfigError(f"{name} must be finite and not negative (seconds), got {broken[0]}")
    array.setflags(write=False)
    return array


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

    def take(self, rows: NDArray[np.intp]) -> Delays:
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

    def _checked_counts(self, counts: ArrayLike, order: NDArray[np.intp]) -> IntArray:
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

    def rows(self) -> NDArray[np.intp]:
        """Return the row in ``population`` of every entry's client, (E,)."""
        ids = self.population.client_ids
        if ids[-1] - ids[0] == len(ids) - 1:  # consecutive, the usual case: no search
            rows: NDArray[np.intp] = np.subtract(self.clients, ids[0], dtype=np.intp)
            return rows
        return np.searchsorted(ids, self.clients)

    def dense(self) -> IntArray:
        """Return the whole schedule as a (T, K) int64 table; columns in ascending client id."""
        table = np.zeros((len(self), len(self.population)), dtype=np.int64)
        table[self.steps(), self.rows()] = self.quotas
        return table

    def shuffled(self, rng: np.random.Generator) -> BatchPlan:
        """Return the same steps in a random order (METHOD: an epoch's time is a sum, so the order is free)."""
        return self.take(rng.permutation(len(self)))

    def take(self, steps: NDArray[np.intp]) -> BatchPlan:
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

    def _validate_classes(self, quotas: IntArray, rows: NDArray[np.intp]) -> None:
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


class Sampler(ABC):
    """Base of all samplers: decides how many examples each client contributes to each step of an epoch.

    Parameters
    ----------
    batch_size : int
        Global batch size B, at least 1.
    seed : int
        Not negative. A plan is a function of (seed, epoch, replan, population) alone.

    Attributes
    ----------
    needs_label_counts : bool
        Whether `Population.label_counts` must be given; clients are asked for them only then.
    needs_delays : bool
        Whether `Population.delays` must be given.

    Raises
    ------
    ConfigError
        If an argument is out of range.
    """

    needs_label_counts: bool = False
    needs_delays: bool = False

    def __init__(self, batch_size: int, *, seed: int = 0) -> None:
        self.batch_size = check_int(batch_size, "batch_size", least=1)
        self.seed = check_int(seed, "seed", least=0)

    def plan(self, population: Population, epoch: int = 0, *, replan: int = 0) -> BatchPlan:
        """Make the plan of one epoch: every example of every client exactly once.

        Parameters
        ----------
        population : Population
            Clients without data are left out. To plan the rest of an epoch: what the clients have left.
        epoch : int
            0-based.
        replan : int
            0 plans the whole epoch. 1, 2, ... are new plans for the rest of it, after clients were lost or came back:
            the rest may be less than a batch.

        Returns
        -------
        BatchPlan
            Its `population` is the clients that hold data.

        Raises
        ------
        ConfigError
            If the batch size exceeds the number of examples, or the sampler needs what the population lacks.
        """
        epoch, replan = check_int(epoch, "epoch", least=0), check_int(replan, "replan", least=0)
        if not replan and self.batch_size > population.num_examples:
            raise ConfigError(
                f"batch_size must not exceed the number of examples, got {self.batch_size} for "
                f"{population.num_examples} examples: lower batch_size"
            )
        for needed, field in ((self.needs_label_counts, "label_counts"), (self.needs_delays, "delays")):
            if needed and getattr(population, field) is None:
                raise ConfigError(f"{type(self).__name__} needs the population's {field}, which are not given")
        sampler = self
        if self.batch_size > population.num_examples:  # the rest of an epoch: one short batch
            sampler = copy.copy(self)
            sampler.batch_size = population.num_examples
        return sampler._plan(population.with_data(), epoch_rng(self.seed, epoch, replan))

    @abstractmethod
    def _plan(self, population: Population, rng: np.random.Generator) -> BatchPlan:
        """Make the plan; every client of `population` holds data and 1 <= B <= N."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}(batch_size={self.batch_size}, seed={self.seed})"
