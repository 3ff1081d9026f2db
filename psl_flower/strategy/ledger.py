"""What remains of an epoch: a plan, what lost clients have left beyond it, and when to plan the rest anew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from psl_flower.batch_plan import BatchPlan, PlanStep
from psl_flower.errors import MembershipError
from psl_flower.population import Population
from psl_flower.protocol import Orders
from psl_flower.samplers.base import Sampler
from psl_flower.samplers.rounding import round_to_sum
from psl_flower.strategy.orders import Cursors
from psl_flower.typing import BoolArray, IndexArray, IntArray

# Note [When to plan anew]: a plan costs about as much as it has steps, so planning anew whenever somebody is lost would
# cost the square of an epoch. What is left of a lost client therefore waits, beyond the plan. Waiting does harm as its
# share of all that remains grows: mixed into the rest at last, a share s moves a batch's expected class distribution by
# at most 2 s (L1). So the rest is planned anew when the share, times the steps that the plan has given, is worth so
# much for every step left: soon where much waits, later where little does, and in all for a small multiple of what
# planning once costs. The last steps are planned anew for whatever waits, so that it needs no small batch of its own.
_WORTH = 1 / 64
_LAST_STEPS = 4


class EpochLedger:
    """The examples of every client that remain of an epoch, and the plan that collects them.

    What no committed step has used remains. Steps of the plan that want a client who is not available are put off; a
    plan's steps may be taken in any order. The rest of the epoch is planned anew by the same sampler, for what remains
    of the available clients, when every step left wants somebody who is not, and when enough remains beyond the plan:
    of clients that were lost from a step, are back, or joined; see Note [When to plan anew]. So no step is smaller than
    planned before it begins, every example of every client that can be reached is used exactly once, and a plan is a
    function of the seed, the epoch, how often it was planned anew, and what remains.

    Parameters
    ----------
    sampler : Sampler
        Makes the plans.
    population : Population
        The epoch's clients with all they hold.
    epoch : int
        0-based.
    state : dict, optional
        The `state_dict` of an earlier one to go on from, instead of planning the epoch; `population` must be that of
        `saved_population` then, but for the delays.

    by_class : bool
        Whether clients draw by class where the plan says so. If not, it only decides how many examples each draws:
        what is planned with class counts that are noisy, or by clients that keep their labels.
    least : int
        Clients that a step must have: those of fewer are joined to others.
    before : EpochLedger, optional
        That of the epoch before.

    Raises
    ------
    ConfigError
        If the sampler cannot plan for this population.
    """

    def __init__(
        self,
        sampler: Sampler,
        population: Population,
        epoch: int,
        state: Mapping[str, Any] | None = None,
        *,
        by_class: bool = True,
        least: int = 1,
        before: EpochLedger | None = None,
    ) -> None:
        self._sampler, self._epoch, self._by_class, self._least = sampler, epoch, by_class, least
        self.population = population
        if state is not None:
            self.load_state_dict(state)
            return
        self.replans = 0
        self._cursors = Cursors(population.client_ids, seed=sampler.seed, epoch=epoch)
        counts = population.label_counts
        self._resting = np.zeros(len(population), dtype=np.int64)  # owed, but not at the present weights, (K,)
        self._resting_by_class = np.zeros((len(population), 0 if counts is None else counts.shape[1]), dtype=np.int64)
        self._seen: IntArray | None = None if counts is None else np.zeros_like(counts)
        self._plan = sampler.plan(population, epoch).of_at_least(least)
        self._next = 0
        self._taken = 0  # steps, of the plan
        self._planned = population.sizes.copy()  # what each client owes that the plan collects, (K,)
        self._outdated = False  # whether the plan collects more than is owed
        if before is not None:
            self._rest_after(before)

    # --- what is left ------------------------------------------------------------------------------------------------
    @property
    def remaining(self) -> IntArray:
        """Examples of each client of the population that no committed step has used, (K,) int64."""
        return np.asarray(self.population.sizes - self._cursors.used)

    def unfinished(self) -> IntArray:
        """Return the ids of the clients with examples remaining that can be drawn now, ascending."""
        return np.asarray(self.population.client_ids[self._available > 0])

    @property
    def _available(self) -> IntArray:
        return np.asarray(self.remaining - self._resting)

    def contributors(self) -> IntArray:
        """Return the ids of the clients with examples used, ascending."""
        return np.asarray(self.population.client_ids[self._cursors.used > 0])

    def steps_left(self) -> int:
        """Return the number of steps still to come, if nobody is lost."""
        beyond = int((self.remaining - self._planned).sum())
        return len(self._plan) - self._next + -(-beyond // self._sampler.batch_size)

    # --- steps -------------------------------------------------------------------------------------------------------
    def step(self, clients: IntArray) -> PlanStep:
        """Return the next step with these clients; it is next until it is `done`.

        Some of the clients must have examples remaining.
        """
        available = np.isin(self.population.client_ids, clients) & (self._available > 0)
        absent = (self._planned > 0) & ~available
        if self._outdated or self._replanning_pays(available) or not self._put_off(absent):
            self._replan(available)
        return self._plan[self._next]

    def orders(self, index: int, step: PlanStep, left_out: Mapping[int, tuple[int, ...]] | None = None) -> Orders:
        """Return the work orders of a step, the `index`-th of the epoch to be committed."""
        return self._cursors.orders(index, self._as_drawn(step), left_out)

    def _as_drawn(self, step: PlanStep) -> PlanStep:
        return step if self._by_class else replace(step, class_quotas=None)

    def round_orders(self, index: int, clients: IntArray, *, over: bool) -> Orders:
        """Return orders that name the examples that clients owe of the epoch; `over`: that they have used."""
        rows = np.searchsorted(self.population.client_ids, clients)
        used, left = self._cursors.used[rows], self.remaining[rows]
        return Orders(
            clients=clients,
            starts=used,
            counts=used if over else left,
            seed=self._sampler.seed,
            epoch=self._cursors.epoch,
            step=index,
        )

    def leave_out(self, client: int, labels: Sequence[int], rows: int, *, lost: bool) -> None:
        """Have a client owe fewer examples: it cannot read some, which no committed step has used.

        Parameters
        ----------
        client : int
        labels : sequence of int
            Their classes, where they are known.
        rows : int
            How many.
        lost : bool
            Whether the step in which that turned out goes on without the client: then the plan still fits what it owes.
        """
        row = int(np.searchsorted(self.population.client_ids, client))
        sizes, counts = self.population.sizes.copy(), self.population.label_counts
        sizes[row] -= rows
        if counts is not None:
            counts = counts.copy()
            np.subtract.at(counts[row], list(labels), 1)
            if counts[row].min() < 0 or counts[row].sum() != sizes[row]:  # their classes are not known
                counts[row] = round_to_sum(np.maximum(counts[row], 0) + 1e-9, int(sizes[row]), np.random.default_rng(0))
        self.population = replace(self.population, sizes=sizes, label_counts=counts)
        self._outdated |= not lost

    def put_off(self, step: PlanStep) -> None:
        """Have the examples of a step that was given up rest until the weights are others; see `Party` for why."""
        self._cursors.to_end(self._as_drawn(step))
        rows = np.searchsorted(self.population.client_ids, step.clients)
        self._resting[rows] += step.quotas
        if step.class_quotas is not None and self._seen is not None:
            self._resting_by_class[rows] += step.class_quotas
        self._outdated = True

    def _rest_after(self, before: EpochLedger) -> None:
        """Have what rested at the end of the epoch before rest on, until the weights are others.

        Which examples those are may be the clients' to know (orders by class): so this epoch goes in the order of the
        one before, in which they come last.
        """
        ids, held = self.population.client_ids, self.population.sizes
        resting = {
            client: (n, by_class)
            for client, size, n, by_class in zip(
                before.population.client_ids.tolist(),
                before.population.sizes,
                before._resting,
                before._resting_by_class,
                strict=True,
            )
            if n and size == held[ids == client].sum()  # else it has other data
        }
        if not resting:
            return
        self._cursors = Cursors(ids, seed=self._sampler.seed, epoch=before._cursors.epoch)
        for client, (n, by_class) in resting.items():
            row = int(np.searchsorted(ids, client))
            self._cursors.put_off[client] = before._cursors.put_off[client]
            self._resting[row] = n
            if len(by_class) == self._resting_by_class.shape[1]:
                self._resting_by_class[row] = by_class
        self._outdated = True

    def done(self, step: PlanStep, labels: Mapping[int, NDArray[Any]], *, committed: bool = True) -> None:
        """Count as used what came of the next step.

        Parameters
        ----------
        step : PlanStep
            Its clients that arrived, see `part`.
        labels : dict of int to (n,) array
            Those of their examples; read only where label counts are known and the step has no class quotas.
        committed : bool
            Whether it has changed the weights.
        """
        whole = self._plan[self._next]
        if committed:
            self._resting[:], self._resting_by_class[:] = 0, 0
        self._cursors.advance(self._as_drawn(step))
        self._next += 1
        self._taken += 1
        self._planned[np.searchsorted(self.population.client_ids, whole.clients)] -= whole.quotas
        if self._seen is not None:
            rows = np.searchsorted(self.population.client_ids, step.clients)
            self._seen[rows] += self._class_counts(step, labels)

    def _class_counts(self, step: PlanStep, labels: Mapping[int, NDArray[Any]]) -> IntArray:
        assert self._seen is not None
        if step.class_quotas is not None:
            return step.class_quotas
        if not labels:  # they are not known here: as many of each class as there are on average
            rng = np.random.default_rng([self._sampler.seed, self._epoch, self._next])
            rows = np.searchsorted(self.population.client_ids, step.clients)
            left = np.maximum((self._counts() - self._seen)[rows], 0) + 1e-9
            return np.stack([round_to_sum(each, int(n), rng) for each, n in zip(left, step.quotas, strict=True)])
        return np.stack([_bincount(labels[int(k)], self._seen.shape[1]) for k in step.clients])

    def _counts(self) -> IntArray:
        assert self.population.label_counts is not None
        return self.population.label_counts

    # --- planning anew -----------------------------------------------------------------------------------------------
    def _replanning_pays(self, available: BoolArray) -> bool:
        """Return whether enough remains of the `available` clients, (K,), beyond the plan; Note [When to plan anew]."""
        remaining = self._available[available]
        left, beyond = len(self._plan) - self._next, int((remaining - self._planned[available]).sum())
        return beyond > 0 and (left <= _LAST_STEPS or beyond * self._taken >= _WORTH * left * int(remaining.sum()))

    def _put_off(self, absent: BoolArray) -> bool:
        """Take steps without the `absent`, (K,), first; return whether there are any."""
        absentees = self.population.client_ids[absent]
        if not np.isin(self._plan[self._next].clients, absentees).any():
            return True
        steps = self._plan.steps()[np.isin(self._plan.clients, absentees)]
        left = np.arange(self._next, len(self._plan))
        wants_them = np.isin(left, steps)
        self._plan, self._next = self._plan.take(np.concatenate((left[~wants_them], left[wants_them]))), 0
        return not wants_them.all()

    def _replan(self, available: BoolArray) -> None:
        self.replans += 1
        self._outdated = False
        population, rows = self.population, np.flatnonzero(available)
        rest = Population(
            population.client_ids[rows],
            self._available[rows],
            self._remaining_by_class(rows),
            None if population.delays is None else population.delays.take(rows),
        )
        self._plan = self._sampler.plan(rest, self._epoch, replan=self.replans).of_at_least(self._least)
        self._next, self._taken, self._planned = 0, 0, np.where(available, self._available, 0)

    def _remaining_by_class(self, rows: IndexArray) -> IntArray | None:
        counts = self.population.label_counts
        if counts is None or self._seen is None:
            return None
        remaining, left = self._available[rows], (counts - self._seen - self._resting_by_class)[rows]
        # labels that are not those a client reported (soft ones, say): its classes are spread as they were
        rng = np.random.default_rng([self._sampler.seed, self._epoch, self.replans])
        for i in np.flatnonzero((left < 0).any(axis=1) | (left.sum(axis=1) != remaining)):
            left[i] = round_to_sum(counts[rows[i]], int(remaining[i]), rng)
        return np.asarray(left)

    def admit(self, population: Population) -> None:
        """Let clients in that joined during the epoch.

        Parameters
        ----------
        population : Population
            The clients there were, and the new ones.
        """
        rows = np.searchsorted(population.client_ids, self.population.client_ids)
        cursors = Cursors(population.client_ids, seed=self._sampler.seed, epoch=self._cursors.epoch)
        cursors.used[rows] = self._cursors.used
        cursors.used_by_class = _moved(self._cursors.used_by_class, rows, len(population))
        classes = 0 if population.label_counts is None else population.label_counts.shape[1]
        self._resting_by_class = _moved(self._resting_by_class, rows, len(population), classes)
        if population.label_counts is not None and self._seen is not None:
            self._seen = _moved(self._seen, rows, len(population), classes)
        cursors.put_off = self._cursors.put_off
        planned, resting = np.zeros((2, len(population)), dtype=np.int64)
        planned[rows], resting[rows] = self._planned, self._resting
        self._cursors, self._planned, self._resting, self.population = cursors, planned, resting, population

    # --- checkpoints -------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """Return everything as numbers and arrays: who owes what, and the plan for the rest."""
        plan = self._plan.take(np.arange(self._next, len(self._plan)))
        return {
            "clients": self.population.client_ids,
            "sizes": self.population.sizes,
            "label_counts": self.population.label_counts,
            "replans": self.replans,
            "taken": self._taken,
            "outdated": self._outdated,
            "used": self._cursors.used,
            "used_by_class": self._cursors.used_by_class,
            "put_off": {client: [list(each) for each in moved] for client, moved in self._cursors.put_off.items()},
            "order": self._cursors.epoch,
            "resting": self._resting,
            "resting_by_class": self._resting_by_class,
            "seen": self._seen,
            "plan": {
                "offsets": plan.offsets,
                "clients": plan.clients,
                "quotas": plan.quotas,
                "class_quotas": plan.class_quotas,
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned, for the population that it was of."""
        population = self.population
        self.replans, self._taken = state["replans"], state["taken"]
        self._cursors = Cursors(population.client_ids, seed=self._sampler.seed, epoch=state["order"])
        self._cursors.used, self._cursors.used_by_class = state["used"], state["used_by_class"]
        self._cursors.put_off = {c: tuple(map(tuple, moved)) for c, moved in state["put_off"].items()}
        self._resting = np.array(state["resting"], dtype=np.int64)
        self._resting_by_class = np.array(state["resting_by_class"], dtype=np.int64)
        self._seen, self._outdated = state["seen"], state["outdated"]
        plan = self._plan = BatchPlan(Population(population.client_ids, population.sizes), **state["plan"])
        self._next, self._planned = 0, np.zeros(len(population), dtype=np.int64)
        np.add.at(self._planned, plan.rows(), plan.quotas)


