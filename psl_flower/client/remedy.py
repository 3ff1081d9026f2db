"""What to do about inputs that the first part of a model cannot take; torch says what went wrong only."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from psl_flower import tree
from psl_flower.tree import Tree


def remedy(module: nn.Module, inputs: Tree, error: Exception) -> str:
    """Return what may be done about inputs that a part failed on, to be put behind what it says; "" if that is unknown.

    Parameters
    ----------
    module : nn.Module
        The part.
    inputs : tree
        What it was given. Of their values nothing is told.
    error : Exception
        What it raised.
    """
    held: dict[Any, None] = dict.fromkeys(p.dtype for p in module.parameters() if p.is_floating_point())
    given = {leaf.dtype for leaf in tree.leaves(inputs)}
    rows = [each.num_embeddings for each in module.modules() if isinstance(each, nn.Embedding | nn.EmbeddingBag)]
    if len(held) != 1:
        return ""
    (own,), how = held, "in a transform, or where data_fn makes them"
    whole = {dtype for dtype in given if not (dtype.is_floating_point or dtype.is_complex)}
    if isinstance(error, IndexError) and rows and whole:
        return f"; an embedding has {min(rows)} rows, so its tokens must be from 0 to {min(rows) - 1}"
    if "indices" in str(error) and rows and not whole:
        return f"; an embedding takes whole numbers: x.long(), {how}"
    if "type" not in str(error):
        return ""
    if others := given - whole - {own}:
        return f"; the weights are {own}, the inputs {_listed(others)}: x.to({own}), {how}"
    if whole and not rows:
        return f"; the weights are {own}, the inputs {_listed(whole)}: x.to({own}), for pixels x.to({own}) / 255, {how}"
    return ""


def _listed(dtypes: set[torch.dtype]) -> str:
    return ", ".join(sorted(map(str, dtypes)))
