"""Whether the gradients of a batch are the sum of those of its examples, told by what the backward pass does.

Outputs may be each example's own, and gradients not: a hook that normalises them, or an embedding that scales them by
how often a token occurs, sees the examples of one client where it would see the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from psl_flower.split.compare import Dice, pick_rows, tensors

_NOTHING = (0.0, 0.0)


class _BackwardError(Exception):
    """The backward pass failed."""


def mixed_gradient(run: Callable[[Any], Any], inputs: Any, rows: int, module: nn.Module, eps: float) -> str | None:
    """Say which parameter's gradient is not the sum of those of single examples; None if all are, or none can tell.

    The first example, the last, and three that are the first twice and the last are run, forward and backward. Of
    gradients, which may be large, only a projection is kept. Where the backward pass fails, training will tell.

    Parameters
    ----------
    run, inputs, rows, module
        See `psl_flower.split.find_mixing`.
    eps : float
        Of the coarsest numbers that it computes with.
    """
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if not parameters:
        return None
    dice = Dice(next(iter(tensors(inputs))).device)
    before = dice.state()
    try:
        first, last, three = (
            _projections(run, pick_rows(inputs, torch.tensor(picked), rows), [i > 0 for i in picked], parameters)
            for picked in ([0], [rows - 1], [0, 0, rows - 1])
        )
    except _BackwardError:
        return None
    if before != dice.state():  # no two backward passes are alike
        return None
    margin = eps**0.5 * max((size for some in (first, last, three) for _, size in some.values()), default=0.0)
    for name in parameters:
        one, other, joint = (some.get(name, _NOTHING)[0] for some in (first, last, three))
        if abs(joint - 2 * one - other) > margin:
            return (
                f"the gradient of {name!r} in a batch is not the sum of those of its examples; leave out what makes it "
                "depend on the batch (a backward hook that normalises or clips gradients, an nn.Embedding with "
                "scale_grad_by_freq), or change gradients in the optimizer, where they are those of the whole batch "
                "(register_step_pre_hook)"
            )
    return None


def _projections(
    run: Callable[[Any], Any], some: Any, last: Sequence[bool], parameters: Mapping[str, nn.Parameter]
) -> dict[str, tuple[float, float]]:
    """Return a projection of each parameter's gradient, and its norm, where what comes back is the same for equal rows.

    Parameters
    ----------
    some
        Rows.
    last : sequence of bool
        Which of them are the last of the batch.
    """
    with torch.enable_grad():
        outputs = [t for t in tensors(run(some)) if t.requires_grad]
        if not outputs:
            return {}
        weights = []
        for output in outputs:
            pair = _noise((2, *output.shape[1:]), output)
            weights.append(pair[torch.tensor(last, device=pair.device).long()])
        found = _gradients(outputs, weights, list(parameters.values()))
    return {name: _projected(g) for name, g in zip(parameters, found, strict=True) if g is not None}


def _gradients(outputs: list[Tensor], weights: list[Tensor], parameters: list[nn.Parameter]) -> Sequence[Tensor | None]:
    """Return what torch.autograd.grad would, but within the modes of torch functions that are entered.

    It leaves them, and what activation checkpointing runs again would draw dropout that the first time had not.
    """
    engine: Any = torch.autograd.Variable._execution_engine
    given = tuple(outputs), tuple(weights), False, False, tuple(parameters)
    try:
        found: Sequence[Tensor | None] = engine.run_backward(*given, allow_unreachable=True, accumulate_grad=False)
    except RuntimeError as error:
        raise _BackwardError from error
    return found


def _projected(gradient: Tensor) -> tuple[float, float]:
    dense = gradient.to_dense() if gradient.is_sparse else gradient
    dense = torch.view_as_real(dense) if dense.is_complex() else dense
    if not dense.numel():
        return _NOTHING
    rows = dense.reshape(len(dense) if dense.dim() else 1, -1).to(torch.promote_types(dense.dtype, torch.float32))
    left, right = _noise(rows.shape[:1], rows), _noise(rows.shape[1:], rows) * 12**0.5  # far less than for each entry
    return float(left @ (rows @ right)), float(torch.linalg.vector_norm(rows))


def _noise(shape: Sequence[int], like: Tensor) -> Tensor:
    """Return numbers between -0.5 and 0.5 that are the same each time."""
    generator = torch.Generator(like.device).manual_seed(0)
    dtype = like.dtype if like.is_floating_point() else torch.float32
    return (torch.rand(tuple(shape), generator=generator, dtype=dtype, device=like.device) - 0.5).to(like.dtype)
