"""A half of a model that torch.fx traced, and what holds for every half."""

from __future__ import annotations

import importlib
import inspect
import itertools
import linecache
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._pytree import tree_leaves

from psl_flower.errors import CutError
from psl_flower.split.arguments import Arguments
from psl_flower.split.functions import called
from psl_flower.split.refused import BY_HAND
from psl_flower.split.trace import Form, Trace

BY_MODE = (_NormBase, _DropoutNd, nn.RReLU, nn.RNNBase)  # layers that do something else in training


def listing(names: Sequence[object], most: int = 8) -> str:
    """Return at most `most` names, quoted and joined, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(repr, names[:most])) + more


@dataclass(frozen=True)
class CutNames:
    """Where a model was cut: the names given, None for what was cut by hand."""

    cut: str | None = None
    tail: str | None = None


class Part(nn.Module):
    """A part of a cut model.

    It knows where the model was cut, and which of its modules the model's own ``train`` leaves in the other mode.

    Parameters
    ----------
    cut : CutNames

    Attributes
    ----------
    takes, gives : tuple of bool
        For each tensor that it is given and gives at a cut, whether it is as long as the texts, see `lengths`.
    longest : int or None
        The most positions a text may have, if the model's configuration tells.
    calls : tuple of str
        What it calls, in order, where a trace tells, see `functions.called`.
    """

    takes: tuple[bool, ...] = ()
    gives: tuple[bool, ...] = ()
    longest: int | None = None
    calls: tuple[str, ...] = ()

    def __init__(self, cut: CutNames) -> None:
        super().__init__()
        self.cut_names = cut
        self._psl_pinned: dict[bool, list[str]] = {True: [], False: []}

    def signature(self) -> inspect.Signature:
        """Return how the part is called."""
        return inspect.signature(self.forward)

    def train(self, mode: bool = True) -> Part:
        """Set the mode, leaving out the submodules that the model's own ``train`` leaves out."""
        super().train(mode)
        for name in self._psl_pinned[mode]:
            self.get_submodule(name).training = not mode
        return self

    def _pin(self, pinned: Mapping[bool, frozenset[str]]) -> None:
        names = {name for name, _ in self.named_modules()}
        self._psl_pinned = {mode: sorted(some & names) for mode, some in pinned.items()}


def frozen_in(part: nn.Module) -> list[str]:
    """Return which submodules of a part stay in evaluation mode in training."""
    return part._psl_pinned[True] if isinstance(part, Part) else []


def told_frozen(parts: Iterable[nn.Module]) -> str:
    """Say which layers stay in evaluation mode where that matters: torch's that do something else in training, others.

    Layers that were taken out of another model may be so unintended.
    """
    names = [
        name
        for part in parts
        for name in frozen_in(part)
        if isinstance(layer := part.get_submodule(name), BY_MODE)
        or not (type(layer).__module__.startswith("torch.") or any(True for _ in layer.children()))
    ]
    return f"; in evaluation mode, by layer.eval() or the model's train(), stay {listing(names)}" if names else ""


