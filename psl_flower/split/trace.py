"""Tracing a model with torch.fx, as far as a cut needs it."""

from __future__ import annotations

import pickle
import random
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.utils._pytree import TreeSpec, tree_unflatten

from psl_flower.errors import CutError
from psl_flower.origin import place
from psl_flower.split.arguments import Arguments, alike, choose_inputs
from psl_flower.split.asked import asking
from psl_flower.split.gradients import functions_recorded
from psl_flower.split.modes import modes_kept, pinned_modules
from psl_flower.split.recordable import recordable
from psl_flower.split.refused import BY_HAND, refusals_kept
from psl_flower.split.settings import settings_refused
from psl_flower.split.stored import refusing_reads
from psl_flower.split.tracer import TRACING, Call, Computed, Parameters, PathTracer
from psl_flower.split.unchanged import unchanged

# More than once, for the generators of Python and numpy are global: it may have been another thread that drew.
TRIES = 3


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
            f"inside it, or {BY_HAND}."
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
                f"or {BY_HAND}."
            )


def _trace_once(root: nn.Module, opened: frozenset[str], call: Call, inputs: tuple[str, ...]) -> fx.Graph:
    """Trace `root` in its present mode, refusing what would happen now, once, instead of at every call."""
    with unchanged(root):
        return _trace_steps(root, opened, call, inputs)


def _trace_steps(root: nn.Module, opened: frozenset[str], call: Call, inputs: tuple[str, ...]) -> fx.Graph:
    for _ in range(TRIES):
        states = random_states()
        tracer = PathTracer(opened, call, inputs)
        parameters = Parameters(root, tracer)
        with (
            refusals_kept(),
            TRACING,
            Computed(root, tracer.fresh),
            parameters,
            functions_recorded(parameters.recorded),
            refusing_reads(root, opened),
            recordable(root, opened),
            asking(),
            settings_refused(),
        ):
            graph = tracer.trace(root)
        for node in graph.nodes:
            node.meta.pop("is_wrapped", None)  # or code made of it would have torch.fx wrap functions for good
        if random_states() == states:
            return graph
    raise CutError(told_drawn(root, "torch.fx"))


def told_drawn(root: nn.Module, recorder: str) -> str:
    """Say that a model draws random numbers outside of torch, and the remedy."""
    return (
        f"{type(root).__name__} draws random numbers in Python, and {recorder} would record one draw for ever: use "
        f"torch (nn.Dropout, or a function of a tensor such as torch.rand_like), or {BY_HAND}."
    )


def random_states() -> tuple[bytes, ...]:
    """Return the states of Python's and numpy's global generators, only to compare them."""
    return pickle.dumps(random.getstate()), pickle.dumps(np.random.get_state())  # noqa: NPY002


def _class_names(root: nn.Module, names: frozenset[str]) -> str:
    return " or ".join(type(root.get_submodule(name)).__name__ for name in sorted(names))


def told(error: Exception) -> str:
    """Return the line of the user's code that an exception comes from, its kind, and the first line of its text."""
    at = place(error)
    return f"{'' if at is None else f'{at}: '}{type(error).__name__}: {first_line(error)}"


def first_line(error: Exception) -> str:
    """Return the first line of what an error says."""
    return next(iter(str(error).splitlines()), "")
