"""Batch quotas: who contributes how many examples to each step (pure numpy, no transport)."""

from psl_flower.samplers.base import BatchPlan, Delays, PlanStep, Population, Sampler

__all__ = ["BatchPlan", "Delays", "PlanStep", "Population", "Sampler"]
