"""Reconstruction without any data: an input is sought whose activations are those that came."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from psl_flower.audit.attacks.base import SERVER, reconstruction
from psl_flower.audit.finding import Found
from psl_flower.audit.scene import Scene, crossing, one_tensor, with_weights

NAME = "inversion"
_IMAGES, _STEPS, _RATE = 32, 400, 0.05
_SMOOTH = 1e-2  # weight of the total variation


def invert_inputs(scene: Scene) -> Found:
    """Search, by gradient descent, inputs that the head turns into what was received, and that are smooth.

    The server has the head's weights, for it hands them out (He et al. 2019, doi:10.1145/3359789.3359824, white box).
    """
    rows = scene.rows("activations")
    if rows is None or not rows.inputs.is_floating_point():
        return Found()
    guesses, originals, left = list[Tensor](), list[Tensor](), _IMAGES
    for exchange in reversed(rows.exchanges):
        if exchange.order.client in scene.shadow or left <= 0:
            continue
        head = with_weights(scene.halves.client, exchange.head)
        true = scene.recording.inputs(exchange.order)[:left]
        guesses.append(invert(head, one_tensor(exchange.received["activations"].value)[:left], true[0].shape))
        originals.append(true)
        left -= len(true)
    return reconstruction(NAME, SERVER, rows, torch.cat(guesses), torch.cat(originals), scene.data_range)


def invert(head: nn.Module, activations: Tensor, shape: torch.Size) -> Tensor:
    """Return inputs, (n, *shape), whose activations are near those given, (n, ...)."""
    scale = activations.square().mean().clamp_min(1e-12)
    found = torch.zeros(len(activations), *shape, requires_grad=True)
    optimizer = torch.optim.Adam([found], lr=_RATE)
    for _ in range(_STEPS):
        optimizer.zero_grad()
        loss = functional.mse_loss(crossing(head, found), activations) / scale + _SMOOTH * _variation(found)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return found.detach()


def _variation(images: Tensor) -> Tensor:
    """Return how much neighbouring pixels differ on average; 0 where there are none."""
    if images.ndim != 4:
        return images.new_zeros(())
    return images.diff(dim=-1).abs().mean() + images.diff(dim=-2).abs().mean()
