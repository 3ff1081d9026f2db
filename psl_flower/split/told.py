"""What one side of a cut tells the other of a tensor that stays there: its sizes, its dtype.

Only tensors with a row an example cross. So it crosses as the sizes of one without values.
"""

from __future__ import annotations

import torch

from psl_flower.errors import CutError
from psl_flower.split.refused import BY_HAND

_DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.complex128]
_DTYPES += [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]


def tell_sizes(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """Return a tensor that tells the sizes of another, (rows, ...), as (rows, 0, ...).

    Raises
    ------
    CutError
        If that has no rows.
    """
    return _checked(tensor, name).unsqueeze(1).narrow(1, 0, 0).bool()


def told_sizes(shape: torch.Size) -> torch.Size:
    """Return what `tell_sizes` tells by its shape."""
    return shape[:1] + shape[2:]


def tell_dtype(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """Return a tensor that tells the dtype of another by its last size.

    Raises
    ------
    CutError
        If that has no rows.
    """
    return _checked(tensor, name).new_empty((len(tensor), 0, _DTYPES.index(tensor.dtype)), dtype=torch.bool)


def told_dtype(shape: torch.Size) -> torch.dtype:
    """Return what `tell_dtype` tells by its shape."""
    return _DTYPES[shape[2]]


def _checked(tensor: torch.Tensor, name: str) -> torch.Tensor:
    if not tensor.dim():
        raise CutError(
            f"{name} is a single number, and its number of dimensions, or its dtype, would have to cross the cut, "
            f"which all that crosses does with a row an example: ask for it before the cut, cut elsewhere, or "
            f"{BY_HAND}"
        )
    return tensor
