"""Gradients at a cut that leave clients, where those hold the labels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from psl_flower.checks import check_float
from psl_flower.privacy.defences.base import Defence, OutgoingRows


@dataclass(frozen=True)
class ClipCutGradient(Defence):
    """Gives the gradients of all examples at the cut one norm: larger ones are cut down, smaller ones get noise.

    The noise lies along the gradient itself, so that the expected squared norm is ``norm ** 2`` for each (with `noise`
    1): the heuristic "max_norm" of arXiv 2102.08504, with a norm that is given in place of the batch's largest. This
    hides norms and nothing else: the direction of a gradient, up to its sign, leaves as it is, and names the label to a
    server that tries each. Only `everywhere` blurs directions. Head and body learn from what leaves, the tail from the
    gradients as they are.

    Parameters
    ----------
    norm : float
        Largest L2 norm of an example's gradient as it leaves: of the mean loss over a step, so about a B-th of that of
        the example's own loss, with B examples a step.
    noise : float
        Factor of the noise along a gradient. 0: none.
    everywhere : float
        Standard deviation of normal noise on each entry, in units of `norm`. 0: none. It makes trying each label worse,
        not useless, and noise of other steps is other noise: over many of them more is seen.
    """

    of_gradients: ClassVar[bool] = True

    norm: float
    noise: float = 1.0
    everywhere: float = 0.0

    def __post_init__(self) -> None:
        check_float(self.norm, "norm", above=0)
        check_float(self.noise, "noise", least=0)
        check_float(self.everywhere, "everywhere", least=0)

    def gradients(self, rows: Tensor, of: OutgoingRows) -> Tensor:
        """Clip, and add the noise."""
        flat = rows.reshape(len(rows), -1)
        norms = torch.linalg.vector_norm(flat, dim=1, keepdim=True)
        tiny = torch.finfo(rows.dtype).tiny
        factor: Tensor = (self.norm / norms.clamp(min=tiny)).clamp(max=1.0)
        if self.noise:
            spread = ((self.norm / (norms * factor).clamp(min=tiny)) ** 2 - 1).clamp(min=0).sqrt()
            # a gradient of zero has no direction
            factor = factor * (1 + self.noise * torch.where(norms > 0, spread, 0.0) * of.normal(norms))
        defended: Tensor = flat * factor
        if self.everywhere:
            apart = replace(of, purpose=of.purpose + b"everywhere ")  # other numbers than those of the noise along it
            defended = defended + self.everywhere * self.norm * apart.normal(flat)
        return defended.reshape(rows.shape)
