"""Cutting a model in two or three, by name with torch.fx or by hand; keeping batch statistics off the clients."""

from psl_flower.split.compare import CannotTellError
from psl_flower.split.cut import cut_candidates, split_module
from psl_flower.split.half import input_names, told_frozen
from psl_flower.split.lengths import most_positions, shortened, text_length
from psl_flower.split.model import Halves, SplitModel, cut_model
from psl_flower.split.norm import batch_statistics_layers, check_client_half, replace_batch_norm
from psl_flower.split.place import Cut
from psl_flower.split.programs import export_halves
from psl_flower.split.rowwise import find_mixing
from psl_flower.split.signature import difference, doubt, signature

__all__ = [
    "CannotTellError",
    "Cut",
    "Halves",
    "SplitModel",
    "batch_statistics_layers",
    "check_client_half",
    "cut_candidates",
    "cut_model",
    "difference",
    "doubt",
    "export_halves",
    "find_mixing",
    "input_names",
    "most_positions",
    "replace_batch_norm",
    "shortened",
    "signature",
    "split_module",
    "text_length",
    "told_frozen",
]
