"""A copy of a user's function, to be asked what it makes of other batches: what it collects stays as it is."""

from __future__ import annotations

import copy
import dis
import functools
from collections.abc import Callable, Iterator
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, ModuleType
from typing import Any

from psl_flower.origin import is_users
from psl_flower.split.stored import codes


def apart(function: Callable[..., Any]) -> Callable[..., Any] | None:
    """Return a copy of a function or an object that keeps to itself what a call changes; None where there is none.

    A function is copied with what it holds, and with the user's other functions that it calls; an object with what it
    has. What its methods find outside of it, as a teacher that is a global, is not copied: then there is no copy.
    """
    memo: dict[int, Any] = {}
    try:
        made = _copied(function, memo)
        alone = not any(_finds_state(each, set()) for value in list(memo.values()) for each in _functions(value))
    except Exception:  # it holds what cannot be copied: a lock, an open file, a tensor with a graph
        return None
    return made if alone else None


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    if isinstance(value, functools.partial):
        function, args, keywords = (_copied(each, memo) for each in (value.func, value.args, value.keywords))
        return functools.partial(function, *args, **keywords)
    if isinstance(value, FunctionType) and is_users(value.__code__.co_filename):
        return memo[id(value)] if id(value) in memo else _copied_function(value, memo)
    if isinstance(value, FunctionType | ModuleType | BuiltinFunctionType | type):
        return value
    return copy.deepcopy(value, memo)


def _copied_function(function: FunctionType, memo: dict[int, Any]) -> FunctionType:
    code, scope, cells = function.__code__, dict(function.__globals__), function.__closure__ or ()
    made = FunctionType(code, scope, function.__name__, None, tuple(CellType() for _ in cells))
    memo[id(function)] = made  # first: it may call itself
    made.__defaults__ = _copied(function.__defaults__, memo)
    made.__kwdefaults__ = _copied(function.__kwdefaults__, memo)
    made.__dict__ |= _copied(function.__dict__, memo)
    for name in _globals(code):
        if name in scope:
            scope[name] = _copied(function.__globals__[name], memo)
    for cell, own in zip(made.__closure__ or (), cells, strict=True):
        cell.cell_contents = _copied(own.cell_contents, memo)
    return made


def _globals(code: CodeType) -> Iterator[str]:
    """Return the global names in code, and in the functions within it."""
    for each in codes(code):
        yield from (step.argval for step in dis.get_instructions(each) if step.opname.endswith("_GLOBAL"))


def _functions(value: Any) -> Iterator[FunctionType]:
    """Return the user's functions that a copied object shares with the original: its methods, and those it holds."""
    held = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple | set) else ()
    methods = (each for kind in type(value).__mro__ for each in vars(kind).values())
    for each in (*held, *methods):
        function = getattr(each, "fget", None) or getattr(each, "__func__", each)
        if isinstance(function, FunctionType) and is_users(function.__code__.co_filename):
            yield function


def _finds_state(function: FunctionType, seen: set[FunctionType]) -> bool:
    """Return whether a function, or one that it calls, finds outside of it what a call may change."""
    if function in seen or not is_users(function.__code__.co_filename):
        return False
    seen.add(function)
    scope = function.__globals__
    found = [scope[name] for name in _globals(function.__code__) if name in scope]
    found += [cell.cell_contents for cell in function.__closure__ or ()]
    found += [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    return any(
        _finds_state(each, seen) if isinstance(each, FunctionType) else _copied(each, {}) is not each for each in found
    )
