"""Recording what has to do with gradients: code under ``torch.no_grad()``, and autograd functions of one's own.

torch.fx leaves the first out of what it records, and goes through the forward of the second, so that its backward is
lost.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate
from torch.utils._pytree import tree_leaves, tree_map

from psl_flower.split.changing import changes_first, is_number
from psl_flower.split.nodes import tells_fact
from psl_flower.split.refused import BY_HAND, refused

_OF_GRAPHS = (setattr, "detach_", "requires_grad_")  # what has to do with a tensor's graph, or its place in one


def detached(values: Any, given: Sequence[Any] = (), own: Sequence[Any] = ()) -> Any:
    """Return tensors without their graph; in place of one that is among `given`, what it is in `own`."""
    return tree_map(lambda value: _detached(value, given, own) if isinstance(value, Tensor) else value, values)


def _detached(value: Tensor, given: Sequence[Any], own: Sequence[Any]) -> Tensor:
    kept: Iterator[Tensor] = (there for here, there in zip(given, own, strict=True) if here is value)
    found = next(kept, None)
    return value.detach() if found is None else found


def without_gradients(
    add: Callable[..., fx.Proxy], kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> fx.Proxy:
    """Record a step of code under ``torch.no_grad()``.

    What it is given is cut off, for it may change that in place. What it returns as it is (``h.float()``) or has
    changed keeps its graph.

    Parameters
    ----------
    add : callable
        Records one.
    kind, target, args, kwargs
        The step's.
    """
    cut_off: dict[fx.Proxy, fx.Proxy] = {}

    def given(value: Any) -> Any:
        if not isinstance(value, fx.Proxy) or is_number(value.node):
            return value
        if value not in cut_off:
            cut_off[value] = add("call_function", detached, (value,), {})
        return cut_off[value]

    if kind in ("placeholder", "get_attr") or target in _OF_GRAPHS or tells_fact(target, args):
        return add(kind, target, args, kwargs)
    made = add(kind, target, *map_aggregate((args, kwargs), given))
    first = args[0] if args else None
    if kind != "call_module" and changes_first(target) and isinstance(first, fx.Proxy) and first in cut_off:
        return first
    return add("call_function", detached, (made, [*cut_off.values()], [*cut_off]), {}) if cut_off else made


@dataclass(frozen=True)
class Apply:
    """What an autograd function's ``apply`` does, as a step; torch.fx takes that itself for a function of torch."""

    kind: type[torch.autograd.Function]

    @property
    def __name__(self) -> str:
        return self.kind.__name__

    def __call__(self, *args: Any) -> Any:
        """Call it."""
        return self.kind.apply(*args)  # type: ignore[no-untyped-call]


_KEEPING = "_NoopSaveInputs"  # of torch.utils.checkpoint in older releases: no value goes through it
_BASE: Any = torch.autograd.function._SingleLevelFunction
# Function.apply calls what this inherits; or, in later releases of torch, is that itself.
_IN_C = not isinstance(vars(torch.autograd.Function)["apply"], classmethod)
_OWNER: Any = torch.autograd.Function if _IN_C else _BASE


@contextmanager
def applied(call: Callable[..., Any], past: Callable[[type[torch.autograd.Function], Any], None]) -> Iterator[None]:
    """Have `call` do what ``apply`` of autograd functions does, also where it was taken before: ``f = Reverse.apply``.

    Parameters
    ----------
    call : callable
        Takes the class and the arguments; `apply` is what it stands in for.
    past : callable
        Given the class and the arguments of its ``forward`` where torch does not let what was taken before be stood in
        for, to refuse it.
    """
    before = vars(_OWNER).get("apply")
    try:
        _OWNER.apply = classmethod(call)
        with _forwards_watched(past) if _IN_C else nullcontext():
            yield
    finally:
        if before is None:
            del _OWNER.apply
        else:
            _OWNER.apply = before


@contextmanager
def _forwards_watched(past: Callable[[type[torch.autograd.Function], Any], None]) -> Iterator[None]:
    found: list[Any] = [torch.autograd.Function]
    for kind in found:
        found += kind.__subclasses__()
    own = {kind: vars(kind)["forward"] for kind in found if not of_torch(kind) and "forward" in vars(kind)}
    try:
        for kind, forward in own.items():
            kind.forward = staticmethod(_watched(kind, forward.__func__, past))
        yield
    finally:
        for kind, forward in own.items():
            kind.forward = forward


def _watched(kind: Any, forward: Callable[..., Any], past: Callable[..., None]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def watched(*args: Any) -> Any:
        past(kind, args)
        return forward(*args)

    return watched


def of_torch(kind: type) -> bool:
    """Return whether an autograd function is torch's own."""
    return kind.__module__.startswith("torch.")


def apply(cls: type[torch.autograd.Function], *args: Any) -> Any:
    """Do what an autograd function does by itself."""
    return super(_BASE, cls).apply(*args)


@contextmanager
def functions_recorded(recorded: Callable[[Any], Any]) -> Iterator[None]:
    """Let autograd functions of one's own be steps that are recorded, as modules are.

    Parameters
    ----------
    recorded : callable
        Returns what is recorded of one of the model's parameters, and all else as it is.
    """
    steps: dict[type, Apply] = {}  # one each, for torch.fx writes them by name

    def call(cls: type[torch.autograd.Function], *args: Any) -> Any:
        args = tree_map(recorded, args)
        proxy = next((each for each in tree_leaves(args) if isinstance(each, fx.Proxy)), None)
        if proxy is None or cls.__name__ == _KEEPING:
            return apply(cls, *args)
        if of_torch(cls):
            raise refused(
                f"{cls.__name__} of torch is no step that can be recorded: give torch.utils.checkpoint "
                f"use_reentrant=False, move the call into a submodule of its own, or {BY_HAND}."
            )
        step = steps.setdefault(cls, Apply(cls))
        return proxy.tracer.create_proxy("call_function", step, args, {})

    def past(cls: type[torch.autograd.Function], args: Any) -> None:
        if any(isinstance(each, fx.Proxy) for each in tree_leaves(tree_map(recorded, args))):
            raise refused(
                f"{cls.__name__}.apply under another name, which this release of torch does not let be recorded: call "
                f"{cls.__name__}.apply itself."
            )

    with applied(call, past):
        yield
