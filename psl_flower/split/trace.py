"""Tracing a model with torch.fx, as far as a cut needs it."""

from __future__ import annotations

import operator
import pickle
import random
import sys
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import CodeType
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.nn.utils import rnn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_map, tree_unflatten

from psl_flower.errors import CutError
from psl_flower.origin import place, running
from psl_flower.split.arguments import Arguments, alike, choose_inputs
from psl_flower.split.changing import CHANGING, Fresh, made_like
from psl_flower.split.compare import tensors
from psl_flower.split.gradients import functions_recorded, without_gradients
from psl_flower.split.modes import modes_kept, pinned_modules
from psl_flower.split.nodes import PLACE, is_fact
from psl_flower.split.recordable import recordable, wanted
from psl_flower.split.stored import refusing_reads

# Note [Tracing and threads]: while torch.fx traces, it patches nn.Module for the whole process. The lock keeps two
# traces apart, and the tracer lets modules that other threads call meanwhile run as ever.
TRACING = threading.Lock()

# What names begin with that recordings add to a model.
RECORDED = "_psl_"

# What packs sequences is a step: it looks at values.
_SEQUENCES = tuple(
    each for name, each in vars(rnn).items() if name.endswith("_sequence") and name.startswith(("p", "u"))
)
_DATA: Any = torch.Tensor.data
_BY_HAND = "or cut by hand: SplitModel(client=..., server=...)."

# From inputs by name to what a model is called with.
Call = Callable[[dict[str, Any]], tuple[list[Any], dict[str, Any]]]


@dataclass(frozen=True, eq=False)
class Form:
    """The form of what a model returns (a dict, a ``ModelOutput``) in each mode, of which a graph returns the tensors.

    Parameters
    ----------
    specs : dict[bool, TreeSpec]
    """

    specs: dict[bool, TreeSpec]

    def of(self, tensors: Sequence[torch.Tensor], mode: bool) -> Any:
        """Return tensors as the model returns them."""
        return tree_unflatten(tensors, self.specs[mode])

    def __deepcopy__(self, memo: object) -> Form:
        return self  # it never changes, and torch warns of copies


@dataclass(frozen=True, eq=False)
class Trace:
    """What a model does, recorded in training and in evaluation.

    Parameters
    ----------
    graphs : dict[bool, fx.Graph]
        The model's graph for each value its ``training`` flag takes; one and the same graph if they do not differ.
    pinned : dict[bool, frozenset[str]]
        See `psl_flower.split.modes.pinned_modules`.
    arguments : Arguments
        Which arguments the graphs take.
    shared : frozenset of str
        Inputs that may cross a cut as they are.
    returns : Form, optional
        Where the graphs return a tuple of tensors and the model something else.
    """

    graphs: dict[bool, fx.Graph]
    pinned: dict[bool, frozenset[str]]
    arguments: Arguments
    shared: frozenset[str] = frozenset()
    returns: Form | None = None


def trace(root: nn.Module, cuts: Sequence[str], share: Collection[str] = ()) -> Trace:
    """Record what `root` does around the submodules `cuts`.

    Only `root` and the modules that contain a cut are traced through; every other module is called as it is. So a
    module is free to do what torch.fx cannot record, as long as no cut is inside it.

    Parameters
    ----------
    root : nn.Module
        Constants that its forward makes are stored on it; otherwise it is left as it was.
    cuts : sequence of str
        Qualified names of submodules, the first ones ``root.named_modules()`` gives them.
    share : collection of str
        Inputs that may cross a cut as they are.

    Raises
    ------
    CutError
        If the code around a cut depends on values, draws random numbers, or switches autograd or autocast.
    """
    paths = [cut.split(".") for cut in cuts]
    opened = frozenset(".".join(path[:depth]) for path in paths for depth in range(len(path)))
    refuse_backward_hooks(root, sorted(opened))
    graphs: dict[bool, fx.Graph] = {}
    try:
        with modes_kept(root) as put:
            arguments = Arguments.of(root)
            for mode in (True, False):
                put(mode)
                arguments = choose_inputs(root, arguments, partial(_trace_once, root, opened, arguments.positions))
            for mode in (True, False):
                put(mode)
                graph = _trace_once(root, opened, arguments.positions, arguments.inputs)
                graphs[root.training] = next((other for other in graphs.values() if alike(root, graph, other)), graph)
    except CutError as error:
        at = place(error)
        raise error if at is None else CutError(f"{at}: {error}") from error.__cause__
    except Exception as error:  # symbolic execution runs the user's code: anything may come
        raise CutError(
            f"torch.fx cannot trace {_class_names(root, opened)}, which a cut there needs "
            f"({told(error)}). Move this code into a submodule of its own, which is called whole, as long as no cut is "
            f"inside it, or cut by hand: SplitModel(client=..., server=...)."
        ) from error
    return Trace(graphs, pinned_modules(root), arguments.annotated(graphs.values()), frozenset(share))


