"""What people write in a forward that torch.fx does not record by itself, though it can: ``len``, sizes, ``assert``."""

from __future__ import annotations

import ast
import builtins
import functools
import inspect
import textwrap
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from types import FrameType, FunctionType
from typing import Any

import torch
from torch import fx, nn

# Functions of sizes. Where the first of several is a recorded one, torch takes it for the only argument.
_SIZED = ("empty", "ones", "rand", "randn", "zeros")

# What a condition must not hold, for it to be true only where all of its parts are.
_NOT_ALL = (ast.Or, ast.Not, ast.IfExp, ast.Lambda, ast.comprehension, ast.In, ast.NotIn)  # `in` asks for each
_ASKING = {"any", "bool"}  # functions that ask for truth values themselves


@contextmanager
def recordable(root: nn.Module, opened: Collection[str]) -> Iterator[None]:
    """Let the code of some modules call ``len(x)`` and ``torch.zeros(n, 8)`` with what torch.fx records.

    Parameters
    ----------
    root : nn.Module
    opened : collection of str
        Names of its submodules that are traced through.
    """
    classes = {kind for name in opened for kind in type(root.get_submodule(name)).__mro__}
    functions = [f for kind in classes for f in vars(kind).values() if isinstance(f, FunctionType)]
    codes = [f.__globals__ for f in functions if not str(f.__module__).startswith("torch.")]
    free = {id(names): names for names in codes if "len" not in names}
    sized = {name: getattr(torch, name) for name in _SIZED}
    try:
        for names in free.values():
            names["len"] = _length
        for name, function in sized.items():
            setattr(torch, name, _of_sizes(function))
        yield
    finally:
        for name, function in sized.items():
            setattr(torch, name, function)
        for names in free.values():
            del names["len"]


def _length(value: Any) -> Any:
    if not isinstance(value, fx.Proxy):
        return builtins.len(value)
    return value.tracer.create_proxy("call_function", builtins.len, (value,), {})


def _of_sizes(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*sizes: Any, **options: Any) -> Any:
        several = len(sizes) > 1 and any(isinstance(size, fx.Proxy) for size in sizes)
        return function(sizes, **options) if several else function(*sizes, **options)

    return call


def is_asserted(frame: FrameType | None) -> bool:
    """Return whether a truth value that code asks for just now must be true, as it is that of an ``assert``."""
    if frame is None:
        return False
    try:
        lines, first = inspect.getsourcelines(frame.f_code)
        code = ast.parse(textwrap.dedent("".join(lines)))
    except (OSError, SyntaxError):
        return False
    line = frame.f_lineno - first + 1
    asserts = [node for node in ast.walk(code) if isinstance(node, ast.Assert)]
    found = [node for node in asserts if node.lineno <= line <= (node.end_lineno or node.lineno)]
    parts = [part for node in found for part in ast.walk(node.test)]
    return bool(found) and not any(
        isinstance(part, _NOT_ALL) or (isinstance(part, ast.Name) and part.id in _ASKING) for part in parts
    )
