"""What people write in a forward that torch.fx does not record by itself, though it can: ``len``, sizes, ``assert``."""

from __future__ import annotations

import ast
import functools
import sys
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import CellType, FrameType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from psl_flower.errors import CutError
from psl_flower.origin import is_users
from psl_flower.split.asked import OURS, Type, attribute
from psl_flower.split.changing import changes_recorded
from psl_flower.split.refused import BY_HAND
from psl_flower.split.source import source_of
from psl_flower.split.stored import codes, stored_globals
from psl_flower.split.unchanged import content_of

# Functions of sizes. Where the first of several is a recorded one, torch takes it for the only argument.
_SIZED = ("empty", "ones", "rand", "randn", "zeros")

_OF_DTYPES = ("finfo", "iinfo")

# What the code that is recorded finds in place of Python's own.
_NAMES = {"getattr": attribute, "type": Type}

_CONTAINERS = (list, dict, set, deque, np.ndarray)
_MOST = 100  # entries of one container that are looked at

# What a condition must not hold, for it to be true only where all of its parts are.
_NOT_ALL = (ast.Or, ast.Not, ast.IfExp, ast.Lambda, ast.comprehension, ast.In, ast.NotIn)  # `in` asks for each
_NOT_NONE = (ast.And, *(kind for kind in _NOT_ALL if kind is not ast.Or))  # and for it to be false only where all are
_ASKING = {"any", "bool"}  # functions that ask for truth values themselves


@contextmanager
def recordable(root: nn.Module, opened: Collection[str]) -> Iterator[None]:
    """Let code call ``type(x)`` and ``torch.zeros(n, 8)`` with what torch.fx records: of modules, and what they call.

    Parameters
    ----------
    root : nn.Module
    opened : collection of str
        Names of its submodules that are traced through.
    """
    functions = _called(root, opened)
    patched = {name: getattr(torch, name) for name in (*_SIZED, *_OF_DTYPES)}
    try:
        for name, function in patched.items():
            setattr(torch, name, (_of_dtypes if name in _OF_DTYPES else _of_sizes)(function))
        with _given(functions, _NAMES), changes_recorded(), _globals_unchanged(functions):
            yield
    finally:
        for name, function in patched.items():
            setattr(torch, name, function)


@contextmanager
def answered_as_run(root: nn.Module) -> Iterator[None]:
    """Tell code that torch.export records the type of its stand-ins as that of tensors; it must change no globals."""
    functions = _called(root, [name for name, _ in root.named_modules()])
    with _given(functions, {"type": Type}), _globals_unchanged(functions):
        yield


@contextmanager
def _given(functions: Iterable[FunctionType], names: Mapping[str, Any]) -> Iterator[None]:
    """Let functions find these in place of Python's own, unless they have their own."""
    spaces = {id(function.__globals__): function.__globals__ for function in functions}
    free = [(space, names.keys() - space.keys()) for space in spaces.values()]
    try:
        for space, added in free:
            space.update((name, names[name]) for name in added)
        yield
    finally:
        for space, added in free:
            for name in added:
                del space[name]


def _called(root: nn.Module, opened: Collection[str]) -> set[FunctionType]:
    """Return the methods of some modules, and what these call by name or attribute, but torch's functions and ours."""
    found, seen = set[FunctionType](), set[int]()
    modules = [root.get_submodule(name) for name in opened]
    waiting: list[Any] = [each for module in modules for each in (type(module), *vars(module).values())]
    while waiting:
        each = waiting.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, FunctionType) and not _is_other(each):
            found.add(each)
            names = {name for code in codes(each.__code__) for name in code.co_names}
            named = [each.__globals__[name] for name in names if name in each.__globals__]
            named += [vars(module).get(name) for module in named if isinstance(module, ModuleType) for name in names]
            waiting += [each for each in named if isinstance(each, _FUNCTIONS)]
            waiting += [cell.cell_contents for cell in each.__closure__ or () if cell != _EMPTY]
        waiting += _behind(each)
    return found


_EMPTY = CellType()
_FUNCTIONS = (FunctionType, functools.partial, type(functools.cache(len)))


def _is_other(value: Any) -> bool:
    """Return whether a function or class is Python's own, torch's or ours: its code does not decide by types."""
    module = f"{getattr(value, '__module__', '')}."
    return module.startswith(OURS) or module.partition(".")[0] in sys.stdlib_module_names


def _behind(value: Any) -> Iterable[Any]:
    """Return what is called, maybe, where a value is, or one that it holds."""
    if isinstance(value, functools.partial):
        return (value.func,)
    if isinstance(value, property):
        return (value.fget,)
    if isinstance(value, list | tuple):
        return value[:_MOST]
    if isinstance(value, dict):
        return [*value.values()][:_MOST]
    if isinstance(value, type):
        return [each for kind in value.__mro__ if not _is_other(kind) for each in vars(kind).values()]
    if isinstance(value, MethodType | classmethod | staticmethod):
        return (value.__func__,)
    if isinstance(value, _FUNCTIONS):
        return (vars(value).get("__wrapped__"),)
    return () if _is_other(type(value)) else (type(value),)


@contextmanager
def _globals_unchanged(functions: Collection[FunctionType]) -> Iterator[None]:
    """Refuse code that sets a ``global`` name, or changes what the user's own hold: that would not be recorded."""
    before = {(id(f.__globals__), name): (f.__globals__, name) for f in functions for name in _globals_of(f)}
    held = {key: (space.get(name), content_of(space.get(name))) for key, (space, name) in before.items()}
    yield
    for key, (space, name) in before.items():
        value, content = held[key]
        if content_of(space.get(name)) != content:
            space[name] = value
            raise CutError(
                f"the model's forward changes the global {name!r}, and that would not be recorded: make it a buffer, "
                f"set it before, move this code into a submodule of its own, or {BY_HAND}."
            )


def _globals_of(function: FunctionType) -> Iterator[str]:
    """Yield the global names that a function sets, and those by which it may change a container."""
    names = function.__globals__
    for code in codes(function.__code__):
        yield from stored_globals(code)
        if is_users(code.co_filename):
            yield from (name for name in code.co_names if type(names.get(name)) in _CONTAINERS)


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

    That of an ``assert`` must be true, that of ``if ...: raise`` false, and that of ``if ...: ... else: raise`` true.
    """
    source = None if frame is None else source_of(frame)
    if source is None:
        return None
    code, line = source
    found = [
        node
        for node in ast.walk(code)
        if isinstance(node, ast.Assert | ast.If)
        and node.lineno <= line <= ((node if isinstance(node, ast.Assert) else node.test).end_lineno or line)
    ]
    if len(found) != 1:
        return None
    value, condition = _holding(found[0]), found[0].test
    if value is None:
        return None
    while isinstance(condition, ast.UnaryOp) and isinstance(condition.op, ast.Not):
        value, condition = not value, condition.operand
    unclear = _NOT_ALL if value else _NOT_NONE
    for part in ast.walk(condition):
        chained = not value and isinstance(part, ast.Compare) and len(part.ops) > 1
        if chained or isinstance(part, unclear) or (isinstance(part, ast.Name) and part.id in _ASKING):
            return None
    return value


def _holding(statement: ast.Assert | ast.If) -> bool | None:
    """Return which truth value of its condition goes on without an error; None if both do."""
    if isinstance(statement, ast.Assert):
        return True
    if isinstance(statement.body[-1], ast.Raise):
        return False
    return True if statement.orelse and isinstance(statement.orelse[-1], ast.Raise) else None
