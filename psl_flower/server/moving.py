"""The buffers of a user's loss that change while a run goes on: a running mean, a teacher's batch statistics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class MovingBuffers:
    """Knows which buffers of a loss have changed since a run began, for its checkpoints.

    Those that have not, as class weights, stay what a resumed run gives them.

    Parameters
    ----------
    loss : callable
        Of one that is no module, nothing is known.
    """

    def __init__(self, loss: Any) -> None:
        self._loss = loss if isinstance(loss, nn.Module) else nn.Module()
        self._begun = {name: t.detach().clone() for name, t in self._loss.named_buffers()}

    def state_dict(self) -> dict[str, Tensor]:
        """Return the buffers that have changed, by name."""
        return {
            name: t.detach().clone()
            for name, t in self._loss.named_buffers()
            if name not in self._begun or not _same(t, self._begun[name])
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state_dict` returned; what this loss does not have is left out."""
        for name, value in state.items():
            at, _, leaf = name.rpartition(".")
            module = dict(self._loss.named_modules()).get(at)
            if module is not None and leaf in module._buffers:
                old = module._buffers[leaf]
                setattr(module, leaf, value.clone() if old is None else value.to(old.device, old.dtype, copy=True))
                self._begun.pop(name, None)  # it moves


def _same(now: Tensor, begun: Tensor) -> bool:
    """Return whether two tensors hold the same, wherever they are."""
    if now.shape != begun.shape:
        return False
    now, begun = (t.to_dense() if t.layout is not torch.strided else t for t in (now.detach().to(begun.device), begun))
    return bool(((now == begun) | ((now != now) & (begun != begun))).all())
