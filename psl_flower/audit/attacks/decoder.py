"""Reconstruction by a decoder: learned from clients whose inputs the attacker knows, used on all others."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil, prod
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from psl_flower.audit.attacks.base import SERVER, reconstruction
from psl_flower.audit.finding import Found
from psl_flower.audit.scene import Scene

NAME = "decoder"
_PARTY = f"{SERVER}, with shadow data"
_HELD_OUT = 0.2  # share of the shadow rows that chooses the decoder
_LEARNED, _ROWS = 4000, 1024  # shadow rows, and rows of others, that are used
_STEPS, _BATCH, _WIDTH = 600, 64, 48
_SMALL = 16  # pixels a side
_RIDGES = (1e-3, 1e-1, 1e1)

_COLUMNS = 1024  # that are computed with at once in double precision

Decoder = Callable[[Tensor], Tensor]

LEARNED: WeakKeyDictionary[Scene, Decoder] = WeakKeyDictionary()  # several attacks use it; a scene is large


def decode_inputs(scene: Scene) -> Found:
    """Reconstruct inputs from activations.

    Three kinds of decoders are learned, a linear one, a network with a hidden layer, and a convolutional one where
    activations and inputs are images; the attacker takes whichever does best on shadow data it has not learned from.
    What the clients do to their activations is in the shadow data too, so a defence is attacked by one who knows it.
    """
    rows = scene.rows("activations")
    if rows is None:
        return Found()
    wanted = np.flatnonzero(~rows.shadow)[:_ROWS]
    learned = learned_decoder(scene)
    guesses = learned(rows.seen(wanted))
    return reconstruction(NAME, _PARTY, rows, guesses, rows.inputs[torch.from_numpy(wanted)].float(), scene.data_range)


def learned_decoder(scene: Scene) -> Decoder:
    """Return what the attacker has learned from the shadow clients' activations."""
    if scene not in LEARNED:
        LEARNED[scene] = _learn_decoder(scene)
    return LEARNED[scene]


def _learn_decoder(scene: Scene) -> Decoder:
    rows = scene.rows("activations")
    assert rows is not None  # those who ask have looked
    known = np.flatnonzero(rows.shadow)[:_LEARNED]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(scene.seed)
        return learn_decoder(rows.seen(known), rows.inputs[torch.from_numpy(known)].float())


def learn_decoder(values: Tensor, inputs: Tensor) -> Decoder:
    """Return the best of several decoders.

    Parameters
    ----------
    values : (N, ...) float32
        What crossed.
    inputs : (N, ...) float32
        What it was made of.

    Returns
    -------
    callable
        Takes values, (n, ...), and returns inputs, (n, ...).
    """
    held = max(1, round(_HELD_OUT * len(values)))
    mean, std = values[held:].mean(dim=0), values[held:].std(dim=0)
    std = torch.where(std > 1e-6 * std.max().clamp_min(1e-12), std, torch.ones_like(std))

    def scaled(of: Tensor) -> Tensor:
        return (of - mean).div_(std)

    x, y = scaled(values), inputs
    del values  # where nobody else has them
    kinds = _ridges(x[held:], y[held:])
    kinds.append(_learned(_hidden(x, inputs), x[held:], y[held:]))
    if x.ndim == inputs.ndim == 4:
        kinds.append(_learned(decoder_network(x, inputs), x[held:], y[held:]))
    errors = [float(functional.mse_loss(each(x[:held]), y[:held])) for each in kinds]
    best = kinds[int(np.argmin(errors))]
    return lambda of: best(scaled(of))


def _ridges(values: Tensor, inputs: Tensor) -> list[Decoder]:
    """Return ridge regressions, solved with as many unknowns as there are examples or values, whichever is less."""
    x, y, shape = values.flatten(1), inputs.flatten(1).double(), inputs.shape[1:]
    mean = y.mean(dim=0)
    few = x.shape[0] < x.shape[1]
    gram = _products(x, x) if few else x.T.double() @ x.double()
    right, unit = (y - mean if few else x.T.double() @ (y - mean)), len(x) * torch.eye(len(gram), dtype=gram.dtype)

    def decoder(penalty: float) -> Decoder:
        found: Tensor = torch.linalg.solve(gram + penalty * unit, right)

        def decode(of: Tensor) -> Tensor:
            seen = _products(of.flatten(1), x) if few else of.flatten(1).double()
            return (seen @ found + mean).float().reshape(len(of), *shape)

        return decode

    return [decoder(penalty) for penalty in _RIDGES]


def _products(a: Tensor, b: Tensor) -> Tensor:
    """Return the inner products of the rows of two float32 matrices, in double precision, without copies of them."""
    found = torch.zeros(len(a), len(b), dtype=torch.float64)
    for p, q in zip(*(torch.split(of, _COLUMNS, dim=1) for of in (a, b)), strict=True):
        found.addmm_(p.double(), q.double().T)
    return found


def _hidden(values: Tensor, inputs: Tensor) -> nn.Module:
    width, shape = values[0].numel(), inputs.shape[1:]
    return nn.Sequential(
        nn.Flatten(), nn.Linear(width, 256), nn.ReLU(), nn.Linear(256, prod(shape)), nn.Unflatten(1, shape)
    )


def decoder_network(values: Tensor, inputs: Tensor) -> nn.Module:
    """Return a network from values, (n, ...), to inputs, (n, ...): convolutional where both are images.

    Of small images it makes all pixels before its last layers; of large ones after them, each position as a square of
    pixels (sub-pixel convolution, Shi et al., arXiv 1609.05158), which takes a fraction of the time.
    """
    if not values.ndim == inputs.ndim == 4:
        return _hidden(values, inputs)
    size, channels = tuple(inputs.shape[-2:]), inputs.shape[1]
    first = [nn.Conv2d(values.shape[1], _WIDTH, 3, padding=1), nn.ReLU()]
    second = [nn.Conv2d(_WIDTH, _WIDTH, 3, padding=1), nn.ReLU()]
    resize = nn.Upsample(size=size, mode="bilinear")
    if max(size) <= _SMALL:
        return nn.Sequential(*first, resize, *second, nn.Conv2d(_WIDTH, channels, 3, padding=1))
    square = max(1, *(ceil(wanted / had) for wanted, had in zip(size, values.shape[-2:], strict=True)))
    pixels = [nn.Conv2d(_WIDTH, channels * square**2, 3, padding=1), nn.PixelShuffle(square)]
    network = nn.Sequential(*first, *second, *pixels, resize)
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def _learned(network: nn.Module, values: Tensor, inputs: Tensor) -> Decoder:
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _STEPS)
    for _ in range(_STEPS):
        chosen = torch.randint(len(values), (_BATCH,))
        optimizer.zero_grad()
        loss = functional.mse_loss(network(values[chosen]), inputs[chosen])
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()

    def decode(of: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.cat([network(some) for some in torch.split(of, _BATCH)])

    return decode
