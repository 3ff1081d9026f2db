"""Tracing a model with torch.fx, as far as a cut needs it."""

from __future__ import annotations

import inspect
import pickle
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from psl_flower.errors import CutError

# Note [Tracing and threads]: while torch.fx traces, it patches nn.Module for the whole process. The lock keeps two
# traces apart, and the tracer lets modules that other threads call meanwhile run as ever.
_FX_LOCK = threading.Lock()


@dataclass(frozen=True, eq=False)
class Trace:
    """What a model does, recorded in training and in evaluation.

    Parameters
    ----------
    graphs : dict[bool, fx.Graph]
        The model's graph for each value its ``training`` flag takes; one and the same graph if they do not differ.
    pinned : dict[bool, frozenset[str]]
        Submodules that ``model.train(mode)`` leaves in the other mode (a model that overrides ``train`` to keep a part
        of itself frozen), for each ``mode``.
    """

    graphs: dict[bool, fx.Graph]
    pinned: dict[bool, frozenset[str]]


def trace(root: nn.Module, cut: str) -> Trace:
    """Record what `root` does around the submodule `cut`.

    Only `root` and the modules that contain `cut` are traced through; every other module is called as it is. So a
    module is free to do what torch.fx cannot record, as long as the cut is not inside it.

    Parameters
    ----------
    root : nn.Module
        Constants that its forward makes are stored on it; otherwise it is left as it was.
    cut : str
        Qualified name of a submodule, the first one ``root.named_modules()`` gives it.

    Raises
    ------
    CutError
        If the code around the cut depends on values, draws random numbers, or switches autograd or autocast.
    """
    steps = cut.split(".")
    opened = frozenset(".".join(steps[:depth]) for depth in range(len(steps)))
    flags = {module: module.training for module in root.modules()}
    graphs: dict[bool, fx.Graph] = {}
    pinned: dict[bool, frozenset[str]] = {}
    try:
        for mode in (True, False):
            root.train(mode)
            pinned[mode] = frozenset(name for name, module in root.named_modules() if module.training != mode)
            graph = _trace_once(root, opened)
            same = (other for other in graphs.values() if str(other) == str(graph))
            graphs[root.training] = next(same, graph)
    except CutError:
        raise
    except Exception as error:  # symbolic execution runs the user's code: anything may come
        raise CutError(
            f"torch.fx cannot trace {_class_names(root, opened)}, which a cut there needs "
            f"({type(error).__name__}: {_first_line(error)}). Cut at a module outside the code that cannot be traced, "
            f"or cut by hand: SplitModel(client=..., server=...)."
        ) from error
    finally:
        for module, flag in flags.items():
            module.training = flag
    return Trace(graphs, pinned)


def _trace_once(root: nn.Module, opened: frozenset[str]) -> fx.Graph:
    """Trace `root` in its present mode, refusing what would happen now, once, instead of at every call."""
    remedy = "or cut by hand: SplitModel(client=..., server=...)."
    attributes = _attributes(root)
    for _ in range(3):  # more than once, for these generators are global: it may have been another thread that drew
        states = _random_states()
        with _FX_LOCK, _RefuseRandomTensors():  # type: ignore[no-untyped-call]
            graph = _PathTracer(opened).trace(root)
        if _random_states() == states:
            break
    else:
        raise CutError(
            f"{type(root).__name__} draws random numbers in Python, and torch.fx would record one draw for ever: use "
            f"torch (nn.Dropout, or a function of a tensor such as torch.rand_like), {remedy}"
        )
    after = _attributes(root)
    changed = [name for name, version in attributes.items() if after.get(name) != version]
    if changed:
        raise CutError(
            f"the model's forward changes {changed[0]!r}, which is neither parameter nor buffer, and torch.fx would "
            f"not record that: register it as a buffer, move it into a submodule of its own, {remedy}"
        )
    return graph


class _PathTracer(fx.Tracer):
    """A tracer that goes through the modules named in `opened` and calls all others whole."""

    def __init__(self, opened: frozenset[str]) -> None:
        super().__init__(param_shapes_constant=True)
        self._opened = opened
        self._contexts = _contexts()
        self._thread = threading.get_ident()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name not in self._opened

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """Make placeholders of the inputs that have no default; the others keep their default."""
        positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        inputs = [
            parameter.name
            for parameter in inspect.signature(self.root.forward).parameters.values()
            if parameter.default is parameter.empty and parameter.kind in positional
        ]
        # calling the module, not its forward, runs the hooks on it as well
        return self.root.__call__, [self.create_proxy("placeholder", name, (), {}) for name in inputs]

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)  # Note [Tracing and threads]
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        """Record reading a buffer too, so that what is computed from it is not frozen into a constant."""
        if threading.get_ident() != self._thread:
            return attr_val  # Note [Tracing and threads]
        if not isinstance(attr_val, torch.Tensor) or isinstance(attr_val, nn.Parameter):
            return super().getattr(attr, attr_val, parameter_proxy_cache)
        name = next((name for name, buffer in self.root.named_buffers() if buffer is attr_val), None)
        if name is None:
            return attr_val
        if name not in parameter_proxy_cache:
            parameter_proxy_cache[name] = self.create_proxy("get_attr", name, (), {})
        return parameter_proxy_cache[name]

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        if _contexts() != self._contexts:
            raise CutError(
                f"{node.name!r} is computed under torch.no_grad, inference_mode or autocast, which torch.fx does not "
                f"record: move the context into a submodule of its own or use requires_grad_(False), or cut by hand: "
                f"SplitModel(client=..., server=...)"
            )
        return node


def _contexts() -> tuple[bool, ...]:
    """Return the state of the contexts that torch.fx would silently leave out of the graph."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
    )


class _RefuseRandomTensors(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses random tensors: what is drawn while tracing does not depend on the input and would be frozen."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise CutError(
                "the model draws random numbers that do not depend on its input, and torch.fx would record one draw "
                "for ever: use a module (nn.Dropout) or a function of a tensor (torch.rand_like, F.dropout), or cut by "
                "hand: SplitModel(client=..., server=...)."
            )
        return func(*args, **(kwargs or {}))


def _random_states() -> tuple[bytes, ...]:
    """Return the states of Python's and numpy's global generators, only to compare them."""
    return pickle.dumps(random.getstate()), pickle.dumps(np.random.get_state())  # noqa: NPY002


def _attributes(root: nn.Module) -> dict[str, tuple[int, int]]:
    """Return what tells whether a module's own attribute was set, or changed in place."""
    return {
        f"{name}.{key}".lstrip("."): (id(value), value._version if isinstance(value, torch.Tensor) else 0)
        for name, module in root.named_modules()
        for key, value in vars(module).items()
    }


def _class_names(root: nn.Module, names: frozenset[str]) -> str:
    return " or ".join(type(root.get_submodule(name)).__name__ for name in sorted(names))


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")
