"""What a module's forward leaves on the module for others to read: an auxiliary loss, attention weights.

torch.fx calls most modules without running them. What their forward would set is not there then, and whoever reads it
gets what ``__init__`` put there, which would be recorded for ever.
"""

from __future__ import annotations

import dis
import functools
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
from torch import nn

from psl_flower.errors import CutError


@functools.cache
def stored_names(kind: type[nn.Module]) -> frozenset[str]:
    """Return the attributes that a class of modules sets in ``forward``, or in methods that it calls."""
    found, waiting, seen = set[str](), ["forward"], set[str]()
    while waiting:
        name = waiting.pop()
        method = getattr(kind, name, None)
        if name in seen or not isinstance(method, FunctionType):
            continue
        seen.add(name)
        for step in dis.get_instructions(method):
            if step.opname == "STORE_ATTR":
                found.add(step.argval)
            elif step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
                waiting.append(step.argval)
    return frozenset(found)


def hold_tensors(part: nn.Module) -> None:
    """Make buffers of tensors that modules hold as plain attributes, so that clients are sent the server's.

    A client makes its own model, and where they are drawn at random, as a fixed projection is, they would be others. A
    state dict leaves them out, as before; what a forward sets anew is left as it is.
    """
    for module in part.modules():
        kind: Any = type(module)
        for name, value in list(vars(module).items()):
            if isinstance(value, torch.Tensor) and not hasattr(kind, name) and name not in stored_names(kind):
                delattr(module, name)
                module.register_buffer(name, value.detach(), persistent=False)


@contextmanager
def refusing_reads(root: nn.Module, opened: Collection[str]) -> Iterator[None]:
    """Refuse to read what the forward of a module sets that is not run; `opened` names those that are.

    Raises
    ------
    CutError
        Where such an attribute is read within.
    """
    watched = []
    for name, module in root.named_modules():
        kind: Any = type(module)
        stored = {key for key in stored_names(kind) if key in vars(module)}
        if stored and name not in opened and not kind.__module__.startswith("torch."):
            watched.append((module, kind))
            module.__class__ = _watching(kind, name, frozenset(stored))
    try:
        yield
    finally:
        for module, kind in watched:
            module.__class__ = kind


def _watching(kind: type[nn.Module], where: str, stored: frozenset[str]) -> type[nn.Module]:
    def read(self: nn.Module, name: str) -> Any:
        if name in stored:
            raise CutError(
                f"'{where}.{name}' is read, which the forward of {where!r} ({kind.__name__}) sets, and torch.fx would "
                "record the value it has now for ever: have that forward return it, or cut by hand: "
                "SplitModel(client=..., server=...)."
            )
        return kind.__getattribute__(self, name)

    return type(kind.__name__, (kind,), {"__getattribute__": read, "__module__": kind.__module__})
