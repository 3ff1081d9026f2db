"""What all algorithms have in common: they order the batches, and decide what happens to the weights between them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from psl_flower.app.task import cut_of, make_optimizer
from psl_flower.experiments.data import Data
from psl_flower.experiments.schedule import Schedule, client_turns
from psl_flower.experiments.setting import Setting
from psl_flower.samplers.base import Delays, FloatArray, Population
from psl_flower.split import cut_model
from psl_flower.stragglers import step_times


@dataclass(frozen=True, eq=False)
class Task:
    """What an algorithm is given to learn.

    Parameters
    ----------
    setting : Setting
    data : Data
    model : nn.Module
        The whole model, where it is trained; changed in place.
    """

    setting: Setting
    data: Data
    model: nn.Module

    @cached_property
    def delays(self) -> Delays | None:
        """The clients' simulated delays, by client id."""
        model = self.setting.config.make_delays()[1]
        return None if model is None else model.delays(range(len(self.data.shares)))

    @cached_property
    def population(self) -> Population:
        """The clients, with their delays."""
        people = self.data.population()
        return Population(people.client_ids, people.sizes, people.label_counts, self.delays)

    def client_half(self) -> set[str]:
        """Return the names of the client half's parameters and buffers."""
        return set(cut_model(self.model, cut_of(self.setting.config)).client.state_dict())

    def make_optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """Make the configured optimizer over those of the parameters that are trained."""
        return make_optimizer(self.setting.config, [p for p in parameters if p.requires_grad])

    def turns(self, epoch: int, clients: Iterable[int]) -> Schedule:
        """Let clients take turns, as configured."""
        setting = self.setting
        return client_turns(
            self.population,
            self.data.shares,
            clients,
            batch_size=setting.batch_size_of_clients,
            local_epochs=setting.local_epochs,
            seed=setting.config.seed,
            epoch=epoch,
        )


class Algorithm(ABC):
    """An algorithm, as what it does between the steps of a round; a step is one update of the weights on one batch.

    The one who trains asks for the round's `schedule`, and calls `before`, computes the gradients of the batch's mean
    loss, steps all `optimizers` and calls `after`, step by step; then `end_round`.

    Parameters
    ----------
    task : Task
        What to learn.

    Attributes
    ----------
    optimizers : list of torch.optim.Optimizer
        Over all parameters together.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        self.optimizers = [task.make_optimizer(task.model.parameters())]

    @abstractmethod
    def schedule(self, epoch: int) -> Schedule:
        """Return the batches of a round, 0-based."""

    def before(self, step: int) -> None:  # noqa: B027 (most have nothing to do)
        """Get ready for a step."""

    def after(self, step: int) -> None:  # noqa: B027 (most have nothing to do)
        """Finish a step."""

    def end_round(self) -> None:  # noqa: B027 (most have nothing to do)
        """Finish the round: the model then is the one to evaluate."""

    def seconds(self, schedule: Schedule) -> tuple[FloatArray | None, float | None]:
        """Return the simulated seconds of every step, (T,), and of the round; None where they are not defined.

        Unless it says otherwise, one step waits for the one before and takes as long as its slowest participant
        (METHOD section 1): a round is the sum.
        """
        if self.task.delays is None:
            return None, None
        seconds = step_times(schedule.plan, schedule.plan.population.delays)
        return seconds, float(seconds.sum())

    def state(self) -> dict[str, Any]:
        """Return the model's state dict: the very tensors."""
        return self.task.model.state_dict()
