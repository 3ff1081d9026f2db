"""A deep copy of a model, refused where it would be another model than the original."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from types import FunctionType, MethodType
from typing import Any, TypeVar

import torch
from torch import nn

from psl_flower.errors import ConfigError
from psl_flower.split.stored import stored_names

M = TypeVar("M", bound=nn.Module)

_HOOKS = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
_COMPILED = "_compiled_call_impl"  # of module.compile(): a copy goes on without it
_MOST_LOOKED_AT, _MOST_IN_ONE = 10_000, 1_000  # things that functions of a module hold, and in one container


def copy_model(model: M, *, share_frozen: bool = False) -> M:
    """Return a deep copy of a model; the values of frozen parameters may be shared, so that memory holds them once.

    Raises
    ------
    ConfigError
        If it has lazy layers that have seen no data yet, trainable modules of torch.jit, tensors that were
        computed and cannot be copied, gradient hooks, which a copy does not have, or functions that hold its modules or
        tensors, of which a copy has the original's.
    """
    tensors = itertools.chain(model.named_parameters(), model.named_buffers())
    lazy = next((name for name, tensor in tensors if nn.parameter.is_lazy(tensor)), None)
    if lazy is not None:
        raise ConfigError(f"{lazy!r} has no shape yet, as its layer is lazy: run the model once on an example first")
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule) and any(p.requires_grad for p in module.parameters()):
            raise ConfigError(
                f"{name!r} is a module of torch.jit, of which a copy does not train: use the nn.Module that it was "
                "made of, or freeze it, requires_grad_(False)"
            )
    _check_gradient_hooks(model)
    _check_functions(model)
    frozen = [p for p in model.parameters() if not p.requires_grad] if share_frozen else []
    shared: dict[int, torch.Tensor] = {id(p): nn.Parameter(p.data, requires_grad=False) for p in frozen}
    shared |= {id(t): t.detach() for t in _left_behind(model)}
    try:
        with torch.inference_mode(False):  # tensors of that mode do not train
            return copy.deepcopy(model, shared)
    except RuntimeError as exc:
        computed = [
            f"{name}.{key}".lstrip(".")
            for name, module in model.named_modules()
            for key, value in vars(module).items()
            if isinstance(value, torch.Tensor) and not value.is_leaf
        ]
        if not computed:
            raise
        raise ConfigError(
            f"the model cannot be copied, as {computed[0]!r} was computed of its parameters: compute it in forward, or "
            "make it a buffer; in place of torch.nn.utils.weight_norm use torch.nn.utils.parametrizations.weight_norm; "
            "after torch.nn.utils.prune call prune.remove(module, name)"
        ) from exc


def _left_behind(model: nn.Module) -> Iterator[torch.Tensor]:
    """Yield computed tensors that the forward of a model that has been run left on its modules: it will set others."""
    for module in model.modules():
        kind: Any = type(module)
        for name, value in vars(module).items():
            if isinstance(value, torch.Tensor) and not value.is_leaf and name in stored_names(kind):
                yield value


def _check_gradient_hooks(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise ConfigError(
                f"{name!r} has a gradient hook, which no copy of the model has, and which would see the gradients of "
                "one client: change them where they are all together, in the optimizer (register_step_pre_hook)"
            )


def _check_functions(model: nn.Module) -> None:
    names = {id(value): name for name, value in model.named_modules()} | {
        id(value): name for name, value in itertools.chain(model.named_parameters(), model.named_buffers())
    }
    for name, module in model.named_modules():
        if hasattr(module, "_orig_mod"):
            continue  # of torch.compile: a copy makes its forward anew
        held = [
            (f"{name}.{key}".lstrip("."), value)
            for key, value in vars(module).items()
            if key not in (*_HOOKS, _COMPILED)
        ]
        hooks = [hook for key in _HOOKS for hook in vars(module).get(key, {}).values()]
        for where, value in [*((f"a hook of {name or 'the model'}", hook) for hook in hooks), *held]:
            known = next((names[id(v)] for v in _held_by(value) if id(v) in names), None)
            if known is not None:
                raise ConfigError(
                    f"{where} is a function that holds {known or 'the model'!r}: a copy of the model would go on with "
                    "that of the original, which is not trained. Make it a method of a class, or take it off"
                )


def _held_by(value: Any) -> Iterator[Any]:
    """Yield what the functions in a value have from around them, of whatever depth: a copy of it has the same.

    A partial, a bound method or a container is copied with all it holds, unless a function holds it.
    """
    functions = [each for each in _reached([value]) if isinstance(each, FunctionType)]
    yield from _reached([each for function in functions for each in _around(function)], through_functions=True)


def _reached(values: Iterable[Any], *, through_functions: bool = False) -> Iterator[Any]:
    waiting, seen = deque(values), set[int]()
    while waiting and len(seen) < _MOST_LOOKED_AT:
        value = waiting.popleft()
        if id(value) in seen:
            continue
        seen.add(id(value))
        yield value
        if isinstance(value, functools.partial):
            waiting += (value.func, *value.args, *value.keywords.values())
        elif isinstance(value, MethodType):
            waiting += (value.__self__, value.__func__)
        elif isinstance(value, Mapping):
            waiting += itertools.islice(value.values(), _MOST_IN_ONE)
        elif isinstance(value, list | tuple | set | frozenset):
            waiting += itertools.islice(value, _MOST_IN_ONE)
        elif isinstance(value, FunctionType) and through_functions:
            waiting += _around(value)


def _around(function: FunctionType) -> Iterator[Any]:
    """Yield what a function has itself."""
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # an empty one
            yield cell.cell_contents
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    yield from (function.__globals__[n] for n in function.__code__.co_names if n in function.__globals__)
