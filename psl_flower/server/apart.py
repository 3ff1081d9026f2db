"""A copy of a user's function, to be asked what it makes of other batches: what it collects stays as it is."""

from __future__ import annotations

import copy
import dis
import functools
import inspect
from collections.abc import Callable, Iterator
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from psl_flower.origin import is_users
from psl_flower.split.stored import codes, stored_globals


def apart(function: Callable[..., Any]) -> Callable[..., Any] | None:
    """Return a copy of a function or an object that keeps to itself what a call changes; None where there is none.

    A function is copied with what it holds, and with what it finds outside of it: the user's other functions, a teacher
    that is a global. An object is copied with what it has, and its methods as functions are.
    """
    memo: dict[int, Any] = {}
    try:
        made = _copied(function, memo)
        done = {id(memo)}  # where deepcopy keeps originals
        while new := memo.keys() - done:
            done |= new
            for key in new:
                _own_methods(memo[key], memo)
    except Exception:  # it holds what cannot be copied: a lock, an open file, a tensor with a graph
        return None
    return made  # type: ignore[no-any-return]


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    if isinstance(value, functools.partial):
        function, args, keywords = (_copied(each, memo) for each in (value.func, value.args, value.keywords))
        return functools.partial(function, *args, **keywords)
    if _is_theirs(value):
        return memo[id(value)] if id(value) in memo else _copied_function(value, memo)
    if isinstance(value, MethodType):
        return MethodType(_copied(value.__func__, memo), _copied(value.__self__, memo))
    if isinstance(value, FunctionType | ModuleType | BuiltinFunctionType | type):
        return value
    return copy.deepcopy(value, memo)


def _copied_function(function: FunctionType, memo: dict[int, Any]) -> FunctionType:
    code, scope, cells = function.__code__, dict(function.__globals__), function.__closure__ or ()
    made = FunctionType(code, scope, function.__name__, None, tuple(CellType() for _ in cells))
    memo[id(function)] = made  # first: it may call itself
    made.__defaults__ = _copied(function.__defaults__, memo)
    made.__kwdefaults__ = _copied(function.__kwdefaults__, memo)
    made.__dict__ |= {name: _copied(each, memo) for name, each in function.__dict__.items()}
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


def _own_methods(value: Any, memo: dict[int, Any]) -> None:
    """Give a copied object a class of its own with copies of its methods, if these find outside of it what may change.

    Raises
    ------
    TypeError
        If it shares other functions that do, with the original.
    """
    if isinstance(value, FunctionType | type):
        return
    kind: Any = type(value)
    own, shared = dict[str, Any](), list[FunctionType]()
    seen = set[str]()
    for each in kind.__mro__:
        for name, attribute in vars(each).items():
            function = _function(attribute)
            if function is not None and name in seen:  # for super() to find
                shared.append(function)
            elif function is not None:
                own[name] = attribute
            seen.add(name)
    held = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple | set) else ()
    shared += [function for each in held if (function := _function(each)) is not None]
    if any(_finds_state(each, set(), memo) for each in shared):
        raise TypeError(f"{kind.__name__} shares functions with the original")
    if not any(_finds_state(function, set(), memo) for each in own.values() if (function := _function(each))):
        return
    if id(kind) not in memo:
        if _function(kind.__init_subclass__) or any(map(_function, vars(type(kind)).values())):
            raise TypeError(f"{kind.__name__} is told of classes that are derived from it")
        made = {name: _copied_method(each, memo) for name, each in own.items()}
        memo[id(kind)] = type(kind)(kind.__name__, (kind,), {"__slots__": (), "__module__": kind.__module__, **made})
    value.__class__ = memo[id(kind)]


def _function(value: Any) -> FunctionType | None:
    """Return the user's function that is a method, a property, or is held; None where there is none."""
    function = getattr(value, "fget", None) or getattr(value, "__func__", value)
    return function if _is_theirs(function) else None


def _is_theirs(value: Any) -> bool:
    """Return whether it is a function of the user's, or one of a library's around it, as of ``torch.no_grad()``."""
    if not isinstance(value, FunctionType):
        return False
    inner = inspect.unwrap(value)
    return isinstance(inner, FunctionType) and is_users(inner.__code__.co_filename)


def _copied_method(value: Any, memo: dict[int, Any]) -> Any:
    if isinstance(value, property):
        return property(_copied(value.fget, memo), value.fset, value.fdel)
    if isinstance(value, staticmethod | classmethod):
        return type(value)(_copied(value.__func__, memo))
    return _copied(value, memo)


def _finds_state(function: FunctionType, seen: set[FunctionType], memo: dict[int, Any]) -> bool:
    """Return whether a function, or one that it calls, finds outside of it what a call may change."""
    if function in seen or not _is_theirs(function):
        return False
    seen.add(function)
    if any(True for each in codes(function.__code__) for _ in stored_globals(each)):
        return True
    scope = function.__globals__
    found = [scope[name] for name in _globals(function.__code__) if name in scope]
    found += [cell.cell_contents for cell in function.__closure__ or ()]
    found += [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    return any(
        _finds_state(each, seen, memo) if isinstance(each, FunctionType) else _copied(each, memo) is not each
        for each in found
    )
