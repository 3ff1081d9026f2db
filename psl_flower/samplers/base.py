"""The base class of all samplers: it checks what is asked for, a subclass makes the plan."""

from __future__ import annotations

import copy
import inspect
from abc import ABC, abstractmethod

import numpy as np

from psl_flower.batch_plan import BatchPlan
from psl_flower.checks import check_int
from psl_flower.errors import ConfigError
from psl_flower.population import Population

# In what order a sampler may give the steps of a finished schedule.
ORDERS = ("shuffled", "natural")

# Note [Sampler streams]: numpy's SeedSequence pads short entropy with zeros, so ``default_rng([seed, epoch])`` and the
# ``default_rng([seed, epoch, 0])`` that orders client 0's examples would be ONE stream. A spawn key keeps them apart.
_SAMPLER_STREAM = 1


def epoch_rng(seed: int, epoch: int, replan: int = 0) -> np.random.Generator:
    """Return the generator a sampler uses for an epoch's plan, independent of every client's order of examples.

    Every new plan for the rest of the epoch (`replan` 1, 2, ...) has a stream of its own.
    """
    key = (_SAMPLER_STREAM, replan) if replan else (_SAMPLER_STREAM,)
    return np.random.default_rng(np.random.SeedSequence([seed, epoch], spawn_key=key))


class Sampler(ABC):
    """Base of all samplers: decides how many examples each client contributes to each step of an epoch.

    Parameters
    ----------
    batch_size : int
        Global batch size B, at least 1.
    seed : int
        Not negative, of 63 bits at most. A plan is a function of (seed, epoch, replan, population) alone.

    Attributes
    ----------
    needs_label_counts : bool
        Whether `Population.label_counts` must be given; clients are asked for them only then.
    needs_delays : bool
        Whether `Population.delays` must be given.
    clients_draw : bool
        Whether clients draw anew for each step which examples they contribute, and a plan says how many only. Then it
        need not use each once: what an epoch owes are its steps.

    Raises
    ------
    ConfigError
        If an argument is out of range.
    """

    needs_label_counts: bool = False
    needs_delays: bool = False
    clients_draw: bool = False

    def __init__(self, batch_size: int, *, seed: int = 0) -> None:
        self.batch_size = check_int(batch_size, "batch_size", least=1)
        self.seed = check_int(seed, "seed", least=0, most=2**63 - 1)

    def plan(self, population: Population, epoch: int = 0, *, replan: int = 0) -> BatchPlan:
        """Make the plan of one epoch: every example of every client exactly once, unless `clients_draw`.

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
        options = inspect.signature(type(self).__init__).parameters
        told = [f"{name}={getattr(self, name)!r}" for name in options if hasattr(self, name)]
        return f"{type(self).__name__}({', '.join(told)})"