class TracedHalf(Part):
    """The part of a traced model that some graphs use, under the names it has in the whole model.

    Modules, parameters and buffers are those of `root` (not copies), at the same qualified names. Where the model does
    one thing in training and another in evaluation, the half holds a program for each and follows its ``training``
    flag. Works with ``torch.func.functional_call``, deepcopy and pickle.

    Parameters
    ----------
    root : nn.Module
        The traced model.
    graphs : dict[bool, fx.Graph]
        What to run for each value of ``training``.
    trace : Trace
        Where the graphs come from.
    cut : CutNames
    """

    # how the model is called, in the part that takes its inputs
    arguments: Arguments | None = None
    # the form of what the model returns, in the part that returns it, where the program has it flat
    returns: Form | None = None

    def __init__(self, root: nn.Module, graphs: Mapping[bool, fx.Graph], trace: Trace, cut: CutNames) -> None:
        super().__init__(cut)
        used, read = (
            {str(node.target) for graph in graphs.values() for node in graph.nodes if node.op == op}
            for op in ("call_module", "get_attr")
        )
        for name in itertools.chain(sorted(used), sorted(read)):  # a module before its parts
            self._graft(root, name)
        self._graft_aliases(root)
        self.training = root.training
        self._pin(trace.pinned)
        self.calls = tuple(called(node, root) for mode in sorted(graphs) for node in graphs[mode].nodes)
        self._psl_sources = {mode: _source(graph) for mode, graph in graphs.items()}
        self._psl_programs = {mode: _compile(*source) for mode, source in self._psl_sources.items()}

    def signature(self) -> inspect.Signature:
        """Return how the part is called."""
        return super().signature() if self.arguments is None else self.arguments.signature

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Run the program for the present mode."""
        if self.arguments is not None:
            inputs, named = tuple(self.arguments.bind(inputs, named)), {}
        output = self._psl_programs[self.training](self, *inputs, **named)
        return output if self.returns is None else self.returns.of(output, self.training)

    def _graft(self, root: nn.Module, name: str) -> None:
        """Put the module, parameter, buffer or constant of `root` called `name` into this half, unless it is there."""
        *path, leaf = name.split(".")
        source: nn.Module = root
        target: nn.Module = self
        for part in path:
            source = source.get_submodule(part)
            if part not in target._modules:
                container = nn.Module()
                container.training = source.training
                target.add_module(part, container)
            target = target.get_submodule(part)
        if leaf in target._modules or leaf in target._parameters or leaf in target._buffers:
            return
        value = getattr(source, leaf)
        if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
            # a constant (a tensor that is no buffer of the model) becomes a buffer that state_dict leaves out
            persistent = leaf in source._buffers and leaf not in source._non_persistent_buffers_set
            target.register_buffer(leaf, value, persistent=persistent)
        else:
            setattr(target, leaf, value)

    def _graft_aliases(self, root: nn.Module) -> None:
        """Add the other names under which the model holds what is in this half, so that its state dict has them."""
        held = {id(value) for value in itertools.chain(self.modules(), self.parameters(), self.buffers())}
        named: Iterable[tuple[str, Any]] = itertools.chain(
            root.named_modules(remove_duplicate=False),
            root.named_parameters(remove_duplicate=False),
            root.named_buffers(remove_duplicate=False),
        )
        for name, value in list(named):
            if id(value) in held and (isinstance(value, torch.Tensor) or value.state_dict()):
                self._graft(root, name)

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        del state["_psl_programs"]
        state["_psl_sources"] = {
            mode: (code, {key: _ByName(v.__name__) if isinstance(v, ModuleType) else v for key, v in names.items()})
            for mode, (code, names) in self._psl_sources.items()
        }
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._psl_sources = {
            mode: (code, {k: importlib.import_module(v) if isinstance(v, _ByName) else v for k, v in names.items()})
            for mode, (code, names) in self._psl_sources.items()
        }
        self._psl_programs = {mode: _compile(*source) for mode, source in self._psl_sources.items()}


class _ByName(str):
    """The name of a module, standing for it in a pickle."""


def _source(graph: fx.Graph) -> tuple[str, dict[str, Any]]:
    """Return a graph as Python source of a function ``forward(self, ...)``, and the globals it needs."""
    code = graph.python_code("self")
    return code.src, dict(code.globals)


def _compile(code: str, names: Mapping[str, Any]) -> Callable[..., Any]:
    filename = f"<psl_flower half {hash(code):x}>"
    linecache.cache[filename] = (len(code), None, code.splitlines(keepends=True), filename)  # readable tracebacks
    namespace = dict(names)
    exec(compile(code, filename, "exec"), namespace)  # noqa: S102 - what torch.fx made of the user's own model
    program: Callable[..., Any] = namespace["forward"]
    return program


def signature_of(half: nn.Module) -> inspect.Signature:
    """Return how a model's first part is called, as the model's own ``forward`` says it."""
    return half.signature() if isinstance(half, Part) else inspect.signature(half.forward)


def input_names(half: nn.Module) -> tuple[str, ...]:
    """Return the names of the arguments a model's first part is called with, those it can do without included.

    They are those of the model's own ``forward`` (of ``client.forward`` for a SplitModel), ``*args`` and ``**kwargs``
    left out.
    """
    signature = signature_of(half)
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return tuple(name for name, parameter in signature.parameters.items() if parameter.kind not in variable)


def as_activations(values: Any, inputs: Sequence[Any], names: Sequence[str] = ()) -> tuple[torch.Tensor, ...]:
    """Return what a part computed as a tuple of tensors, each with one row an example.

    Parameters
    ----------
    values : Tensor or sequence of Tensor
    inputs : sequence
        What the part was given, trees of tensors; the first tensor says how many examples there are.
    names : sequence of str
        What to call the values in an error; by default their positions.

    Raises
    ------
    CutError
        If a value is not a tensor, or its first dimension is not the batch: the batches of several clients could not
        be put together.
    """
    activations = tuple(values) if isinstance(values, list | tuple) else (values,)
    if not activations:
        raise CutError("nothing crosses the cut: the part before it must return at least one tensor")
    names = names or [f"number {position}" for position in range(len(activations))]
    for name, value in zip(names, activations, strict=True):
        if not isinstance(value, torch.Tensor):
            raise CutError(
                f"only tensors can cross the cut, value {name} is a {type(value).__name__}: cut elsewhere, give the "
                f"cut an example batch (torch.export may see what is in it), or cut by hand so that the part before it "
                f"returns a tensor or a tuple of tensors"
            )
    batch = next(v.shape[:1] for v in (*tree_leaves(inputs), *activations) if isinstance(v, torch.Tensor))
    for name, value in zip(names, activations, strict=True):
        if value.dim() == 0 or value.shape[:1] != batch:
            raise CutError(
                f"every tensor that crosses the cut must have the batch as its first dimension, value {name} has shape "
                f"{tuple(value.shape)} for a batch of {', '.join(map(str, batch))}: reshape with x.flatten(1) instead "
                f"of squeeze() or view(-1), cut elsewhere, or {BY_HAND}"
            )
    return activations
