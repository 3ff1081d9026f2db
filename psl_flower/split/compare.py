"""What it takes to compare what a function makes of the rows of a batch."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from psl_flower.devices import numpy_words

# The share of integers and booleans that may differ.
_TURNED = 1e-3


class CannotTellError(Exception):
    """The batch does not show whether examples are treated one by one."""


def alike(inputs: Any) -> bool:
    """Return whether all rows of a batch are the same."""
    return all(same(leaf, leaf[:1].expand_as(leaf)) for leaf in tensors(inputs) if leaf.dim())


def same(one: Tensor, other: Tensor, eps: float = 0.0) -> bool:
    """Return whether two tensors are equal, but for rounding, to `eps` if it was coarser; NaN equals NaN."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not one.numel():
        return True
    if not (one.is_floating_point() or one.is_complex()):
        # rounding turns a comparison or an argmax over here and there, mixing turns over many
        return (one != other).double().mean().item() <= _TURNED
    largest = max(part.abs().nan_to_num(0.0, 0.0, 0.0).max().item() for part in (one, other))
    # rounding is some multiples of eps, what batch statistics do is far above its root
    return torch.allclose(
        one, other, rtol=0.0, atol=max(eps, torch.finfo(one.dtype).eps) ** 0.5 * largest, equal_nan=True
    )


def tensors(tree: Any) -> list[Tensor]:
    """Return the tensors of a tree."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def pick_rows(tree: Any, index: int | Tensor | None = None, rows: int = 0) -> Any:
    """Return a copy of a batch, because code may change it in place, or of some rows of it."""
    if isinstance(index, int):
        index = torch.tensor([index])

    def pick(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf[index].clone() if index is not None and leaf.dim() and len(leaf) == rows else leaf.clone()

    return tree_map(pick, tree)


class Dice:
    """The global generators of Python, numpy and torch, on the CPU and a batch's device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def state(self) -> tuple[Any, ...]:
        """Return their states, only to compare them."""
        states = [torch.get_rng_state()]
        if self._device.type == "cuda":
            states.append(torch.cuda.get_rng_state(self._device))
        return random.getstate(), numpy_words(), *(s.numpy().tobytes() for s in states)
