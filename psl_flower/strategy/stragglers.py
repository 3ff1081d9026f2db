"""How slow clients are in a run: what samplers plan with, what the virtual clock says, and who really waits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from psl_flower.batch_plan import PlanStep
from psl_flower.errors import ConfigError
from psl_flower.population import Population
from psl_flower.samplers.base import Sampler
from psl_flower.stragglers import DelayEstimator, DelayModel, VirtualClock
from psl_flower.strategy.attempt import Attempt


@dataclass
class Stragglers:
    """The delays of a run.

    Parameters
    ----------
    sampler : Sampler
    planned : DelayModel, optional
        What it plans with; a `DelayEstimator` measures.
    simulated : DelayModel, optional
        How slow clients are made to look.
    sleep : bool
        Whether they really wait.

    Raises
    ------
    ConfigError
        If a model is none, the sampler has none to plan with, or there is nothing to wait for.
    """

    sampler: Sampler
    planned: DelayModel | None = None
    simulated: DelayModel | None = None
    sleep: bool = False

    def __post_init__(self) -> None:
        for name, model in (("delays", self.planned), ("simulated_delays", self.simulated)):
            if model is not None and not callable(getattr(model, "delays", None)):
                raise ConfigError(f"{name} must be a delay model of psl_flower.stragglers, got {model!r:.80}")
        if self.sampler.needs_delays and self.planned is None:
            raise ConfigError(
                f"{type(self.sampler).__name__} plans with delays: pass delays=..., a model of psl_flower.stragglers, "
                "or DelayEstimator() to measure them"
            )
        if self.simulated is None and not isinstance(self.planned, DelayEstimator):
            self.simulated = self.planned
        if self.sleep and self.simulated is None:
            raise ConfigError("sleep=True needs simulated_delays to wait for")

    def settings(self) -> dict[str, Any]:
        """Return what of a run's settings is about delays, by the names of the strategy's arguments."""
        return {"delays": self.planned, "simulated_delays": self.simulated, "sleep": self.sleep}

    def known_of(self, population: Population) -> Population:
        """Return a population with the delays that a sampler plans with."""
        if self.planned is None:
            return population
        return replace(population, delays=self.planned.delays(population.client_ids))

    def clock(self, population: Population) -> VirtualClock | None:
        """Return the virtual clock of an epoch, where delays are simulated."""
        if self.simulated is None:
            return None
        return VirtualClock(population.client_ids, self.simulated.delays(population.client_ids))

    def admit(self, clock: VirtualClock | None, population: Population) -> None:
        """Have the clock know clients that joined."""
        if clock and self.simulated:
            clock.update(population.client_ids, self.simulated.delays(population.client_ids))

    def waits(self, clock: VirtualClock | None, step: PlanStep) -> dict[int, float]:
        """Return how many seconds each client of a step really waits."""
        if clock is None or not self.sleep:
            return {}
        times = clock.reply_times(step.clients, step.quotas)
        return dict(zip(step.clients.tolist(), times.tolist(), strict=True))

    def pass_time(self, clock: VirtualClock | None, step: PlanStep, attempt: Attempt) -> float | None:
        """Have the clock go on by a committed step; return its seconds, none for clients that did not have to be asked.

        Without a clock it is None.
        """
        if clock is None:
            return None
        asked = np.isin(step.clients, list(attempt.seconds))
        return clock.advance(step.clients[asked], step.quotas[asked]) if asked.any() else 0.0

    def measure(self, attempt: Attempt) -> None:
        """Let an estimator see how long each client worked on a committed step: its first and its last request."""
        if isinstance(self.planned, DelayEstimator):
            for client, count in attempt.counts().items():
                if client in attempt.seconds:  # it is not asked for what is kept of it
                    first, *more = attempt.seconds[client]
                    self.planned.observe(client, count, first + sum(more[-1:]))
