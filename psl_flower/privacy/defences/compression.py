"""Activations of which less is told: few levels, or few entries."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from psl_flower.checks import check_int
from psl_flower.privacy.defences.base import Defence, OutgoingRows


@dataclass(frozen=True)
class Quantize(Defence):
    """Rounds each example's activations to few levels, evenly spaced from minus to plus its largest magnitude.

    The gradient comes back as if nothing had been rounded (straight through). What leaves tells `bits` bits an entry,
    and travels in as many; with ``wire_dtype="int8"`` in a byte an entry, which rounds 8 bits no further.

    Parameters
    ----------
    bits : int
        2 to 16: there are 2^bits - 1 levels.
    """

    bits: int

    def __post_init__(self) -> None:
        check_int(self.bits, "bits", least=2, most=16)

    @property
    def packing(self) -> int:
        """Bits of an entry."""
        return self.bits

    def rows(self, rows: Tensor, of: OutgoingRows) -> Tensor:
        """Round."""
        flat = rows.detach().reshape(len(rows), -1)
        step = flat.abs().amax(dim=1, keepdim=True) / (2 ** (self.bits - 1) - 1) if flat.numel() else flat
        rounded = (flat / step.clamp(min=torch.finfo(flat.dtype).tiny)).round() * step
        return rows - rows.detach() + rounded.reshape(rows.shape)


@dataclass(frozen=True)
class TopK(Defence):
    """Keeps the k largest magnitudes of each example's activations, the rest are zero.

    The gradient comes back through those that are kept only. What leaves are k numbers an example, and a bit for each
    entry, whether it is one of them.

    Parameters
    ----------
    k : int
        At least 1; all are kept where there are no more.
    """

    k: int

    def __post_init__(self) -> None:
        check_int(self.k, "k", least=1)

    @property
    def packing(self) -> int:
        """Most entries are zero."""
        return 0

    def rows(self, rows: Tensor, of: OutgoingRows) -> Tensor:
        """Drop what is small."""
        flat = rows.detach().reshape(len(rows), -1)
        if self.k >= flat.shape[1]:
            return rows
        kept = torch.zeros_like(flat, dtype=torch.bool).scatter_(1, flat.abs().topk(self.k, dim=1).indices, True)
        return torch.where(kept.reshape(rows.shape), rows, 0)
