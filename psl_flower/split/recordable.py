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

from psl_flower.split.changing import changes_recorded

# Functions of sizes. Where the first of several is a recorded one, torch takes it for the only argument.
_SIZED = ("empty", "ones", "rand", "randn", "zeros")

_OF_DTYPES = ("finfo", "iinfo")

# What a condition must not hold, for it to be true only where all of its parts are.
_NOT_ALL = (ast.Or, ast.Not, ast.IfExp, ast.Lambda, ast.comprehension, ast.In, ast.NotIn)  # `in` asks for each
_NOT_NONE = (ast.And, *(kind for kind in _NOT_ALL if kind is not ast.Or))  # and for it to be false only where all are
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
    patched = {name: getattr(torch, name) for name in (*_SIZED, *_OF_DTYPES)}
    try:
        for names in free.values():
            names["len"] = _length
        for name, function in patched.items():
            setattr(torch, name, (_of_dtypes if name in _OF_DTYPES else _of_sizes)(function))
        with changes_recorded():
            yield
    finally:
        for name, function in patched.items():
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


def _of_dtypes(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*dtypes: Any, **options: Any) -> Any:
        proxy = next((each for each in (*dtypes, *options.values()) if isinstance(each, fx.Proxy)), None)
        if proxy is None:
            return function(*dtypes, **options)
        return proxy.tracer.create_proxy("call_function", function, dtypes, options)

    return call


def wanted(frame: FrameType | None) -> bool | None:
    """Return which truth value code needs that asks for one just now; None if it may go on with either.

    That of an ``assert`` must be true, and that of ``if ...: raise`` false.
    """
    if frame is None:
        return None
    try:
        lines, first = inspect.getsourcelines(frame.f_code)
        code = ast.parse(textwrap.dedent("".join(lines)))
    except (OSError, SyntaxError):
        return None
    line = frame.f_lineno - first + 1
    found = [
        node
        for node in ast.walk(code)
        if isinstance(node, ast.Assert | ast.If)
        and node.lineno <= line <= ((node if isinstance(node, ast.Assert) else node.test).end_lineno or line)
    ]
    if len(found) != 1 or (isinstance(found[0], ast.If) and not isinstance(found[0].body[-1], ast.Raise)):
        return None
    value, condition = isinstance(found[0], ast.Assert), found[0].test
    while isinstance(condition, ast.UnaryOp) and isinstance(condition.op, ast.Not):
        value, condition = not value, condition.operand
    unclear = _NOT_ALL if value else _NOT_NONE
    for part in ast.walk(condition):
        chained = not value and isinstance(part, ast.Compare) and len(part.ops) > 1
        if chained or isinstance(part, unclear) or (isinstance(part, ast.Name) and part.id in _ASKING):
            return None
    return value
