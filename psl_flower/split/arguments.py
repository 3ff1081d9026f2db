"""Which arguments of ``forward`` are inputs.

The rule: those without a default, and those whose default is None, which is how models write "may be given". An
argument with another default (``steps=2``) is a setting and keeps it.

torch.fx records one way through the code, so one None must not decide the way. ``x is None`` cannot be seen while
tracing, but its effect can: a recording with the argument must be the one without it, but for the argument.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn

from psl_flower.errors import CutError
from psl_flower.signatures import annotate_whole, needed_arguments
from psl_flower.split.decided import holds, shown
from psl_flower.split.nodes import constant, input_name, is_raw
from psl_flower.split.refused import BY_HAND

_NAMED = (
    inspect.Parameter.POSITIONAL_ONLY,
    inspect.Parameter.POSITIONAL_OR_KEYWORD,
    inspect.Parameter.KEYWORD_ONLY,
)
_BRANCHES = (
    "forward does something else where it is None, and a cut model does one thing only. If it is always given, remove "
    f"its default from forward; else leave it out, or {BY_HAND}"
)


@dataclass(frozen=True)
class Arguments:
    """The arguments of a traced model.

    Parameters
    ----------
    signature : inspect.Signature
        The model's own, without ``*args`` and ``**kwargs``.
    inputs : tuple of str
        Those the recording takes, in order.
    needed : tuple of str
        Those of them that cannot be None: without a default, or the code fails. Where all may be None, the first.
    fixed : dict[str, str]
        Those that keep their default, and why.
    sizes : dict
        By input, or entry of one, its shape as it was recorded, with None for what may vary. None is known of others.
    decisions : tuple of str
        What must hold of the sizes, see `psl_flower.split.decided`.
    """

    signature: inspect.Signature
    inputs: tuple[str, ...]
    needed: tuple[str, ...]
    fixed: Mapping[str, str]
    sizes: Mapping[str, tuple[int | None, ...]] = field(default_factory=dict)
    decisions: tuple[str, ...] = ()

    @classmethod
    def of(cls, model: nn.Module) -> Arguments:
        """Return the arguments of a model before anything is known of its code."""
        signature = inspect.signature(model.forward)
        named = [parameter for parameter in signature.parameters.values() if parameter.kind in _NAMED]
        inputs = [p.name for p in named if p.default is p.empty or p.default is None]
        fixed = {
            p.name: f"it has a default, {p.default!r:.40}, so it is a setting and keeps it"
            for p in named
            if p.name not in inputs
        }
        if not inputs:
            raise CutError(
                f"forward{signature} of {type(model).__name__} names no input: arguments without a default are inputs, "
                f"and those with the default None; name them, or {BY_HAND}."
            )
        needed = tuple(p.name for p in named if p.default is p.empty) or (inputs[0],)
        return cls(signature.replace(parameters=named), tuple(inputs), needed, fixed)

    @classmethod
    def given(cls, model: nn.Module, names: Collection[str], reason: str) -> Arguments:
        """Return the arguments of a model that is always called with the same ones.

        Parameters
        ----------
        model : nn.Module
            Its forward may take some of them as ``**kwargs``.
        names : collection of str
            Those it is called with.
        reason : str
            Why the others keep their default.
        """
        signature = inspect.signature(model.forward)
        own = [p for p in signature.parameters.values() if p.kind in _NAMED]
        others = [name for name in names if name not in signature.parameters]
        if others and not any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values()):
            needed = needed_arguments(signature)
            whole = f"; {annotate_whole(needed[0].name)}" if len(needed) == 1 else ""
            raise CutError(
                f"forward{signature} of {type(model).__name__} takes no {', '.join(map(repr, others))}: the example's "
                f"names must be those of its arguments{whole}"
            )
        own += [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in others]
        inputs = tuple(p.name for p in own if p.name in names)
        fixed = {p.name: reason for p in own if p.name not in inputs}
        return cls(signature.replace(parameters=own), inputs, inputs, fixed)

    def without(self, names: Collection[str], reason: str = _BRANCHES) -> Arguments:
        """Let arguments keep their default."""
        inputs = tuple(name for name in self.inputs if name not in names)
        return replace(self, inputs=inputs, fixed={**self.fixed, **dict.fromkeys(names, reason)})

    def annotated(self, graphs: Iterable[fx.Graph]) -> Arguments:
        """Say of inputs that the code asks for entries by name that they are dicts."""
        asked = (node for graph in graphs for node in graph.nodes if node.target is operator.getitem)
        named = [node.args[0] for node in asked if isinstance(node.args[1], str)]
        dicts = {str(node.target) for node in named if node.op == "placeholder"}
        own = [p.replace(annotation=dict) if p.name in dicts else p for p in self.signature.parameters.values()]
        return replace(self, signature=self.signature.replace(parameters=own))

    def with_sizes(self, graphs: Iterable[fx.Graph]) -> Arguments:
        """Add which sizes of the inputs are constants to the recorded code, in any of the graphs."""
        found: dict[str, tuple[int | None, ...]] = {}
        for node in (node for graph in graphs for node in graph.nodes if is_raw(node) and "val" in node.meta):
            sizes = tuple(map(constant, node.meta["val"].shape))
            known = found.setdefault(input_name(node), sizes)
            found[input_name(node)] = tuple(k if s is None else s for s, k in zip(sizes, known, strict=True))
        return replace(self, sizes=found)

    def with_decisions(self, decisions: Iterable[str]) -> Arguments:
        """Add what must hold of the sizes."""
        return replace(self, decisions=tuple(decisions))

    def positions(self, given: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """Return what to call the model with, as hooks on it expect: by position as far as that goes."""
        bound = inspect.BoundArguments(self.signature, dict(given))
        last = max((i for i, name in enumerate(self.signature.parameters) if name in given), default=-1)
        for name, parameter in list(self.signature.parameters.items())[: last + 1]:
            if parameter.kind is not inspect.Parameter.KEYWORD_ONLY or name in given:
                bound.arguments[name] = given.get(name, parameter.default)
        bound.arguments = {name: bound.arguments[name] for name in self.signature.parameters if name in bound.arguments}
        return list(bound.args), bound.kwargs

    def bind(self, values: Sequence[Any], named: Mapping[str, Any]) -> list[Any]:
        """Return the inputs a call gives, in order.

        Raises
        ------
        TypeError
            If an argument is missing, unknown, or given twice.
        CutError
            If one is given that keeps its default, or None where the model was cut with a value.
        """
        bound = self.signature.bind(*values, **named)
        bound.apply_defaults()
        for name in self.needed:
            if bound.arguments[name] is None:
                raise CutError(f"the argument {name!r} is None or left out, but the model was cut with it: give it.")
        for name, reason in self.fixed.items():
            value, default = bound.arguments[name], self.signature.parameters[name].default
            if value is not default and not (isinstance(value, bool | int | float | str) and value == default):
                raise CutError(f"the argument {name!r} was given, but {reason}.")
        inputs = {name: bound.arguments[name] for name in self.inputs}
        for each in (inputs, *(value for value in inputs.values() if isinstance(value, Mapping))):
            self._check_sizes(each)
        if (turned := next((each for each in self.decisions if not holds(each, inputs)), None)) is not None:
            raise CutError(
                f"the inputs have sizes that the model was not cut for: of the example it was so that {shown(turned)}, "
                f"by which the code decides; give batches of which it is, or another example, or {BY_HAND}"
            )
        return list(inputs.values())

    def _check_sizes(self, values: Mapping[str, Any]) -> None:
        for name in self.sizes.keys() & values.keys():
            shape, wanted = getattr(values[name], "shape", None), self.sizes[name]
            if shape is None or (
                len(shape) == len(wanted) and all(w in (None, s) for s, w in zip(shape, wanted, strict=True))
            ):
                continue
            sizes = ", ".join("any" if size is None else str(size) for size in wanted)
            raise CutError(
                f"the input {name!r} has shape {tuple(shape)}, but the model was cut for ({sizes}): torch.export took "
                f"these sizes of the example for constants of the code; give batches of these sizes (pad texts to one "
                f"length), or another example, or {BY_HAND}"
            )


def choose_inputs(root: nn.Module, arguments: Arguments, record: Callable[[tuple[str, ...]], fx.Graph]) -> Arguments:
    """Find out which arguments with the default None may be inputs.

    Parameters
    ----------
    root : nn.Module
        The model in the mode to look at.
    arguments : Arguments
        What to choose from.
    record : callable
        Traces the model with the arguments named, the others keeping their default.
    """
    if len(arguments.needed) == len(arguments.inputs):
        return arguments
    bare, needed = _least(arguments.inputs, arguments.needed, record)
    arguments = replace(arguments, needed=needed)
    others = [name for name in arguments.inputs if name not in needed]

    def harmless(names: Sequence[str]) -> bool:
        given = tuple(name for name in arguments.inputs if name in needed or name in names)
        try:
            return alike(root, record(given), bare, ignoring=names)
        except Exception:  # the user's code, with what it may not expect
            return False

    if harmless(others):
        return arguments
    free = [name for name in others if harmless([name])]
    if len(free) > 1 and not harmless(free):  # what one does may depend on another
        free = []
    return arguments.without([name for name in others if name not in free])


def _least(
    inputs: tuple[str, ...], needed: tuple[str, ...], record: Callable[[tuple[str, ...]], fx.Graph]
) -> tuple[fx.Graph, tuple[str, ...]]:
    """Return a recording with as few inputs as the code runs with, and these."""
    attempts = [needed]
    for name in inputs:
        if name not in attempts[-1]:
            attempts.append(tuple(n for n in inputs if n == name or n in attempts[-1]))
    for attempt in attempts[:-1]:
        try:
            return record(attempt), attempt
        except Exception:  # noqa: S112 - None may be what it fails on
            continue
    return record(attempts[-1]), attempts[-1]


def alike(root: nn.Module, graph: fx.Graph, other: fx.Graph, ignoring: Collection[str] = ()) -> bool:
    """Whether two graphs of a model do the same, where the inputs `ignoring` are None."""
    ours, theirs = _steps(graph, ignoring), _steps(other, ignoring)
    return len(ours) == len(theirs) and all(
        mine == yours or _same_constant(root, mine, yours) for mine, yours in zip(ours, theirs, strict=True)
    )


def _steps(graph: fx.Graph, ignoring: Collection[str]) -> list[tuple[Any, ...]]:
    numbers: dict[fx.Node, tuple[str, int] | None] = {}
    steps = []
    for node in graph.nodes:
        if node.op == "placeholder" and node.target in ignoring:
            numbers[node] = None
            continue
        steps.append((node.op, node.target, fx.map_arg((node.args, node.kwargs), numbers.__getitem__)))
        numbers[node] = ("the value of step", len(steps))
    return steps


def _same_constant(root: nn.Module, mine: tuple[Any, ...], yours: tuple[Any, ...]) -> bool:
    """Whether two steps read equal constants: a tensor made in forward gets another name each time it is recorded."""
    if not mine[0] == yours[0] == "get_attr":
        return False
    if not all(step[1].startswith("_tensor_constant") for step in (mine, yours)):
        return False
    one, two = getattr(root, mine[1]), getattr(root, yours[1])
    return not one.is_meta and one.dtype == two.dtype and one.device == two.device and torch.equal(one, two)