def refuse_backward_hooks(root: nn.Module, names: Iterable[str]) -> None:
    """Refuse modules of which the steps are recorded, but which have to do with gradients that come back.

    Raises
    ------
    CutError
        If one of these has a backward hook.
    """
    for name in names:
        module = root.get_submodule(name)
        if module._backward_hooks or module._backward_pre_hooks:
            raise CutError(
                f"{(name or type(root).__name__)!r} has a backward hook, which would be lost, for a cut goes through: "
                f"put it on a module that stays whole, change gradients in the optimizer (register_step_pre_hook), "
                f"{_BY_HAND}"
            )


def _trace_once(root: nn.Module, opened: frozenset[str], call: Call, inputs: tuple[str, ...]) -> fx.Graph:
    """Trace `root` in its present mode, refusing what would happen now, once, instead of at every call."""
    with unchanged(root):
        return _trace_steps(root, opened, call, inputs)


def _trace_steps(root: nn.Module, opened: frozenset[str], call: Call, inputs: tuple[str, ...]) -> fx.Graph:
    for _ in range(3):  # more than once, for these generators are global: it may have been another thread that drew
        states = _random_states()
        tracer = _PathTracer(opened, call, inputs)
        parameters = _Parameters(root, tracer)
        with (
            TRACING,
            _Computed(root, tracer.fresh),
            parameters,
            functions_recorded(parameters.recorded),
            refusing_reads(root, opened),
            recordable(root, opened),
        ):
            graph = tracer.trace(root)
        for node in graph.nodes:
            node.meta.pop("is_wrapped", None)  # or code made of it would have torch.fx wrap functions for good
        if _random_states() == states:
            return graph
    raise CutError(
        f"{type(root).__name__} draws random numbers in Python, and torch.fx would record one draw for ever: use "
        f"torch (nn.Dropout, or a function of a tensor such as torch.rand_like), {_BY_HAND}"
    )


