"""The default app's models, for small images (8 to 64 pixels a side)."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn

from psl_flower.extras import extra

_DEFAULT_CUTS = {
    "tiny-cnn": "stage2",
    "strided-cnn": "stage2",
    "cnn": "stage2",
    "resnet18": "layer2",
    "resnet34": "layer2",
}


def default_cut(name: str) -> str:
    """Return the first server-side module where none was chosen: the client half is the model's first stage."""
    return _DEFAULT_CUTS[name]


def build_model(name: str, *, in_channels: int, num_classes: int, seed: int) -> nn.Module:
    """Build a model with random weights, the same ones for the same seed.

    Parameters
    ----------
    name : str
        "tiny-cnn", "strided-cnn", "cnn", "resnet18" or "resnet34".
    in_channels, num_classes : int
        Of the dataset.
    seed : int
        Of the first weights; torch's global generator is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name == "tiny-cnn":
            return tiny_cnn(in_channels, num_classes)
        if name == "strided-cnn":
            return strided_cnn(in_channels, num_classes)
        if name == "cnn":
            return small_cnn(in_channels, num_classes)
        return small_image_resnet(name, in_channels, num_classes)


def tiny_cnn(in_channels: int, num_classes: int) -> nn.Sequential:
    """Build a CNN of two strided convolutions and a hidden layer, for experiments that must be done in minutes."""
    return nn.Sequential(
        OrderedDict(
            stage1=nn.Sequential(nn.Conv2d(in_channels, 16, 5, stride=2, padding=2), nn.GroupNorm(4, 16), nn.ReLU()),
            stage2=nn.Sequential(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
            head=nn.Sequential(
                nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16 * 32, 64), nn.ReLU(), nn.Linear(64, num_classes)
            ),
        )
    )


def strided_cnn(in_channels: int, num_classes: int) -> nn.Sequential:
    """Build a CNN of three narrow, strided convolutions without batch statistics: a cheap step on colour images."""

    def stage(channels: int, out_channels: int) -> nn.Sequential:
        convolution = nn.Conv2d(channels, out_channels, 3, stride=2, padding=1)
        return nn.Sequential(convolution, nn.GroupNorm(4, out_channels), nn.ReLU())

    return nn.Sequential(
        OrderedDict(
            stage1=stage(in_channels, 16),
            stage2=stage(16, 32),
            stage3=stage(32, 64),
            head=nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16 * 64, num_classes)),
        )
    )


def small_cnn(in_channels: int, num_classes: int) -> nn.Sequential:
    """Build a CNN of three convolutional stages and a linear head, for images of at least 4 x 4 pixels.

    The first stage, the usual client half, normalises each example by itself; the others, which see the whole global
    batch on the server, use batch statistics.
    """
    return nn.Sequential(
        OrderedDict(
            stage1=nn.Sequential(
                nn.Conv2d(in_channels, 32, 3, padding=1), nn.GroupNorm(8, 32), nn.ReLU(), nn.MaxPool2d(2)
            ),
            stage2=nn.Sequential(nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2)),
            stage3=nn.Sequential(nn.Conv2d(64, 128, 3, padding=1), nn.BatchNorm2d(128), nn.ReLU()),
            head=nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * 128, num_classes)),
        )
    )


def small_image_resnet(name: str, in_channels: int, num_classes: int) -> nn.Module:
    """Build torchvision's ResNet with the stem for small images: a 3x3 convolution of stride 1 and no max-pool."""
    with extra("vision", f"the model {name!r}"):
        from psl_flower.torchvision_compat import import_torchvision  # takes a second: only those who use it pay

        models = import_torchvision().models
    model: nn.Module = getattr(models, name)(num_classes=num_classes)
    model.conv1 = nn.Conv2d(in_channels, 64, kernel_size=3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")  # as torchvision does
    model.maxpool = nn.Identity()
    return model
