"""Recording what code changes in place: ``h += 1``, ``h[:, 0] = 0``, ``h.data = v``.

torch.fx makes ``h = h + 1`` of the first, and another name of the same tensor is left as it was; the others it refuses,
or forgets.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx

from psl_flower.split.nodes import asks_for_fact
from psl_flower.split.refused import BY_HAND, refused

# A tensor has no @= of its own: Python makes h = h @ w of it.
OPERATORS = (
    "iadd",
    "isub",
    "imul",
    "itruediv",
    "ifloordiv",
    "imod",
    "ipow",
    "iand",
    "ior",
    "ixor",
    "ilshift",
    "irshift",
)


def _function(name: str) -> Callable[[Any, Any], Any]:
    change = getattr(operator, name)

    def function(value: Any, other: Any) -> Any:
        return change(value, other)

    function.__name__ = function.__qualname__ = name
    return function


# Not those of `operator`: torch.fx writes `h += 1` for them, which is another h where h is no tensor.
iadd, isub, imul, itruediv, ifloordiv, imod, ipow, iand, ior, ixor, ilshift, irshift = map(_function, OPERATORS)

# What changes its first argument, beside what has a name that ends with "_".
CHANGING = frozenset(
    {operator.setitem, setattr, *(globals()[name] for name in OPERATORS), *(getattr(operator, n) for n in OPERATORS)}
)
_METHODS = {"__setitem__", *(f"__{name}__" for name in OPERATORS)}
_NO_VALUES = {"requires_grad_", "rename_"}
_NO_CHANGES = {operator.and_, operator.or_, operator.not_, operator.is_}  # words of Python's


# What makes a tensor of the sizes, dtype or device of another.
_LIKE: dict[str, Callable[..., Any]] = {
    "zeros": torch.zeros,
    "ones": torch.ones,
    "empty": torch.empty,
    "full": torch.full,
}
_MADE_LIKE = {*(f"{name}_like" for name in _LIKE), *(f"new_{name}" for name in _LIKE)}


@contextmanager
def changes_recorded() -> Iterator[None]:
    """Let what torch.fx stands in for tensors with be changed in place."""
    added: dict[str, Callable[..., Any]] = {f"__{name}__": _operator(globals()[name]) for name in OPERATORS}
    added |= {"__setitem__": _set_item, "__setattr__": _set_attribute}
    try:
        for name, method in added.items():
            setattr(fx.Proxy, name, method)
        yield
    finally:
        for name in added:
            delattr(fx.Proxy, name)


def _operator(function: Callable[[Any, Any], Any]) -> Callable[[fx.Proxy, Any], Any]:
    def change(self: fx.Proxy, other: Any) -> Any:
        return NotImplemented if is_number(self.node) else _record(self, function, other)

    return change


def _set_item(self: fx.Proxy, index: Any, value: Any) -> None:
    _record(self, operator.setitem, index, value)


def _set_attribute(self: fx.Proxy, name: str, value: Any) -> None:
    if name in ("data", "grad", "requires_grad"):
        if isinstance(value, torch.Tensor):  # made once, and changed with what it becomes
            value = self.tracer.create_proxy("call_method", "clone", (value,), {})
        _record(self, setattr, name, value)
    else:  # of the stand-in itself, or of the user's, which is read from it again
        object.__setattr__(self, name, value)


def _record(proxy: fx.Proxy, function: Callable[..., Any], *others: Any) -> fx.Proxy:
    return proxy.tracer.create_proxy("call_function", function, (proxy, *others), {})


def made_like(tracer: fx.Tracer, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Proxy | None:
    """Record ``torch.zeros(h.shape, ...)`` in place of ``torch.zeros_like(h)``, and the like: h itself is not needed.

    None if a step is no such, or sizes are given that may be one or several.
    """
    name = str(getattr(target, "__name__", target))
    make = _LIKE.get(name.removesuffix("_like").removeprefix("new_")) if name in _MADE_LIKE else None
    if make is None or not args or not isinstance(args[0], fx.Proxy) or {"size", "memory_format"} & kwargs.keys():
        return None
    h, *rest = args
    if name.endswith("_like"):
        sizes: Any = h.shape
    elif make is torch.full:
        sizes, *rest = rest
    else:
        sizes, rest = (rest[0] if len(rest) == 1 else rest), []
        if isinstance(sizes, fx.Proxy):
            if not _is_shape(sizes.node):
                return None
        elif isinstance(sizes, int):
            sizes = (sizes,)
    options = {"dtype": h.dtype, "device": h.device, **kwargs}
    return tracer.create_proxy("call_function", make, (sizes, *rest), options)


def _is_shape(node: fx.Node) -> bool:
    """Return whether a step gives all sizes of a tensor."""
    if node.target is getattr:
        return node.args[1] == "shape"
    return node.target == "size" and len(node.args) == 1 and not node.kwargs


def is_number(node: fx.Node) -> bool:
    """Return whether a step gives sizes, a dtype or another fact, or what is computed of such: no tensor."""
    sources = node.all_input_nodes
    return asks_for_fact(node) or (node.op == "call_function" and bool(sources) and all(map(is_number, sources)))


class Fresh:
    """The tensors that code makes of no input, and then changes in place by what it computes of its inputs.

    They are made once, while recording; each run is to begin with a copy.
    """

    def __init__(self) -> None:
        self._copies: list[tuple[torch.Tensor, fx.Proxy]] = []

    def recorded(self, tracer: fx.Tracer, kind: str, target: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return the arguments of a step that is recorded, a copy in place of a tensor that it changes."""
        changes = (
            target in CHANGING if kind == "call_function" else kind == "call_method" and changes_first(str(target))
        )
        if not changes or not args or not isinstance(args[0], torch.Tensor):
            return args
        if (copied := self.copy_of(args[0])) is None:
            copied = tracer.create_proxy("call_method", "clone", (args[0],), {})
            self._copies.append((args[0], copied))
        return (copied, *args[1:])

    def copy_of(self, tensor: torch.Tensor) -> fx.Proxy | None:
        """Return what is recorded of a tensor, if it was changed.

        Raises
        ------
        CutError
            If it shows values of one that was.
        """
        for changed, copied in self._copies:
            if tensor is changed:
                return copied
        self.refuse([tensor])
        return None

    def refuse(self, tensors: Iterable[torch.Tensor]) -> None:
        """Refuse to compute with tensors that were changed, for the change is recorded and not made.

        Raises
        ------
        CutError
            If one of these was.
        """
        changed = {tensor.untyped_storage()._cdata for tensor, _ in self._copies}
        if changed and any(tensor.untyped_storage()._cdata in changed for tensor in tensors):
            raise refused(
                "a tensor that the code makes of no input is changed in place by what it computes of its inputs, and "
                "what it is then is not known while torch.fx records: make it of an input (x.new_zeros(len(x), 8), "
                f"torch.zeros_like(h)), or {BY_HAND}."
            )


def changes_first(target: Any) -> bool:
    """Return whether a function, or a method by its name, changes its first argument, as its name tells."""
    name = str(getattr(target, "__name__", target))
    by_name = name.endswith("_") and not name.endswith("__") and name not in _NO_VALUES and target not in _NO_CHANGES
    return target in CHANGING or name in _METHODS or by_name
