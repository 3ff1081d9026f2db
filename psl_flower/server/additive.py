"""Whether the loss of a batch can be put together from those of its parts, told by what it does."""

from __future__ import annotations

import math
from typing import Any

import torch

from psl_flower import tree
from psl_flower.devices import reseed, seeded
from psl_flower.errors import ConfigError
from psl_flower.server.apart import apart
from psl_flower.server.loss import Loss, WeightedLoss, weighted
from psl_flower.server.reduction import Reduction

REFUSED = (
    "the loss of a batch is not the mean over what counts in it, nor the sum, so that of the global batch cannot be "
    "put together from the clients': take one that is, divided by the number of what counts as a tensor where you "
    "divide yourself, or leave labels and loss to the server (no tail)"
)
KEEPS = (
    "the loss of a batch is another one when it is computed again: it keeps something from batch to batch, and "
    "each client would keep its own. Compute it of outputs and labels alone, or leave labels and loss to the server "
    "(no tail)"
)
# How close is close; in bfloat16 a number is right to 0.4 percent, and a few of them are added and divided.
CLOSE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 3e-2}


class Additivity:
    """Looks at the first batches of a training, for one alone may hide what a loss does.

    Parameters
    ----------
    checks : int
        How many batches.
    """

    def __init__(self, checks: int) -> None:
        self._left = checks

    def refuted(self, *arguments: Any, **options: Any) -> bool:
        """Return whether the loss of a batch is seen not to be put together from those of its parts; see `adds_up`."""
        if not self._left or not torch.is_grad_enabled():
            return False
        found = adds_up(*arguments, **options)
        self._left -= found is not None
        return found is False


def adds_up(
    loss: Loss,
    outputs: Any,
    labels: Any,
    rows: int,
    whole: WeightedLoss,
    *,
    classify: bool = True,
    reduction: Reduction | None = None,
) -> bool | None:
    """Return whether the losses of two parts of a batch make that of the batch; None where it does not show.

    One part has more rows than the other: of such with as many, any weights that are the same would do. So as not to
    depend on what happens to lie in which part, the labels are shuffled, too: what does not count is as much in each
    row of a client, maybe, and not in those of others.

    Parameters
    ----------
    loss, outputs, labels, rows, classify, reduction
        See `weighted`.
    whole : WeightedLoss
        That of the batch.

    Raises
    ------
    ConfigError
        If it is another one the second time, with the same random numbers.
    """
    if rows < 2 or not whole.weight or not math.isfinite(whole.sum):
        return None

    def of(labels: Any, part: slice) -> WeightedLoss:
        ours, theirs = (tree.map_leaves(lambda t: t[part], each) for each in (outputs, labels))
        return weighted(asked, ours, theirs, len(range(rows)[part]), classify=classify, reduction=reduction)

    asked = apart(loss) or loss
    answers, cut = [], max(1, rows // 3)
    close, device, generator = CLOSE.get(whole.mean.dtype, 1e-2), whole.mean.device, torch.Generator().manual_seed(0)

    def shuffled(labels: torch.Tensor) -> torch.Tensor:
        order = torch.randperm(labels.numel(), generator=generator)
        return labels.flatten()[order.to(labels.device)].reshape(labels.shape)

    with torch.enable_grad(), seeded(0, device):  # a divisor with a gradient is no weight
        for shuffle in (False, True, True):
            try:
                given = tree.map_leaves(shuffled, labels) if shuffle else labels
                first, second = (of(given, part) for part in (slice(None, cut), slice(cut, None)))
                reseed(0, device)
                mean = of(given, slice(None)).mean.item()
                reseed(0, device)
                same, again = (of(given, slice(None)).mean.item() for _ in range(2))
                found = first.mean.item() + second.mean.item()
                if not whole.summed:
                    found = (first.sum + second.sum) / (first.weight + second.weight)
            except Exception:  # noqa: S112 - the user's code, with other batches than it was made for
                continue
            if math.isfinite(mean) and not math.isclose(mean, same, rel_tol=close, abs_tol=close):
                raise ConfigError(KEEPS)
            if math.isfinite(found) and math.isclose(mean, again, rel_tol=close, abs_tol=close):  # else it is random
                answers.append(math.isclose(found, mean, rel_tol=close, abs_tol=close))
    return all(answers) if answers else None
