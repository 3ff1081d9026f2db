"""Whether a function that draws random numbers treats the rows of a batch one by one.

No two passes are alike, then, so rows are compared where the numbers are: the same seed, with other rows beside them;
and the same numbers for every row, whether it is alone or in a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from psl_flower.devices import reseed
from psl_flower.split.compare import CannotTellError, Dice, alike, pick_rows, same, tensors

_REMEDY = "what mixes examples at random (mixup, CutMix) sees those of one client only: do it behind the cut"

# With how many seeds a function is tried, on how many rows, and on how few at least.
_SEEDS, _MOST_ROWS, _LEAST_ROWS = 8, 16, 4

Run = Callable[[Any], Any]


def beside_others(run: Run, inputs: Any, rows: int, device: torch.device) -> str | None:
    """Say how some rows depend on those beside them, with the same random numbers, and the remedy.

    Parameters
    ----------
    run, inputs
        See `psl_flower.split.find_mixing`.
    rows : int
        Of the inputs.
    device : torch.device
        Whose generator is seeded anew beside the CPU's.

    Raises
    ------
    CannotTellError
        If nothing was found, in too few rows.
    """
    count, dice, found = min(rows, _MOST_ROWS), Dice(device), None
    some = pick_rows(inputs, torch.arange(count), rows)
    for seed in range(_SEEDS):
        reseed(seed, device)
        before, drawn = tensors(run(pick_rows(some))), dice.state()
        for kept in (0, 1):
            # every second row stays, each other becomes its neighbour
            index = torch.tensor([i if i % 2 == kept or count == 1 else i - 1 if i else 1 for i in range(count)])
            reseed(seed, device)
            after = tensors(run(pick_rows(some, index, count)))
            if dice.state() != drawn:  # how many are drawn depends on the rows, as in RReLU: each has others then
                return _by_gradient(run, some, count)
            for i, (one, other) in enumerate(zip(before, after, strict=True)):
                if not same(one[kept::2], other[kept::2]):
                    found = found or f"output {i} for an example depends on the others in its batch; {_REMEDY}"
    if found is None and (count < _LEAST_ROWS or alike(some)):
        raise CannotTellError("random numbers are drawn, and the batch is too small to see what they do")
    return found


def _by_gradient(run: Run, some: Any, count: int) -> str | None:
    """Say whether outputs of some rows have a gradient in the inputs of others."""

    def leaf(value: Any) -> Any:
        batch = isinstance(value, Tensor) and value.dim() and len(value) == count
        return value.detach().clone().requires_grad_() if batch and value.is_floating_point() else value

    leaves = tree_map(leaf, some)
    roots = [t for t in tensors(leaves) if t.requires_grad]
    with torch.enable_grad():
        for i, output in enumerate(tensors(run(pick_rows(leaves)))):
            if not output.requires_grad or not roots:
                continue
            for kept in (0, 1):
                mine = output[kept::2]
                weights = torch.rand(mine.shape, dtype=mine.dtype, device=mine.device)
                gradients = torch.autograd.grad(mine, roots, weights, retain_graph=True, allow_unused=True)
                if any(g is not None and bool(g[1 - kept :: 2].any()) for g in gradients):
                    return f"output {i} for an example depends on the others in its batch; {_REMEDY}"
    return None


def alone_by_chance(run: Run, inputs: Any, rows: int, device: torch.device) -> str | None:
    """Say how a row alone differs from itself in a batch, where all rows have the same random numbers.

    Parameters
    ----------
    run, inputs, rows, device
        See `beside_others`.
    """
    dice, most = Dice(device), min(rows, _MOST_ROWS)
    for seed in range(_SEEDS):
        count = most - seed % 2 if most > 2 else most  # as many as something else has, maybe
        some = pick_rows(inputs, torch.arange(count), rows)
        reseed(seed, device)
        with _SameForEachRow(count):
            whole, drawn = tensors(run(pick_rows(some))), dice.state()
        row = 0 if seed % 4 < 2 else count - 1
        reseed(seed, device)
        with _SameForEachRow(1):
            alone = tensors(run(pick_rows(some, row, count)))
        if dice.state() != drawn:  # numbers that could not be made the same
            continue
        for i, (joint, single) in enumerate(zip(whole, alone, strict=True)):
            if not same(joint[row : row + 1], single):
                return f"output {i} for an example is another alone than in a batch of {count}"
    return None


_LIKE = (torch.rand_like, torch.randn_like)
_SIZED = (torch.rand, torch.randn)
_IN_PLACE = (Tensor.normal_, Tensor.uniform_, Tensor.bernoulli_, Tensor.exponential_)


class _SameForEachRow(TorchFunctionMode):
    """Noise of so many rows has the same numbers in each; on this thread only."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self._rows = rows

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        if func in _SIZED:
            sizes = tuple(args[0]) if args and not isinstance(args[0], int) else tuple(args)
            if sizes and sizes[0] == self._rows:
                return func((1, *sizes[1:]), **options).expand(sizes).clone()
        elif func in _LIKE + _IN_PLACE and args:
            tensor, *rest = args
            if tensor.dim() and len(tensor) == self._rows and not any(isinstance(each, Tensor) for each in rest):
                one = func(tensor[:1], *rest, **options).expand(tensor.shape).clone()
                return tensor.copy_(one) if func in _IN_PLACE else one
        return func(*args, **options)
