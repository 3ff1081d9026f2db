"""What all algorithms have in common: they order the batches, and decide what happens to the weights between them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import nn

from psl_flower.app.task import make_optimizer
from psl_flower.experiments.data import Data
from psl_flower.experiments.schedule import Schedule, client_turns
from psl_flower.experiments.setting import Setting
from psl_flower.stragglers import step_times
from psl_flower.typing import FloatArray


class Algorithm(ABC):
    """An algorithm, as what it does between the steps of a round; a step is one update of the weights on one batch.

    The one who trains asks for the round's `schedule`; for every step calls `before`, computes the gradients of the
    batch's mean loss, steps all `optimizers` and calls `after`; then `end_round`.

    Parameters
    ----------
    setting : Setting
    data : Data
    model : nn.Module
        The whole model, where it is trained; changed in place.

    Attributes
    ----------
    optimizers : list of torch.optim.Optimizer
        Over all parameters together.
    population : Population
        The clients, with their simulated delays.
    """

    def __init__(self, setting: Setting, data: Data, model: nn.Module) -> None:
        self.setting, self.data, self.model = setting, data, model
        self.optimizers = [self.make_optimizer(model.parameters())]
        population, delays = data.population(), setting.config.make_delays()[1]
        self.delays = None if delays is None else delays.delays(population.client_ids)
        self.population = replace(population, delays=self.delays)

    @abstractmethod
    def schedule(self, epoch: int) -> Schedule:
        """Return the batches of a round, 0-based."""

    def before(self, step: int) -> None:  # noqa: B027 (most have nothing to do)
        """Get ready for a step."""

    def after(self, step: int) -> None:  # noqa: B027
        """Finish a step."""

    def end_round(self) -> None:  # noqa: B027
        """Finish the round: the model then is the one to evaluate."""

    def seconds(self, schedule: Schedule) -> tuple[FloatArray | None, float | None]:
        """Return the simulated seconds of every step, (T,), and of the round; None where they are not defined.

        Unless an algorithm says otherwise, each step waits for the one before and takes as long as its slowest
        participant (docs/method.md, 1): a round is the sum.
        """
        if self.delays is None:
            return None, None
        seconds = step_times(schedule.plan)
        return seconds, float(seconds.sum())

    # --- for subclasses ----------------------------------------------------------------------------------------------
    def make_optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """Make the configured optimizer over those of the parameters that are trained."""
        return make_optimizer(self.setting.config, [p for p in parameters if p.requires_grad])

    def turns(self, epoch: int, clients: Iterable[int]) -> Schedule:
        """Let clients train one after another on batches of their own."""
        return client_turns(
            self.population,
            self.data.shares,
            clients,
            batch_size=self.setting.batch_size_of_clients,
            local_epochs=self.setting.local_epochs,
            seed=self.setting.config.seed,
            epoch=epoch,
        )
