"""Batch statistics have no place in a client half: finding layers that have them, and replacing them.

A layer that normalises over its batch would see one client's quota instead of the global batch, and its running
averages would drift apart between clients. Group normalisation works example by example, so with it parallel split
learning computes what centralised training computes.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from psl_flower.errors import ConfigError
from psl_flower.split.copying import copy_model
from psl_flower.split.half import listing
from psl_flower.split.model import SplitModel, cut_model

_MOST_GROUPS = 32
_KNOWN = (_BatchNorm.forward, nn.SyncBatchNorm.forward, _InstanceNorm.forward)


class FeatureGroupNorm(nn.GroupNorm):
    """Group normalisation for inputs (N, C, ...) and also (N, C).

    Without positions, a group of one channel would normalise the signal away, and gcd(32, C) groups are often that
    small; all C features of an example form one group there.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalise (N, C, ...), keeping the shape."""
        groups = 1 if input.dim() == 2 else self.num_groups
        return F.group_norm(input, groups, self.weight, self.bias, self.eps)


def batch_statistics_layers(module: nn.Module) -> list[str]:
    """Return the names of torch's own layers that compute with statistics over examples when `module` trains.

    They are batch norms and tracking instance norms, unless they are frozen: kept in evaluation mode by the ``train``
    of the module they are in, with statistics of their own. Layers with a forward of their own are left out; what
    those do, and functions such as ``F.batch_norm``, only running them tells (`find_mixing`).
    """
    flags = {layer: layer.training for layer in module.modules()}
    module.train()
    names = [name for name, layer in module.named_modules() if _has_batch_statistics(layer)]
    for layer, flag in flags.items():
        layer.training = flag
    return names


def check_client_half(half: nn.Module) -> None:
    """Refuse a client half whose layers have batch statistics.

    Raises
    ------
    ConfigError
        Naming the layers and the remedy.
    """
    layers = batch_statistics_layers(half)
    if layers:
        raise ConfigError(
            f"the client half must treat examples one by one, but {listing(layers)} normalise "
            f"over the batch: use replace_batch_norm(model, before=cut) (before='server' for a SplitModel, and "
            f"tail=tail for a U shape) where the model is made, on the server and in model_fn, or freeze them by "
            f"keeping them in evaluation mode, layer.eval() or in the model's train()"
        )


def replace_batch_norm(model: nn.Module, before: str | None = None, tail: str | None = None) -> nn.Module:
    """Return a copy of a model with group normalisation in place of layers with batch statistics.

    A layer over C channels becomes a GroupNorm of gcd(32, C) groups with the same scale, shift and eps; running
    averages are dropped. (After BatchNorm1d on inputs (N, C), the C features form one group.) Frozen layers and those
    with a forward of their own stay, see `batch_statistics_layers`.

    Parameters
    ----------
    model : nn.Module or SplitModel
        Left untouched.
    before : str, optional
        Replace only on the client side of this cut; for a SplitModel, "server". By default replace everywhere.
    tail : str, optional
        With `before`, where the client side goes on in a U shape; a SplitModel knows.

    Raises
    ------
    ConfigError
        If `before` is not "server" for a SplitModel, or a lazy layer has seen no data yet.
    CutError
        If the model cannot be cut at `before`.
    """
    parts: list[nn.Module] = [model]
    if before is not None:
        if isinstance(model, SplitModel) and (before, tail) != ("server", None):
            given = repr(before) if tail is None else f"{before!r} and tail={tail!r}"
            raise ConfigError(f"before must be 'server' for a SplitModel, got {given}")
        halves = cut_model(model) if isinstance(model, SplitModel) else cut_model(model, before, tail)
        parts = [part for part in (halves.client, halves.tail) if part is not None]
    elif tail is not None:
        raise ConfigError(f"tail={tail!r} needs before, the cut where the client's first part ends")
    names = [name for part in parts for name in batch_statistics_layers(part)]
    model = copy_model(model)
    replacements = {layer: _group_norm(layer) for layer in map(model.get_submodule, names)}
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):
            if child in replacements:
                setattr(module, name, replacements[child])
    return replacements.get(model, model)


def _has_batch_statistics(layer: nn.Module) -> bool:
    if type(layer).forward not in _KNOWN:
        return False
    if isinstance(layer, _BatchNorm):
        return layer.training or layer.running_mean is None
    return isinstance(layer, _InstanceNorm) and layer.training and layer.track_running_stats


def _group_norm(layer: nn.Module) -> nn.GroupNorm:
    """Return the group normalisation that takes the place of `layer`."""
    assert isinstance(layer, _BatchNorm | _InstanceNorm)
    channels = layer.num_features
    kind = nn.GroupNorm if isinstance(layer, nn.BatchNorm2d | nn.BatchNorm3d | _InstanceNorm) else FeatureGroupNorm
    norm = kind(math.gcd(_MOST_GROUPS, channels), channels, eps=layer.eps, affine=layer.affine)
    if layer.affine:
        # the layer's own (copied) parameters: device, dtype and requires_grad come with them
        norm.weight, norm.bias = layer.weight, layer.bias
    return norm.train(layer.training)
