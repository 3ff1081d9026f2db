"""What an epoch still has to do: the plan for the clients at hand, made anew when it has to be.

Note [Planning anew]: the plan of a thousand clients may take seconds. So a step that came about without some client
does not change the plan: what it owes is a debt, to be collected with a later plan. That is due when a client of the
next step is absent; when the debts make a batch; and before the last step, which they are collected with, so that
no tiny batch is left over. The choice does not depend on the clock: a run that is resumed makes the same plans.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from psl_flower.errors import MembershipError
from psl_flower.protocol import WorkOrder
from psl_flower.samplers.base import BatchPlan, IntArray, PlanStep, Population, Sampler
from psl_flower.samplers.rounding import round_to_sum
from psl_flower.strategy.orders import Cursors

BoolArray = NDArray[np.bool_]


class Agenda:
    """The examples every client still owes an epoch, and the plan that collects them.

    A client owes what no committed step has used. When the plan at hand does no longer, the rest of the epoch is
    planned anew by the same sampler, for what the clients at hand owe; Note [Planning anew] says when. So a plan is a
    function of the seed, the epoch, how often it was planned anew, and what is owed; and every example of every client
    that can be reached is used exactly once.

    Parameters
    ----------
    sampler : Sampler
        Makes the plans.
    population : Population
        The epoch's clients with all they hold.
    epoch : int
        0-based.

    Raises
    ------
    ConfigError
        If the sampler cannot plan for this population.
    """

    def __init__(self, sampler: Sampler, population: Population, epoch: int) -> None:
        self._sampler, self._epoch = sampler, epoch
        self.population = population
        self.replans = 0
        self._cursors = Cursors(population.client_ids, seed=sampler.seed, epoch=epoch)
        counts = population.label_counts
        self._seen: IntArray | None = None if counts is None else np.zeros_like(counts)
        self._plan = sampler.plan(population, epoch)
        self._next = 0
        self._planned = population.sizes.copy()  # examples of each client in the rest of the plan

    # --- what is left ------------------------------------------------------------------------------------------------
    @property
    def owed(self) -> IntArray:
        """Examples that each client of the population still owes, (K,) int64."""
        return np.asarray(self.population.sizes - self._cursors.used)

    def owing(self) -> IntArray:
        """Return the ids of the clients that owe examples, ascending."""
        return np.asarray(self.population.client_ids[self.owed > 0])

    def steps_left(self) -> int:
        """Return how many steps are still to come, if no more are lost."""
        debts = int((self.owed - self._planned).sum())
        return len(self._plan) - self._next - (-debts // self._sampler.batch_size)

    # --- steps -------------------------------------------------------------------------------------------------------
    def step(self, clients: IntArray) -> PlanStep:
        """Return the next step with these clients, some of which must owe examples; it is next until it is `done`."""
        wanted = np.isin(self.population.client_ids, clients) & (self.owed > 0)
        if not self._will_do(wanted):
            self._replan(wanted)
        return self._plan[self._next]

    def _will_do(self, wanted: BoolArray) -> bool:
        """Return whether to go on with the plan at hand; Note [Planning anew]."""
        left = len(self._plan) - self._next
        if not left or not wanted[self._rows(self._plan[self._next])].all():
            return False
        debts = int((self.owed - self._planned)[wanted].sum())
        return debts < self._sampler.batch_size and not (debts and left == 1)

    def _rows(self, step: PlanStep) -> NDArray[np.intp]:
        return np.searchsorted(self.population.client_ids, step.clients)

    def orders(self, index: int, step: PlanStep) -> list[WorkOrder]:
        """Return the work orders of a step, the `index`-th of the epoch to be committed."""
        return self._cursors.orders(index, step)

    def done(self, step: PlanStep, labels: Mapping[int, NDArray[Any]]) -> None:
        """Count as used what came of the next step.

        Parameters
        ----------
        step : PlanStep
            Its clients that arrived, see `part`.
        labels : dict of int to (n,) array
            Those of their examples; read only where label counts are known and the step has no class quotas.
        """
        whole = self._plan[self._next]
        self._cursors.advance(step)
        self._next += 1
        self._planned[self._rows(whole)] -= whole.quotas
        if self._seen is not None:
            self._seen[self._rows(step)] += self._class_counts(step, labels)

    def _class_counts(self, step: PlanStep, labels: Mapping[int, NDArray[Any]]) -> IntArray:
        assert self._seen is not None
        if step.class_quotas is not None:
            return step.class_quotas
        return np.stack([_bincount(labels[int(k)], self._seen.shape[1]) for k in step.clients])

    # --- planning anew -----------------------------------------------------------------------------------------------
    def _replan(self, wanted: BoolArray) -> None:
        self.replans += 1
        people, rows = self.population, np.flatnonzero(wanted)
        rest = Population(
            people.client_ids[rows],
            self.owed[rows],
            self._owed_by_class(rows),
            None if people.delays is None else people.delays.take(rows),
        )
        self._plan = self._sampler.plan(rest, self._epoch, replan=self.replans)
        self._next, self._planned = 0, np.where(wanted, self.owed, 0)

    def _owed_by_class(self, rows: NDArray[np.intp]) -> IntArray | None:
        counts = self.population.label_counts
        if counts is None or self._seen is None:
            return None
        owed, left = self.owed[rows], (counts - self._seen)[rows]
        # labels that are not those a client reported (soft ones, say): its classes are spread as they were
        rng = np.random.default_rng([self._sampler.seed, self._epoch, self.replans])
        for i in np.flatnonzero((left < 0).any(axis=1) | (left.sum(axis=1) != owed)):
            left[i] = round_to_sum(counts[rows[i]], int(owed[i]), rng)
        return np.asarray(left)

    def admit(self, population: Population) -> None:
        """Let clients in that joined during the epoch.

        Parameters
        ----------
        population : Population
            The clients there were, and the new ones.
        """
        rows = np.searchsorted(population.client_ids, self.population.client_ids)
        cursors = Cursors(population.client_ids, seed=self._sampler.seed, epoch=self._epoch)
        cursors.used[rows] = self._cursors.used
        cursors.used_by_class = _moved(self._cursors.used_by_class, rows, len(population))
        if population.label_counts is not None and self._seen is not None:
            more = population.label_counts.shape[1] - self._seen.shape[1]
            self._seen = _moved(np.pad(self._seen, ((0, 0), (0, max(0, more)))), rows, len(population))
        planned = np.zeros(len(population), dtype=np.int64)
        planned[rows] = self._planned
        self._cursors, self._planned, self.population = cursors, planned, population

    # --- checkpoints -------------------------------------------------------------------------------------------------
    def state(self) -> dict[str, Any]:
        """Return everything as numbers and arrays: who owes what, and the plan for the rest."""
        first, plan = int(self._plan.offsets[self._next]), self._plan
        return {
            "clients": self.population.client_ids,
            "sizes": self.population.sizes,
            "label_counts": self.population.label_counts,
            "replans": self.replans,
            "used": self._cursors.used,
            "used_by_class": self._cursors.used_by_class,
            "seen": self._seen,
            "planned": self._planned,
            "plan": {
                "offsets": plan.offsets[self._next :] - first,
                "clients": plan.clients[first:],
                "quotas": plan.quotas[first:],
                "class_quotas": None if plan.class_quotas is None else plan.class_quotas[first:],
            },
        }

    @classmethod
    def restored(cls, sampler: Sampler, population: Population, epoch: int, state: Mapping[str, Any]) -> Agenda:
        """Return the agenda that `state` described.

        Parameters
        ----------
        sampler, population, epoch
            As for a new one; `population` must be that of `saved_population`, but for the delays.
        """
        agenda = cls.__new__(cls)
        agenda._sampler, agenda._epoch, agenda.population = sampler, epoch, population
        agenda.replans = state["replans"]
        agenda._cursors = Cursors(population.client_ids, seed=sampler.seed, epoch=epoch)
        agenda._cursors.used, agenda._cursors.used_by_class = state["used"], state["used_by_class"]
        agenda._seen = state["seen"]
        agenda._planned = state["planned"]
        plan = state["plan"]
        rest = Population(population.client_ids, population.sizes)
        agenda._plan = BatchPlan(rest, plan["offsets"], plan["clients"], plan["quotas"], plan["class_quotas"])
        agenda._next = 0
        return agenda


def saved_population(state: Mapping[str, Any], now: Population) -> Population:
    """Return the population of an agenda's `state`, without delays.

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


def _moved(table: IntArray, rows: NDArray[np.intp], length: int) -> IntArray:
    """Return a table of `length` rows whose `rows` are those of `table`."""
    result = np.zeros((length, table.shape[1]), dtype=np.int64)
    result[rows] = table
    return result
