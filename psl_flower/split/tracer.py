"""Recording code with torch.fx: through the modules that hold a cut, and past all others."""

from __future__ import annotations

import operator
import sys
import threading
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils import rnn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from psl_flower.origin import running
from psl_flower.split.asked import AT_ONCE, are_sizes, asking_frame, count, look_whether_none, refusal
from psl_flower.split.changing import Fresh, made_like
from psl_flower.split.compare import tensors
from psl_flower.split.gradients import without_gradients
from psl_flower.split.nodes import PLACE, is_fact
from psl_flower.split.recordable import wanted
from psl_flower.split.refused import BY_HAND, kept, refused
from psl_flower.split.starred import Rest, given_on, joined

# Note [Tracing and threads]: while torch.fx traces, it patches nn.Module for the whole process. The lock keeps two
# traces apart, and the tracer lets modules that other threads call meanwhile run as ever.
TRACING = threading.Lock()

# What packs sequences is a step: it looks at values.
_SEQUENCES = tuple(
    each for name, each in vars(rnn).items() if name.endswith("_sequence") and name.startswith(("p", "u"))
)
_DATA: Any = torch.Tensor.data

_UNPACKED = (
    "how many there are of what is gone through, or unpacked with *, is known only when the model runs",
    f"{AT_ONCE}; of sizes, take h.shape[:-1] + (2, 3) in place of *h.shape[:-1], 2, 3",
)

# From inputs by name to what a model is called with.
Call = Callable[[dict[str, Any]], tuple[list[Any], dict[str, Any]]]


