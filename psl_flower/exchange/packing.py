"""Activations of which clients tell little, in as many bytes as that takes: few entries, or few levels.

A client that drops or rounds what leaves it says so with the rows (``Leaf.packing``), and they travel as

- sparse: a bit an entry, whether it is other than zero, and those that are;
- levels: a scale a row, and for each entry a whole number of few bits that it is multiplied with.

It is exact: whether it gives the same numbers is tried before, and whether it is less. If not, they go as they are.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from psl_flower.errors import ProtocolError

SPARSE, LEVELS = "sparse", "levels"
MAX_BITS = 16
_AT_ONCE = 2**20  # entries whose bits are held side by side; a multiple of 8
_WHOLE = {torch.float32: torch.int32, torch.float64: torch.int64}  # of as many bytes

Packed = tuple[dict[str, object], list[Tensor]]


def packed(tensor: Tensor, bits: int) -> Packed | None:
    """Return how rows travel, and in which tensors; None where that would be no less, or other numbers.

    Parameters
    ----------
    tensor : (n, ...) Tensor
        Of float32 or float64, on the CPU.
    bits : int
        Of an entry, at most `MAX_BITS`; 0 for few entries.
    """
    rows = tensor.reshape(len(tensor), -1)
    found = _levels(rows, bits) if bits else _sparse(rows)
    if found is None or sum(t.nbytes for t in found[1]) >= tensor.nbytes:
        return None
    return found


def unpack_sparse(dtype: torch.dtype, shape: tuple[int, ...], mask: Tensor, values: Tensor) -> Tensor:
    """Return the tensor of a mask, (ceil(n / 8),) uint8, and the values that it names.

    Raises
    ------
    ProtocolError
        If they do not fit each other.
    """
    there = torch.from_numpy(np.unpackbits(mask.numpy(), count=math.prod(shape)).astype(np.bool_))
    if int(there.sum()) != len(values):
        raise ProtocolError(f"a sparse tensor names {int(there.sum())} entries, got {len(values)}")
    flat = torch.zeros(len(there), dtype=dtype)
    flat[there] = values
    return flat.reshape(shape)


def unpack_levels(dtype: torch.dtype, shape: tuple[int, ...], bits: int, codes: Tensor, scales: Tensor) -> Tensor:
    """Return the tensor of codes, (ceil(n bits / 8),) uint8, and the scale of each row, (rows, 1)."""
    numbers = torch.empty(math.prod(shape), dtype=dtype)
    worth = 1 << np.arange(bits, dtype=np.int32)
    for begin in range(0, len(numbers), _AT_ONCE):
        some = numbers[begin : begin + _AT_ONCE]
        packed_some = codes.numpy()[num_mask_bytes(begin, bits) : num_mask_bytes(begin + len(some), bits)]
        table = np.unpackbits(packed_some, count=len(some) * bits).reshape(len(some), bits)
        some.copy_(torch.from_numpy(table @ worth - _half(bits)))
    return (numbers.reshape(len(scales), -1) * scales).reshape(shape)


def num_mask_bytes(entries: int, bits: int = 1) -> int:
    """Return how many bytes so many entries of so many bits have."""
    return -(-entries * bits // 8)


def _sparse(rows: Tensor) -> Packed:
    flat = rows.reshape(-1)
    there = flat.view(_WHOLE[flat.dtype]) != 0  # minus zero, too
    mask, values = np.packbits(there.numpy()), flat[there]
    return {"packed": SPARSE, "entries": len(values)}, [torch.from_numpy(mask), values]


def _levels(rows: Tensor, bits: int) -> Packed | None:
    half = _half(bits)
    largest = rows.abs().amax(dim=1, keepdim=True) / half
    beside = [torch.nextafter(largest, torch.full_like(largest, end)) for end in (0.0, math.inf)]
    scales, numbers, exact = largest, torch.zeros_like(rows), torch.zeros(len(rows), 1, dtype=torch.bool)
    for each in (largest, *beside):  # the quotient may have been rounded
        found = (rows / each.clamp(min=torch.finfo(rows.dtype).tiny)).round()
        same = (found * each == rows).all(dim=1, keepdim=True) & (found.abs() <= half).all(dim=1, keepdim=True) & ~exact
        scales, numbers, exact = torch.where(same, each, scales), torch.where(same, found, numbers), exact | same
    if not bool(exact.all()):
        return None
    codes, place = [], np.arange(bits, dtype=np.int32)
    for some in torch.split(numbers.reshape(-1, 1), _AT_ONCE):
        codes.append(np.packbits(((some.numpy().astype(np.int32) + half) >> place & 1).astype(np.uint8)))
    return {"packed": LEVELS, "bits": bits}, [torch.from_numpy(np.concatenate(codes)), scales]


def _half(bits: int) -> int:
    return int(2 ** (bits - 1) - 1)
