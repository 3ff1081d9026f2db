"""The loss of each example by itself, as DP-SGD needs it: no example has a part in the gradient of another."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from psl_flower import tree
from psl_flower.errors import ConfigError, PSLError
from psl_flower.origin import where
from psl_flower.privacy.per_example import finite_rows
from psl_flower.server.additive import CLOSE
from psl_flower.server.loss import Loss, WeightedLoss, logits_for

log = logging.getLogger("flwr.psl_flower")


def check_plain_mean(loss: WeightedLoss, rows: int) -> None:
    """Refuse a loss in which examples count differently, or that is a sum: DP-SGD takes them to count alike.

    Each may have as many elements as every other; whether they have is seen by their losses, see `example_gradients`.

    Raises
    ------
    ConfigError
        If it is none.
    """
    if loss.summed or not loss.weight or loss.weight % rows:
        _refuse(loss, rows)


def _refuse(loss: WeightedLoss, rows: int) -> NoReturn:
    what = "the sum" if loss.summed else f"a mean over {loss.weight:g} targets of {rows} examples"
    raise ConfigError(f"DP-SGD needs a loss that is the mean over the examples, got {what}: no weights, none ignored")


def example_gradients(
    loss: Loss, outputs: Any, labels: Any, rows: int, whole: WeightedLoss, divisor: int | None = None
) -> tuple[WeightedLoss, dict[int, Tensor]]:
    """Return the mean of the examples' losses, each computed alone, and gradients of the outputs.

    An example whose loss or gradient is not finite has a gradient of zero, and is left out of the loss that is told.

    Parameters
    ----------
    loss, outputs, labels, rows
        See `weighted`.
    whole : WeightedLoss
        That of the batch.
    divisor : int, optional
        What an example's gradient is divided by, once: if not by the size of the batch, its rounding does not tell it.

    Returns
    -------
    WeightedLoss
        Its mean has no graph; it weighs by examples, of which each has as many elements.
    dict of int to Tensor
        Rows, by the position of the leaf of the outputs.

    Raises
    ------
    ConfigError
        If the loss of the batch is not the mean over its examples.
    """
    check_plain_mean(whole, rows)
    whole.check_gradient()
    leaves = tree.leaves(tree.as_tree(outputs, "outputs"))
    # a tensor that is returned twice is taken once
    taken = list({id(t): at for at, t in reversed([*enumerate(leaves)]) if t.requires_grad}.values())
    losses, pieces = [], list[list[Tensor]]()
    for row in range(rows):
        alone = {id(t): t.detach()[row : row + 1] for t in leaves}
        roots = [alone[id(leaves[at])].requires_grad_() for at in taken]
        given = tree_map(lambda t: alone.get(id(t), t), outputs)  # noqa: B023 - called at once
        try:
            value = loss(logits_for(loss, given), tree.map_leaves(lambda t: t[row : row + 1], labels))  # noqa: B023
            found = torch.autograd.grad(value, roots, torch.full_like(value, 1 / (divisor or rows)), allow_unused=True)
        except PSLError:
            raise
        except Exception as exc:
            raise ConfigError(
                f"DP-SGD computes the loss of each example alone, in a batch of one, which fails: "
                f"{where(exc, text=False)}. Take a loss that is the mean over the examples"
            ) from exc
        losses.append(value.detach())
        pieces.append([torch.zeros_like(t) if g is None else g for t, g in zip(roots, found, strict=True)])
    each = torch.stack(losses)
    finite = torch.isfinite(each)
    _check_mean(each, whole)
    if not bool(finite.all()):
        text = "the loss of %d of %d examples is not finite: their gradients count as zero. If there are many: lower "
        log.warning(text + "the learning rate", rows - int(finite.sum()), rows)
    mean = each[finite].mean() if bool(finite.any()) else torch.zeros_like(each[0])
    gradients = {at: torch.cat(column) for at, column in zip(taken, zip(*pieces, strict=True), strict=True)}
    return replace(whole, mean=mean, weight=rows), {
        at: finite_rows(g * finite.reshape(-1, *[1] * (g.ndim - 1))) for at, g in gradients.items()
    }


def _check_mean(each: Tensor, whole: WeightedLoss) -> None:
    """Refuse a loss that is another one for examples in a batch than alone; gradients are of these in any case."""
    close, mean, expected = CLOSE.get(each.dtype, 1e-2), each.mean().item(), whole.mean.item()
    if not math.isfinite(expected):  # an example overflows
        return
    if not math.isfinite(mean):  # alone it has no element, and others have more
        _refuse(whole, len(each))
    if abs(mean - expected) > close * max(1.0, float(each.abs().mean())):  # losses of either sign may cancel
        raise ConfigError(
            "DP-SGD needs a loss that is the mean over the examples, each alone: that of a batch differs from the mean "
            "of the losses in batches of one. Leave out what compares examples, or normalises over the batch"
        )
