"""Inputs from a client's parameter gradients, where its head begins with a linear layer."""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from psl_flower.audit.attacks.base import SERVER, reconstruction
from psl_flower.audit.finding import Found
from psl_flower.audit.scene import Scene, mean_image

NAME = "inputs from head gradients"
_EXAMPLES = 256  # of clients that are attacked, about


def read_inputs(scene: Scene) -> Found:
    """Divide the gradients of a linear layer's weights by those of its biases: of one example, that is its input.

    With more examples in a sum, each unit gives a mean of them, weighted by what they make of it: one alone where only
    this one makes the unit active (Phong et al. 2018, doi:10.1109/TIFS.2017.2787987; Geiping et al., arXiv 2003.14053,
    proposition 3.1). It takes as many units as there are examples, those with the largest bias gradient. Masked sums
    are left alone: of one client they say nothing.
    """
    rows = scene.rows("activations")
    layer = None if rows is None else _first_linear(scene.halves.client, rows.inputs[0].numel())
    if rows is None or layer is None:
        return Found()
    guesses, originals, nobody = list[Tensor](), list[Tensor](), mean_image(rows)[0]
    for exchange, leaf in scene.sums("head"):
        given = leaf.value
        if exchange.cohort is not None or exchange.order.client in scene.shadow or f"{layer}.bias" not in given:
            continue
        weight, bias = given[f"{layer}.weight"], given[f"{layer}.bias"]
        if weight is None or bias is None:
            continue
        true = scene.recording.inputs(exchange.order)
        guesses.append(_matched(_candidates(weight, bias, len(true), nobody), true))
        originals.append(true)
        if sum(map(len, originals)) >= _EXAMPLES:
            break
    if not guesses:
        return Found()
    return reconstruction(NAME, SERVER, rows, torch.cat(guesses), torch.cat(originals), scene.data_range)


def _first_linear(head: nn.Module, width: int) -> str | None:
    """Return the name of the linear layer that takes the inputs as they are, if it is the first with parameters."""
    for name, module in head.named_modules():
        if any(True for _ in module.parameters(recurse=False)):
            linear = isinstance(module, nn.Linear) and module.bias is not None and module.in_features == width
            return name if linear else None
    return None


def _candidates(weight: Tensor, bias: Tensor, count: int, nobody: Tensor) -> Tensor:
    """Return what the server takes the inputs to be, (count, ...); the mean image where too few units tell."""
    units = bias.abs().argsort(descending=True)[:count]
    units = units[bias[units] != 0]
    found = (weight[units] / bias[units, None]).reshape(-1, *nobody.shape).float()
    return torch.cat([found, nobody.expand(count - len(found), *nobody.shape)])


def _matched(found: Tensor, true: Tensor) -> Tensor:
    """Return guesses in the order of the true inputs that they are nearest to: a set is guessed, not an order."""
    costs = torch.cdist(true.flatten(1), found.flatten(1)).numpy()
    return found[linear_sum_assignment(costs)[1]]