def saved_population(state: Mapping[str, Any], now: Population) -> Population:
    """Return the population of an ledger's `state_dict`, without delays.

    Raises
    ------
    MembershipError
        If a client of it that is here now holds other data than it did.
    """
    then = Population(state["clients"], state["sizes"], state["label_counts"])
    for client, size in zip(now.client_ids, now.sizes, strict=True):
        held = then.sizes[then.client_ids == client]
        if held.size and held[0] != size:
            raise MembershipError(
                f"client {client} held {held[0]} examples when the checkpoint was written, now it holds {size}: "
                "give it the same data, or start anew"
            )
    return then


def part(step: PlanStep, clients: Mapping[int, object]) -> PlanStep:
    """Return what some of a step's clients contribute; the step itself, if these are all."""
    rows = np.flatnonzero([int(client) in clients for client in step.clients])
    if len(rows) == len(step.clients):
        return step
    quotas = None if step.class_quotas is None else step.class_quotas[rows]
    return replace(step, clients=step.clients[rows], quotas=step.quotas[rows], class_quotas=quotas)


def _bincount(labels: NDArray[Any], num_classes: int) -> IntArray:
    """Return the examples of each class, (C,); all 0 for labels that are no classes."""
    countable = labels.ndim == 1 and np.issubdtype(labels.dtype, np.integer)
    if not countable or (labels < 0).any() or (labels >= num_classes).any():
        return np.zeros(num_classes, dtype=np.int64)
    return np.bincount(labels, minlength=num_classes)


def _moved(table: IntArray, rows: IndexArray, length: int, width: int = 0) -> IntArray:
    """Return a table of `length` rows whose `rows` are those of `table`, and at least as wide as that."""
    result = np.zeros((length, max(width, table.shape[1])), dtype=np.int64)
    result[rows, : table.shape[1]] = table
    return result
