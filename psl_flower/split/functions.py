"""What functions a part of a model calls, by names that are the same for a layer and for the function it stands for.

``nn.ReLU()`` and ``F.relu`` are one: two sides may write either.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.utils._pytree import tree_leaves

from psl_flower.split.stored import codes

_BY_DIMENSION = ("softmax", "log_softmax", "softmin", "glu")
_DEFAULTS = {"gelu": ("none",), "softplus": (1.0, 20.0)}  # of functions written in C, which do not tell
_NAMES = [name for name in [*dir(torch), *dir(F)] if name[0].islower() and not name.endswith("_")]
_FUNCTIONS = {name.replace("_", ""): name for name in _NAMES}


def of_layer(kind: str) -> str | None:
    """Return the name of the function that a class of torch's layers stands for, if it does for one."""
    return _FUNCTIONS.get(kind.lower())


def called(node: fx.Node, root: nn.Module) -> str:
    """Return what a node of a graph does: a function by its name alone, which may be imported from elsewhere.

    With it, in brackets, the numbers with a point and the words that it is called with, or else its defaults: whole
    numbers may be sizes.
    """
    if node.op == "call_module":
        layer = root.get_submodule(str(node.target))
        kind = type(layer)
        name = of_layer(kind.__name__) if kind.__module__.startswith("torch.nn.") and not layer.state_dict() else None
        if name is None:
            return f"call_module {node.target}"
        return _written(
            name, [getattr(layer, each) for each in getattr(kind, "__constants__", ()) if each != "inplace"]
        )
    if node.op not in ("call_function", "call_method"):
        return node.op
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    options = _options(node.target, node, name.removesuffix(".default"))
    if str(getattr(node.target, "__module__", "")).startswith("psl_flower.") or node.target is torch._assert:
        options = (value for value in options if not isinstance(value, str))  # what is said of lines of code
    return _written(name, options)


def _options(function: Any, node: fx.Node, name: str) -> Iterable[Any]:
    given = tree_leaves((node.args, node.kwargs))
    if not isinstance(function, str):
        try:
            bound = inspect.signature(function).bind(*node.args, **node.kwargs)
        except (TypeError, ValueError):
            return given if len(given) > 1 else _DEFAULTS.get(name, ())
        bound.apply_defaults()
        given = [value for key, value in bound.arguments.items() if not key.startswith("_")]
    return tree_leaves(given)


def _written(name: str, options: Iterable[Any]) -> str:
    kinds = (float, str, int) if name in _BY_DIMENSION else (float, str)
    shown = ", ".join(sorted(repr(value) for value in options if type(value) in kinds))
    return f"call_function {name}" + (f"({shown})" if shown else "")


def in_code(module: nn.Module) -> list[str]:
    """Return the functions of torch that the forward of a module names."""
    function: Callable[..., Any] = inspect.unwrap(type(module).forward)
    code = getattr(function, "__code__", None)
    names = {name for each in codes(code) for name in each.co_names} if code is not None else set()
    return sorted(names.intersection(_FUNCTIONS.values()))
