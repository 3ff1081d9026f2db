"""What remains of an epoch whose steps clients draw by chance: steps, each of which comes once, whoever is there."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from psl_flower.batch_plan import PlanStep
from psl_flower.population import Population
from psl_flower.protocol import Orders
from psl_flower.samplers.base import Sampler
from psl_flower.strategy.ledger import EpochLedger, part
from psl_flower.typing import IntArray

_NAMES = 62  # bits of what names an epoch's draws


class DrawnLedger(EpochLedger):
    """The steps that remain of an epoch, for a sampler whose `clients_draw`.

    What a client does not give to a step it gives to no other: it lapses. Made up for later, or in another order of
    steps, an example would be in some steps with a larger probability than it was planned with.
    """

    def __init__(
        self,
        sampler: Sampler,
        population: Population,
        epoch: int,
        state: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(sampler, population, epoch, state, **options)
        if state is None:
            self._drawing = secrets.randbits(_NAMES)  # of this epoch of this run alone: no draw is made twice
            self._lapsed = np.zeros(len(population), dtype=np.int64)
            self._planned = np.zeros(len(population), dtype=np.int64)
            np.add.at(self._planned, np.searchsorted(population.client_ids, self._plan.clients), self._plan.quotas)

    @property
    def remaining(self) -> IntArray:
        """Examples of each client in steps to come, and in those that it was not there for, (K,) int64."""
        return np.asarray(self._planned + self._lapsed)

    def unfinished(self) -> IntArray:
        """Return the ids of the clients with data while there are steps to come, ascending."""
        return self.population.client_ids[(self.population.sizes > 0) & (self._next < len(self._plan))]

    def steps_left(self) -> int:
        """Return the number of steps still to come."""
        return len(self._plan) - self._next

    def step(self, clients: IntArray) -> PlanStep:
        """Return what these clients contribute to the next step; nobody, perhaps."""
        step = part(self._plan[self._next], dict.fromkeys(clients.tolist()))
        sizes = self.population.sizes[np.searchsorted(self.population.client_ids, step.clients)]
        quotas = np.minimum(step.quotas, sizes)  # it may turn out that not all can be read
        return PlanStep(step.clients[quotas > 0], quotas[quotas > 0])

    def orders(self, index: int, step: PlanStep, left_out: Mapping[int, tuple[int, ...]] | None = None) -> Orders:
        """Return the work orders of the next step, whose number is that in the plan, whatever the `index`.

        Were only those that examples are in counted, clients would see which were empty.
        """
        return replace(super().orders(self._taken, step, left_out), drawing=self._drawing)

    def round_orders(self, index: int, clients: IntArray, *, over: bool) -> Orders:
        """Return orders for what comes before or after the steps; see `EpochLedger`, and `orders` for the number."""
        return super().round_orders(self._taken, clients, over=over)

    def done(self, step: PlanStep, labels: Mapping[int, NDArray[Any]], *, committed: bool = True) -> None:
        """Count what came of the next step as used, and what did not as lapsed."""
        ids, whole = self.population.client_ids, self._plan[self._next]
        self._lapsed[np.searchsorted(ids, whole.clients)] += whole.quotas
        self._lapsed[np.searchsorted(ids, step.clients)] -= step.quotas
        super().done(step, labels, committed=committed)

    def admit(self, population: Population) -> None:
        """Let clients in that joined during the epoch: from the next on, its steps are drawn."""
        rows, before = np.searchsorted(population.client_ids, self.population.client_ids), self._lapsed
        super().admit(population)
        self._lapsed = np.zeros(len(population), dtype=np.int64)
        self._lapsed[rows] = before

    def state_dict(self) -> dict[str, Any]:
        """Return everything as numbers and arrays."""
        return {**super().state_dict(), "drawing": self._drawing, "lapsed": self._lapsed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned, for the population that it was of."""
        super().load_state_dict(state)
        self._drawing, self._lapsed = state["drawing"], np.array(state["lapsed"], dtype=np.int64)


def open_ledger(sampler: Sampler, *arguments: Any, **options: Any) -> EpochLedger:
    """Return the ledger of an epoch; see `EpochLedger` for what it is given."""
    return (DrawnLedger if sampler.clients_draw else EpochLedger)(sampler, *arguments, **options)
