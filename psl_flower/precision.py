"""In which precision the parts of a model compute, on the server and on the clients alike."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from psl_flower import tree
from psl_flower.checks import check_choice
from psl_flower.errors import ConfigError
from psl_flower.tree import Tree

FULL, BF16 = "full", "bf16"
PRECISIONS = (FULL, BF16)


def computing(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """Return what forward passes and losses run in: nothing, or ``torch.autocast`` to bfloat16.

    Backward passes run outside of it, in the dtype that the forward pass has chosen.
    """
    return torch.autocast(device.type, torch.bfloat16) if precision == BF16 else nullcontext()


def widened(inputs: Tree, precision: str = BF16) -> Tree:
    """Return what a part takes as it takes it in full precision: what crossed a cut in bfloat16, in float32.

    So are outputs that users' code takes, as numpy knows no bfloat16.
    """
    if precision != BF16:
        return inputs
    return tree.map_leaves(lambda t: t.float() if t.dtype is torch.bfloat16 else t, inputs)


def check_precision(precision: Any, parts: Iterable[nn.Module]) -> str:
    """Return a precision in which a model can train.

    Raises
    ------
    ConfigError
        If it is none, needs gradients to be scaled, or would change nothing.
    """
    if str(precision) in ("fp16", "float16", "16-mixed", "torch.float16"):
        raise ConfigError(
            f"precision {str(precision)!r} needs the loss to be scaled, for gradients below 6e-8 are zero in float16: "
            "take 'bf16', which has the range of float32 and needs no scaling"
        )
    chosen = check_choice(precision, "precision", PRECISIONS)
    held = {p.dtype for part in parts for p in part.parameters()}
    if chosen == BF16 and torch.float32 not in held:
        shown = ", ".join(sorted(map(str, held)))
        raise ConfigError(f"precision 'bf16' is for weights in float32, those of this model are {shown}: leave it out")
    return chosen
