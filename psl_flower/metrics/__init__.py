"""What is measured of batches and steps (pure numpy)."""

from psl_flower.metrics.bounds import schedule_lower_bound, serfling_bound
from psl_flower.metrics.deviation import (
    DeviationSummary,
    batch_deviation,
    client_mix_deviation,
    summarize_deviation,
)
from psl_flower.metrics.simulate import draw_class_counts
from psl_flower.metrics.starvation import StarvedClass, starved_classes

__all__ = [
    "DeviationSummary",
    "StarvedClass",
    "batch_deviation",
    "client_mix_deviation",
    "draw_class_counts",
    "schedule_lower_bound",
    "serfling_bound",
    "starved_classes",
    "summarize_deviation",
]
