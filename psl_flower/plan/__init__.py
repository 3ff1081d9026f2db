"""Look before running (``psl-flower plan``): what an epoch would be like under each sampler, untrained."""

from psl_flower.plan.measure import Epoch, Summary, plan_epoch, summarize_epochs
from psl_flower.plan.picture import save_picture
from psl_flower.plan.population import balanced_labels, read_labels, read_population, split_labels
from psl_flower.plan.table import format_table

__all__ = [
    "Epoch",
    "Summary",
    "balanced_labels",
    "format_table",
    "plan_epoch",
    "read_labels",
    "read_population",
    "save_picture",
    "split_labels",
    "summarize_epochs",
]
