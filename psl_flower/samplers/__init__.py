"""Batch quotas: who contributes how many examples to each step (pure numpy, no transport)."""

from psl_flower.batch_plan import BatchPlan, PlanStep
from psl_flower.population import Delays, Population
from psl_flower.samplers.aligned import AlignedSampler
from psl_flower.samplers.base import Sampler
from psl_flower.samplers.dirichlet import LatentDirichletSampler
from psl_flower.samplers.fixed import FixedLocalSampler, FixedProportionalSampler
from psl_flower.samplers.latency import LatencyBudgetedSampler
from psl_flower.samplers.poisson import PoissonGlobalSampler
from psl_flower.samplers.registry import make_sampler
from psl_flower.samplers.rounding import round_to_sum
from psl_flower.samplers.uniform import UniformGlobalSampler

__all__ = [
    "AlignedSampler",
    "BatchPlan",
    "Delays",
    "FixedLocalSampler",
    "FixedProportionalSampler",
    "LatencyBudgetedSampler",
    "LatentDirichletSampler",
    "PlanStep",
    "PoissonGlobalSampler",
    "Population",
    "Sampler",
    "UniformGlobalSampler",
    "make_sampler",
    "round_to_sum",
]
