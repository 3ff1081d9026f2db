"""Cutting a model in two: by name with torch.fx, by hand, and keeping batch statistics out of the client half."""

from psl_flower.split.cut import cut_candidates, split_module
from psl_flower.split.model import Halves, SplitModel, cut_model
from psl_flower.split.norm import batch_statistics_layers, check_client_half, replace_batch_norm

__all__ = [
    "Halves",
    "SplitModel",
    "batch_statistics_layers",
    "check_client_half",
    "cut_candidates",
    "cut_model",
    "replace_batch_norm",
    "split_module",
]
