"""A penalty on how much of what goes into the client half shows in what comes out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from psl_flower import tree
from psl_flower.checks import check_float
from psl_flower.errors import ConfigError
from psl_flower.precision import widened
from psl_flower.privacy.defences.base import Defence, OutgoingRows
from psl_flower.privacy.distance_correlation import distance_correlation
from psl_flower.tree import Tree


@dataclass(frozen=True)
class DistanceCorrelation(Defence):
    """Adds the distance correlation of inputs and activations to the client's loss (NoPeek, arXiv 2008.09161).

    The client half is trained with the gradient of the loss plus `weight` times the sum, over the clients of a step, of
    the distance correlation of each one's own batch. Clients compute their term themselves and need nothing from
    others; where they have few examples in a step, it says little, see `distance_correlation`.

    Parameters
    ----------
    weight : float
        0: none.
    """

    weight: float

    def __post_init__(self) -> None:
        check_float(self.weight, "weight", least=0)

    def penalty(self, inputs: Tree, rows: Tree, of: OutgoingRows) -> Tensor | None:
        """Return the term."""
        if not self.weight:
            return None
        parts = []
        for what, value in (("inputs", inputs), ("activations", rows)):
            floats = [leaf for leaf in tree.leaves(value) if leaf.is_floating_point()]
            if not floats:
                raise ConfigError(f"DistanceCorrelation needs {what} that are numbers, not indices: leave it out")
            parts.append(torch.cat([leaf.reshape(len(leaf), -1) for leaf in floats], dim=1))
        given, made = widened(tuple(parts))  # distances are not for bfloat16
        given = given.to(made.device, made.dtype)
        counts = of.counts.tolist()
        pairs = zip(torch.split(given, counts), torch.split(made, counts), strict=True)
        return self.weight * torch.stack([distance_correlation(x, z) for x, z in pairs]).sum()
