"""Training and evaluation mode of a model that is recorded in both, and then left in its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def modes_kept(root: nn.Module) -> Iterator[Callable[[bool], None]]:
    """Leave all modules in their modes at the end. Meanwhile, what this gives puts the model into one.

    Layers that are in evaluation mode by themselves stay in it, as by ``norm.eval()``: what they are in is not.
    """
    flags = {module: module.training for module in root.modules()}
    frozen = _frozen_layers(root)

    def put(mode: bool) -> None:
        root.train(mode)
        for layer in frozen:
            layer.eval()

    try:
        yield put
    finally:
        for module, flag in flags.items():
            module.training = flag


def pinned_modules(root: nn.Module) -> dict[bool, frozenset[str]]:
    """Return which submodules stay in the other mode where the model is put into one, for each mode.

    There are some where a class overrides ``train`` to keep a part of itself frozen, and where single layers are given
    in evaluation mode. `root` is left in its mode.
    """
    pinned = {}
    with modes_kept(root) as put:
        for mode in (True, False):
            put(mode)
            pinned[mode] = frozenset(name for name, module in root.named_modules() if module.training != mode)
    return pinned


def _frozen_layers(root: nn.Module) -> set[nn.Module]:
    return {
        layer
        for module in root.modules()
        if module.training
        for layer in module.children()
        if not layer.training and not any(True for _ in layer.children())
    }