class _PathTracer(fx.Tracer):
    """A tracer that goes through the modules named in `opened` and calls all others whole."""

    def __init__(self, opened: frozenset[str], call: Call, inputs: tuple[str, ...]) -> None:
        super().__init__(autowrap_functions=_SEQUENCES, param_shapes_constant=True)
        self._autowrap_search.append(rnn)
        self._opened, self._call, self._inputs = opened, call, inputs
        self._contexts = _contexts()
        self.fresh = Fresh()
        self._thread = threading.get_ident()
        self._since: CodeType | None = None  # what calls the model's code

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
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
            return super().to_bool(obj)
        at = running(self._since) if self._since is not None else None
        holds = obj if value else self.create_proxy("call_function", operator.not_, (obj,), {})
        self.create_proxy(
            "call_function", torch._assert, (holds, f"the {'assert' if value else 'check'} at {at} failed"), {}
        )
        return value

    def create_proxy(
        self, kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *rest: Any, **named: Any
    ) -> fx.Proxy:
        """Add a step, which may change no tensor that is made only once."""
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
            raise CutError(
                "the model draws with a torch.Generator, and torch.fx would record the one there is now for ever: draw "
                f"without one, move this code into a submodule of its own, {_BY_HAND}"
            )
        copied = self.fresh.copy_of(a) if isinstance(a, torch.Tensor) else None
        return super().create_arg(a if copied is None else copied)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta[PLACE] = None if self._since is None else running(self._since)
        if _contexts()[1:] != self._contexts[1:]:
            raise CutError(
                f"{node.name!r} is computed under torch.inference_mode or autocast, which torch.fx does not record: "
                "move it into a submodule of its own, use torch.no_grad() in place of the first, or cut by hand: "
                "SplitModel(client=..., server=...)."
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


class _Parameters(TorchFunctionMode):
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


class _Computed(TorchDispatchMode):  # type: ignore[no-untyped-call]
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
            raise CutError(
                "what is computed here of parameters torch.fx would record as it is now, for ever: take them as "
                "attributes (self.layer.weight), move it into a submodule of its own, or cut by hand: "
                "SplitModel(client=..., server=...)."
            )
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


@contextmanager
def unchanged(root: nn.Module) -> Iterator[None]:
    """Refuse code that is recorded within if it changes what modules keep; they are as before then.

    Raises
    ------
    CutError
        If an attribute or a buffer is another one afterwards.
    """
    before, held = _attributes(root), [(each, dict(vars(each)), dict(each._buffers)) for each in root.modules()]

    def restore() -> None:
        for module, attributes, buffers in held:
            vars(module).clear()
            vars(module).update(attributes)
            module._buffers.clear()
            module._buffers.update(buffers)

    try:
        yield
    except BaseException:
        restore()
        raise
    _take_back(root, ((module, buffers) for module, _, buffers in held))
    after = _attributes(root)
    changed = [name for name, version in before.items() if after.get(name) != version]
    changed = [name for name in changed if not name.startswith(RECORDED)]
    if changed:
        restore()
        if changed[0] in dict(root.named_buffers()):
            raise CutError(
                f"the model's forward puts another tensor in the place of its buffer {changed[0]!r}, and that would "
                f"not be recorded: change it in place (self.{changed[0]}.add_(1), copy_), move it into a submodule of "
                f"its own, {_BY_HAND}"
            )
        raise CutError(
            f"the model's forward changes {changed[0]!r}, which is neither parameter nor buffer, and that would not be "
            f"recorded: register it as a buffer, move it into a submodule of its own, {_BY_HAND}"
        )


def _take_back(root: nn.Module, held: Iterable[tuple[nn.Module, Mapping[str, torch.Tensor | None]]]) -> None:
    """Put buffers back in the place of what ``self.level += 1`` sets, which is the buffer itself."""
    names = {module: name for name, module in root.named_modules()}
    for module, buffers in held:
        for key, buffer in buffers.items():
            found: Any = module._buffers.get(key)
            node: Any = found.node if isinstance(found, fx.Proxy) else None
            while node is not None and node.target in CHANGING:
                node = node.args[0]
            if node is not None and node.op == "get_attr" and node.target == f"{names[module]}.{key}".lstrip("."):
                module._buffers[key] = buffer


def _attributes(root: nn.Module) -> dict[str, tuple[int, int]]:
    """Return what tells whether a module's own attribute was set, or changed in place, or a buffer set."""
    return {
        f"{name}.{key}".lstrip("."): (id(value), value._version if own and isinstance(value, torch.Tensor) else 0)
        for name, module in root.named_modules()
        for own, held in ((True, vars(module)), (False, module._buffers))
        for key, value in held.items()
    }


def _class_names(root: nn.Module, names: frozenset[str]) -> str:
    return " or ".join(type(root.get_submodule(name)).__name__ for name in sorted(names))


def told(error: Exception) -> str:
    """Return the line of the user's code that an exception comes from, its kind, and the first line of its text."""
    at = place(error)
    return f"{'' if at is None else f'{at}: '}{type(error).__name__}: {first_line(error)}"


def first_line(error: Exception) -> str:
    """Return the first line of what an error says."""
    return next(iter(str(error).splitlines()), "")