class PathTracer(fx.Tracer):
    """A tracer that goes through the modules named in `opened` and calls all others whole."""

    def __init__(self, opened: frozenset[str], call: Call, inputs: tuple[str, ...]) -> None:
        super().__init__(autowrap_functions=_SEQUENCES, param_shapes_constant=True)
        self._autowrap_search.append(rnn)
        self._opened, self._call, self._inputs = opened, call, inputs
        self._contexts = _contexts()
        self.fresh = Fresh()
        self._rests: list[Rest] = []  # given to nothing yet
        self._thread = threading.get_ident()
        self._since: CodeType | None = None  # what calls the model's code

    def trace(self, root: nn.Module | Callable[..., Any], concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """Record a model."""
        graph = super().trace(root, concrete_args)
        for rest in self._rests:
            raise refusal(f"{rest.at}: {_UNPACKED[0]}", _UNPACKED[1])
        return graph

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a module is called whole."""
        return module_qualified_name not in self._opened

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """Make placeholders of the inputs; the other arguments keep their default."""
        proxies = [self.create_proxy("placeholder", name, (), {}) for name in self._inputs]

        def run(*values: Any) -> Any:
            positional, named = self._call(dict(zip(self._inputs, values, strict=True)))
            return self.root(*positional, **named)  # calling the module, not its forward, runs the hooks on it as well

        self._since = run.__code__
        return run, proxies

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Record the call of a module, or go through it."""
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

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Record what an ``assert`` or ``if ...: raise`` wants; other decisions on values cannot be recorded."""
        value = wanted(sys._getframe(2))  # the frame that asks, past Proxy.__bool__
        if value is None:
            raise refusal("the control flow depends on what is known only when the model runs")
        at = self.line()
        holds = obj if value else self.create_proxy("call_function", operator.not_, (obj,), {})
        self.create_proxy(
            "call_function", torch._assert, (holds, f"the {'assert' if value else 'check'} at {at} failed"), {}
        )
        return value

    def iter(self, obj: Any) -> Iterator[fx.Proxy]:
        """Give as many entries as the arguments of a step tell; else refuse."""
        number = count(obj.node)
        if number is None and are_sizes(obj.node) and given_on(sys._getframe(2)):
            rest: Any = Rest(obj, sys._getframe(2), self.line())
            self._rests.append(rest)
            return iter([rest])
        if number is None:
            raise refusal(*_UNPACKED)
        return (obj[i] for i in range(number))

    def line(self) -> str | None:
        """Return the line of the user's code that is being run."""
        return None if self._since is None else running(self._since)

    def create_proxy(
        self, kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *rest: Any, **named: Any
    ) -> fx.Proxy:
        """Add a step, which may change no tensor that is made only once."""
        try:
            return look_whether_none(self._add(kind, target, args, kwargs, *rest, **named))
        except Exception as error:
            raise kept(error)  # noqa: B904 - itself

    def _add(
        self, kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *rest: Any, **named: Any
    ) -> fx.Proxy:
        args = joined(args, self._rests, asking_frame()) if kind == "call_method" else args
        called = kind in ("call_function", "call_method")
        if called and (made := made_like(self, target, args, kwargs)) is not None:
            return made
        args = self.fresh.recorded(self, kind, target, args)
        if torch.is_grad_enabled() or torch.is_inference_mode_enabled() or not self._contexts[0]:
            return super().create_proxy(kind, target, args, kwargs, *rest, **named)
        return without_gradients(super().create_proxy, kind, target, args, kwargs)

    def create_arg(self, a: Any) -> Any:
        """Return what stands for an argument of a step."""
        if isinstance(a, torch.Generator):
            raise refused(
                "the model draws with a torch.Generator, and torch.fx would record the one there is now for ever: draw "
                f"without one, move this code into a submodule of its own, or {BY_HAND}."
            )
        copied = self.fresh.copy_of(a) if isinstance(a, torch.Tensor) else None
        return super().create_arg(a if copied is None else copied)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Add a step, with the line that it is from."""
        node = super().create_node(*args, **kwargs)
        node.meta[PLACE] = self.line()
        if _contexts()[1:] != self._contexts[1:]:
            raise refused(
                f"{node.name!r} is computed under torch.inference_mode or autocast, which torch.fx does not record: "
                f"move it into a submodule of its own, use torch.no_grad() in place of the first, or {BY_HAND}."
            )
        return node


def _contexts() -> tuple[int, ...]:
    """Return the state of the contexts that torch.fx would silently leave out of the graph.

    An autocast that is not enabled counts, for the model may be run within one that is.
    """
    nested = torch.autocast_increment_nesting()
    torch.autocast_decrement_nesting()
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
        nested,
    )


class Parameters(TorchFunctionMode):
    """Records what is made of parameters themselves, as parameters() or a list gives them, as that of attributes."""

    def __init__(self, root: nn.Module, tracer: fx.Tracer) -> None:
        super().__init__()
        self._names, self._tracer = {id(p): name for name, p in root.named_parameters()}, tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name == "__get__" and func == _DATA.__get__ and id(args[0]) in self._names:
            return self.recorded(args[0]).data
        if name == "__set__" and func == _DATA.__set__ and id(args[0]) in self._names:
            self.recorded(args[0]).data = args[1]
            return None
        if name in ("__get__", "__set__", "__len__", "__hash__", "__repr__", "__deepcopy__") or is_fact(name):
            return func(*args, **(kwargs or {}))
        if not any(id(value) in self._names for value in tensors((args, kwargs))):
            return func(*args, **(kwargs or {}))
        args, kwargs = tree_map(self.recorded, (args, kwargs or {}))
        return fx.Proxy.__torch_function__(func, types, args, kwargs)

    def recorded(self, value: Any) -> Any:
        """Return what is recorded of a parameter, and all else as it is."""
        name = self._names.get(id(value))
        return value if name is None else self._tracer.create_proxy("get_attr", name, (), {})


class Computed(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses what must not be computed while tracing, as it would be frozen.

    That is random tensors, and what is made of parameters, or of what was changed.
    """

    def __init__(self, root: nn.Module, fresh: Fresh) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._fresh = fresh
        strided = (p for p in root.parameters() if p.layout is torch.strided)
        self._parameters = {p.untyped_storage()._cdata for p in strided}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = tensors((args, kwargs))
        self._fresh.refuse(given)
        if any(t.layout is torch.strided and t.untyped_storage()._cdata in self._parameters for t in given):
            raise refused(
                "what is computed here of parameters torch.fx would record as it is now, for ever: take them as "
                f"attributes (self.layer.weight), move it into a submodule of its own, or {BY_HAND}."
            )
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise refused(
                "the model draws random numbers that do not depend on its input, and torch.fx would record one draw "
                "for ever: use a module (nn.Dropout) or a function of a tensor (torch.rand_like, F.dropout), or "
                f"{BY_HAND}."
            )
        return func(*args, **(kwargs or {}))
