"""What is measured of batches and steps (pure numpy)."""

from psl_flower.metrics.deviation import (
    DeviationSummary,
    batch_deviation,
    client_mix_deviation,
    summarize_deviation,
)

__all__ = ["DeviationSummary", "batch_deviation", "client_mix_deviation", "summarize_deviation"]
