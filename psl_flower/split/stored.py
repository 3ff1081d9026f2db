"""What a module's forward leaves on the module for others to read: an auxiliary loss, attention weights.

torch.fx calls most modules without running them. What their forward would set is not there then, and whoever reads it
gets what ``__init__`` put there, which would be recorded for ever.
"""

from __future__ import annotations

import contextlib
import dis
import functools
import inspect
from abc import ABCMeta
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from psl_flower.split.refused import BY_HAND, refused

_HELD = "_psl_held"  # where a module has the names of the buffers that were plain attributes
_BY_STRING = {"setattr", "__setattr__", "__dict__", "vars"}  # what takes names of attributes as strings
_STORE_GLOBAL = dis.opmap["STORE_GLOBAL"]


@functools.cache
def stored_names(kind: type[nn.Module], *, loosely: bool = False) -> frozenset[str]:
    """Return the attributes that a class of modules sets in ``forward``, or in methods of its own that it calls.

    Parameters
    ----------
    kind : type
    loosely : bool
        Also what it may set or look up by a string, as ``setattr(self, "seen", h)`` does.
    """
    return _stored(getattr(kind, "forward", None), kind, loosely=loosely)


def _stored(function: Any, kind: type, *, loosely: bool) -> frozenset[str]:
    """Return the attributes that a function sets, or what it calls: methods of `kind`, and functions that it wraps."""
    found, waiting, seen = set[str](), [function], set[Any]()
    while waiting:
        each = inspect.unwrap(waiting.pop())
        if not isinstance(each, FunctionType) or each in seen:
            continue
        seen.add(each)
        for cell in each.__closure__ or ():
            with contextlib.suppress(ValueError):  # an empty one
                waiting.append(cell.cell_contents)
        for code in codes(each.__code__):
            for step in dis.get_instructions(code):
                if step.opname == "STORE_ATTR":
                    found.add(step.argval)
                elif step.opname in ("LOAD_ATTR", "LOAD_METHOD") and not hasattr(nn.Module, step.argval):
                    waiting.append(getattr(kind, step.argval, None))
            if loosely and _BY_STRING & set(code.co_names):
                found |= {each for each in code.co_consts if isinstance(each, str)}
    return frozenset(found)


def codes(code: CodeType) -> Iterator[CodeType]:
    """Yield the code of a function, and of those that are defined in it."""
    yield code
    for each in code.co_consts:
        if isinstance(each, CodeType):
            yield from codes(each)


def stored_globals(code: CodeType) -> Iterator[str]:
    """Yield the global names that code sets, but not what is defined in it."""
    if _STORE_GLOBAL in code.co_code[::2]:  # a thousand functions may be asked for, and few of them do
        yield from (str(step.argval) for step in dis.get_instructions(code) if step.opname == "STORE_GLOBAL")


def _by_hooks(part: nn.Module) -> frozenset[str]:
    """Return the attributes that hooks of a forward pass may set, on whatever module."""
    found = set[str]()
    for module in part.modules():
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            if isinstance(hook, MethodType):
                found |= _stored(hook.__func__, type(hook.__self__), loosely=True)
            else:
                found |= _stored(
                    hook if isinstance(hook, FunctionType) else type(hook).__call__, type(hook), loosely=True
                )
    return frozenset(found)


def hold_tensors(part: nn.Module) -> None:
    """Make buffers of tensors that modules hold as plain attributes, so that clients are sent the server's.

    A client makes its own model, and where they are drawn at random, as a fixed projection is, they would be others. A
    state dict leaves them out, as before; what a forward or a hook sets anew, and what cannot travel, is left as it is.
    """
    by_hooks = _by_hooks(part)
    for module in part.modules():
        kind: Any = type(module)
        left = stored_names(kind, loosely=True) | by_hooks
        for name, value in list(vars(module).items()):
            if _travels(value) and not hasattr(kind, name) and name not in left:
                delattr(module, name)
                module.register_buffer(name, value.detach().clone(), persistent=False)
                vars(module).setdefault(_HELD, set()).add(name)


def held_names(part: nn.Module) -> set[str]:
    """Return the names of a part's buffers that `hold_tensors` has made."""
    return {f"{at}.{name}".lstrip(".") for at, module in part.named_modules() for name in vars(module).get(_HELD, ())}


def is_plain(part: nn.Module, name: str) -> bool:
    """Return whether a module of a part holds what has this name, or has a place for it, as a plain attribute."""
    at, _, leaf = name.rpartition(".")
    return leaf in vars(dict(part.named_modules()).get(at, nn.Module()))


def _travels(value: Any) -> bool:
    plain = type(value) in (torch.Tensor, nn.Parameter)
    return plain and value.layout is torch.strided and not (value.is_quantized or value.is_meta)


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
        quiet = type(kind) in (type, ABCMeta)  # of another, which may keep a list of its classes, none is derived
        if stored and quiet and name not in opened and not kind.__module__.startswith("torch."):
            watched.append((module, kind))
            module.__class__ = _watching(kind, name, frozenset(stored))
    try:
        yield
    finally:
        for module, kind in watched:
            module.__class__ = kind


class _Unlisted:
    """Hides from a class that another is derived from it: it may keep a list of these."""

    def __init_subclass__(cls) -> None:
        pass


def _watching(kind: type[nn.Module], where: str, stored: frozenset[str]) -> type[nn.Module]:
    def read(self: nn.Module, name: str) -> Any:
        if name in stored:
            raise refused(
                f"'{where}.{name}' is read, which the forward of {where!r} ({kind.__name__}) sets, and torch.fx would "
                f"record the value it has now for ever: have that forward return it, or {BY_HAND}."
            )
        return kind.__getattribute__(self, name)

    return type(kind.__name__, (_Unlisted, kind), {"__getattribute__": read, "__module__": kind.__module__})
