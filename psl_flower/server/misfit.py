"""What cross-entropies cannot take, or take for something else than is meant, and the remedy.

Torch says it in words of its own, or not at all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from psl_flower.server.metrics import is_integer

_LOOKED_AT = 8  # rows that tell logits from probabilities


def cross_entropy_misfit(
    name: str, outputs: Any, labels: Any, weight: Tensor | None, *, whole: bool = True
) -> str | None:
    """Return the rule that is broken, what was found, and the remedy; None where nothing is known to be wrong.

    Parameters
    ----------
    name : str
        "cross_entropy" or "nll_loss".
    outputs, labels, weight
        What it is given.
    whole : bool
        Whether the outputs are all that the model gives: over a part of them, one class may be what is meant.
    """
    if outputs is None:
        return f"{name} needs outputs, but the model returns None: is a return statement missing in its forward?"
    if not isinstance(outputs, Tensor) or not isinstance(labels, Tensor):
        return (
            f"{name} compares one tensor of outputs with one of labels, but outputs are {_kind(outputs)} and labels "
            f"{_kind(labels)}: pick them, as in loss=lambda outputs, labels: cross_entropy(outputs[0], labels)"
        )
    found = f"outputs are {_spec(outputs)} and labels {_spec(labels)}"
    if is_integer(outputs):
        return f"{name} cannot take these: {found}. Return a number a class (logits), not the class, and outputs first"
    if outputs.ndim < 2:
        return None
    remedy, classes = None, outputs.shape[1]
    other = weight is not None and weight.dtype != outputs.dtype and not torch.is_autocast_enabled(outputs.device.type)
    if weight is not None and (other or tuple(weight.shape) != (classes,)):
        found += f", class weights {_spec(weight)}"
        remedy = (
            f"give it a weight for each of the {classes} classes, of the outputs' dtype: weight.to({outputs.dtype})"
        )
    elif name == "cross_entropy" and classes == 1 and whole:
        remedy = (
            "over one class it is 0, whatever the output is: for numbers pass loss=torch.nn.functional.mse_loss, for "
            "two classes binary_cross_entropy_with_logits, and classification=False"
        )
    elif labels.shape == outputs.shape:
        if not labels.is_floating_point():
            remedy = "one-hot labels must be floating-point, labels.float(), or class indices, labels.argmax(1)"
    elif tuple(labels.shape) == (outputs.shape[0], 1, *outputs.shape[2:]):
        remedy = "class indices have no dimension of their own: labels.squeeze(1)" + _made_whole(labels)
    elif not is_integer(labels):
        remedy = "class indices must be integers" + _made_whole(labels)
    return None if remedy is None else f"{name} cannot take these: {found}. {remedy[0].upper()}{remedy[1:]}"


def binary_misfit(name: str, outputs: Any, labels: Any) -> str | None:
    """Return why a binary cross-entropy has failed, what was found, and the remedy; None where that is not known.

    Parameters
    ----------
    name : str
        "binary_cross_entropy" or "binary_cross_entropy_with_logits".
    outputs, labels
        What it was given.
    """
    if not isinstance(outputs, Tensor) or not isinstance(labels, Tensor):
        return None
    if outputs.shape != labels.shape:
        both = outputs.numel() == labels.numel() and (outputs.ndim, labels.ndim) == (2, 1)
        remedy = "Give both one shape: " + ("labels[:, None], or outputs.squeeze(1)" if both else "a label an output")
    elif labels.dtype != outputs.dtype:
        remedy = f"Labels must be of the outputs' dtype: labels.to({outputs.dtype})"
    elif not _within(outputs):
        remedy = f"It takes probabilities, from 0 to 1: outputs.sigmoid(), or take {name}_with_logits"
    else:
        return None
    return f"{name} cannot take these: outputs are {_spec(outputs)} and labels {_spec(labels)}. {remedy}"


def remark(name: str, outputs: Any, labels: Any) -> str | None:
    """Return what is seldom meant of what a cross-entropy has taken; None where nothing is.

    Parameters
    ----------
    name : str
        "cross_entropy", "nll_loss" or "binary_cross_entropy_with_logits".
    outputs, labels
        What it was given.
    """
    if name == "binary_cross_entropy_with_logits":
        return None if _within(labels) else f"{name} is for labels from 0 to 1, and there are others"
    rows = outputs.detach()[:_LOOKED_AT]
    if len(rows) < 2 or rows.ndim < 2:
        return None
    if name == "nll_loss" and bool((rows > 0).any()):
        return "nll_loss takes log-probabilities, and there are outputs above 0: take cross_entropy"
    sums = rows.sum(1)
    if name == "cross_entropy" and _within(rows) and torch.allclose(sums, torch.ones_like(sums), atol=1e-3):
        return "cross_entropy takes logits, and the outputs are probabilities: leave out the model's softmax"
    return None


def _within(tensor: Tensor) -> bool:
    """Return whether all numbers are from 0 to 1."""
    return bool(((tensor >= 0) & (tensor <= 1)).all())


def _made_whole(labels: Tensor) -> str:
    return "" if is_integer(labels) else ", labels.long()"


def _spec(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return _spec(value)
    return f"a {type(value).__name__}" + (f" of {len(value)}" if isinstance(value, tuple | list | dict) else "")
