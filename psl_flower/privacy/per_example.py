"""Gradients of single examples, clipped one by one and added up: what DP-SGD is made of (arXiv 1607.00133)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap

from psl_flower import tree
from psl_flower.errors import ConfigError
from psl_flower.origin import where
from psl_flower.tree import Tree

_AT_ONCE = 32  # examples whose gradients are held in memory side by side


def clipped_sum(
    run: Callable[[nn.Module, Tree], Any],
    module: nn.Module,
    inputs: Tree,
    gradients: Mapping[int, Tensor],
    bound: float,
    *,
    who: str,
) -> dict[str, Tensor]:
    """Return the sum of the examples' parameter gradients, each scaled down to a norm; zero if it is not finite.

    Parameters
    ----------
    run : callable
        Takes the module and inputs, and returns its outputs: rows, each computed of the same row of the inputs.
    module : nn.Module
    inputs : tree
        Rows.
    gradients : dict of int to Tensor
        Of the outputs, by the position of the leaf.
    bound : float
        Largest L2 norm, over all parameters of the module.
    who : str
        What messages call the module.

    Returns
    -------
    dict of str to Tensor
        Of the trainable parameters.

    Raises
    ------
    ConfigError
        If gradients of single examples cannot be had: layers draw random numbers, say.
    """
    parameters = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
    structure, wrapped = tree.structure(inputs), _Run(run, module)
    positions, rows = list(gradients), [t.detach() for t in tree.leaves(inputs)]

    def one(inputs: list[Tensor], gradients: list[Tensor]) -> dict[str, Tensor]:
        def outputs(parameters: dict[str, Tensor]) -> list[Tensor]:
            batch = tree.build(structure, [t[None] for t in inputs])
            made = functional_call(wrapped, {f"module.{n}": p for n, p in parameters.items()}, (batch,))
            found = tree.leaves(tree.as_tree(made, f"what {who} returns"))
            return [found[i] for i in positions]

        (found,) = vjp(outputs, parameters)[1]([t[None] for t in gradients])
        norm = torch.stack([g.square().sum() for g in found.values()]).sum().sqrt()
        factor = bound / norm.clamp(min=bound)
        return {name: torch.where(torch.isfinite(norm), g * factor, 0) for name, g in found.items()}

    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    if not parameters or not positions:
        return total
    weights = [gradients[i].detach() for i in positions]
    try:
        for begin in range(0, len(weights[0]), _AT_ONCE):
            some = slice(begin, begin + _AT_ONCE)
            each = vmap(one)([t[some] for t in rows], [t[some] for t in weights])
            total = {name: t + each[name].sum(dim=0) for name, t in total.items()}
    except (RuntimeError, ValueError, TypeError) as exc:
        raise ConfigError(
            f"the gradients of single examples cannot be computed of {who}, which DP-SGD needs: {where(exc)}. Layers "
            "that draw random numbers (dropout), or decide by the values they see, do not go with it"
        ) from exc
    return total


def finite_rows(rows: Tensor) -> Tensor:
    """Return rows, those that are not finite as zeros: no example can stop a step, or spoil the others' part in it."""
    if tree.is_finite(rows):
        return rows
    finite = torch.isfinite(rows).reshape(len(rows), -1).all(dim=1)
    return torch.where(finite.reshape(-1, *[1] * (rows.ndim - 1)), rows, torch.zeros_like(rows))


class _Run(nn.Module):
    """A module and how it is run, as one module, whose parameters can be put in its place."""

    def __init__(self, run: Callable[[nn.Module, Tree], Any], module: nn.Module) -> None:
        super().__init__()
        self.run, self.module = run, module

    def forward(self, inputs: Tree) -> Any:
        return self.run(self.module, inputs)
