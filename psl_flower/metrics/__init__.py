"""What is measured of batches and steps (pure numpy)."""

from psl_flower.metrics.bounds import schedule_lower_bound, serfling_bound
from psl_flower.metrics.deviation import (
    DeviationSummary,
    batch_deviation,
    client_mix_deviation,
    summarize_deviation,
)

__all__ = [
    "DeviationSummary",
    "batch_deviation",
    "client_mix_deviation",
    "schedule_lower_bound",
    "serfling_bound",
    "summarize_deviation",
]
