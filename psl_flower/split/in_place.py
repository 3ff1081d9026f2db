"""What is changed in place, and who sees it: dividing or reordering a recording must not change that.

Each piece works on copies of what crosses. Who reads a tensor, or a view of it, that is changed in another piece would
see it as it was.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.dropout import _DropoutNd

from psl_flower.errors import CutError
from psl_flower.split.changing import changes_first
from psl_flower.split.nodes import asks_for_fact, same_memory
from psl_flower.split.refused import BY_HAND

# Of functions and methods: what may return its first argument, or a view of it.
_VIEWS = {"chunk", "contiguous", "detach", "detached", "diagonal", "double", "dropout", "expand", "expand_as"}
_VIEWS |= {"flatten", "float"}
_VIEWS |= {"getitem", "movedim", "narrow", "permute", "real", "reshape", "select", "split", "squeeze", "swapaxes", "t"}
_VIEWS |= {"to", "transpose", "type_as", "unbind", "unflatten", "unfold", "unsqueeze", "view", "view_as"}
_VIEW_ATTRIBUTES = ("T", "mT", "data", "real")
_VIEW_MODULES = (nn.Identity, nn.Flatten, nn.Unflatten, _DropoutNd)

WATCHED = "psl_flower.watched"  # in the meta of a module that must not change what it is given

# The changes that a tensor has gone through.
History = tuple[fx.Node, ...]


class Memory:
    """Follows tensors through the nodes of a graph, as they are run.

    Parameters
    ----------
    root : nn.Module
    wary : bool
        Whether to take it that modules whose code is not known change what they are given.
    """

    def __init__(self, root: nn.Module, *, wary: bool = False) -> None:
        self._root, self._wary = root, wary
        self._place: dict[fx.Node, Any] = {}
        self._changes: dict[Any, History] = {}

    def run(self, node: fx.Node) -> dict[fx.Node, History]:
        """Run a node; return the changes that what it reads has gone through."""
        read = {source: self.changes(source) for source in node.all_input_nodes if source in self._place}
        changed = _changed(self._root, node)
        views = changed or _viewed(self._root, node)
        if node.op == "get_attr":
            self._place[node] = str(node.target)
        else:
            self._place[node] = next((self._place[source] for source in views if source in self._place), node)
        unknown = node.all_input_nodes if self._wary and is_unknown(self._root, node) else []
        for source in changed or unknown:
            place = self._place.get(source)
            self._changes[place] = (*self._changes.get(place, ()), node)
        return read

    def receive(self, node: fx.Node, changes: History) -> None:
        """Take what another piece has computed, a copy."""
        self._place[node], self._changes[node] = node, changes

    def changes(self, node: fx.Node) -> History:
        """Return the changes that a tensor has gone through."""
        return self._changes.get(self._place[node], ())

    def leave(self) -> None:
        """Forget all but the model's own tensors, as a piece does when it ends."""
        self._place, self._changes = {}, {key: value for key, value in self._changes.items() if isinstance(key, str)}


def changed_in_place(root: nn.Module, nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """Return the steps that change what they are given, and what that is a view of, but for the model's own tensors.

    They cannot be done over again elsewhere, as what does not come from the examples is: what they change, others read.
    """
    found: set[fx.Node] = set()
    for node in nodes:
        steps, bases = {node}, _changed(root, node)
        while bases and bases[0].op != "get_attr":
            steps.add(bases[0])
            bases = _viewed(root, bases[0])
        if len(steps) > 1 and not bases:
            found |= steps
    return {node for node in found if node.op != "placeholder"}


def seen(root: nn.Module, nodes: Iterable[fx.Node], *, wary: bool = False) -> dict[fx.Node, dict[fx.Node, History]]:
    """Return for each node of an order what changes its sources have gone through when it reads them; see `Memory`."""
    memory = Memory(root, wary=wary)
    return {node: memory.run(node) for node in nodes}


def seen_otherwise(
    root: nn.Module,
    nodes: Sequence[fx.Node],
    runs: Sequence[Sequence[fx.Node]],
    handed: Sequence[Mapping[int, Any]],
    *,
    wary: bool = False,
) -> fx.Node | None:
    """Return a change in place that a node of one of several pieces sees otherwise than in the whole; None if none.

    Parameters
    ----------
    root : nn.Module
    nodes : sequence of fx.Node
        Of the whole, in order.
    runs : sequence of sequence of fx.Node
        What each piece runs.
    handed : sequence of dict
        For each piece, what it is given, by the piece that gives it.
    wary : bool
        See `Memory`.
    """
    whole = seen(root, nodes, wary=wary)
    if not any(changes for read in whole.values() for changes in read.values()):
        return None
    sides, ends = (Memory(root, wary=wary), Memory(root, wary=wary)), list[dict[fx.Node, History]]()
    for piece, run in enumerate(runs):
        memory = sides[piece % 2]
        memory.leave()
        given = [(node, ends[giver][node]) for giver, some in handed[piece].items() for node in some]
        for node, changes in given:
            memory.receive(node, changes)
        for node in run:
            for source, changes in memory.run(node).items():
                if changes != whole[node][source] and not asks_for_fact(node):
                    return next(iter({*changes} ^ {*whole[node][source]} or changes))
        ends.append({node: memory.changes(node) for node in run})
    return None


def _changed(root: nn.Module, node: fx.Node) -> list[fx.Node]:
    """Return what a node changes in place, as far as can be told."""
    if getattr(node.target, "_schema", None) is not None:  # of torch.export
        return same_memory(node, written=True)
    if isinstance(out := node.kwargs.get("out"), fx.Node):
        return [out]
    name = str(getattr(node.target, "__name__", node.target))
    if node.op == "call_module":
        changes = _works_in_place(root.get_submodule(name))
    else:
        changes = node.op in ("call_function", "call_method") and (changes_first(node.target) or _told_to(node))
    return node.all_input_nodes[:1] if changes else []


def is_unknown(root: nn.Module, node: fx.Node) -> bool:
    """Return whether a node is a module of one's own that is called whole: it may change what it is given."""
    if node.op != "call_module":
        return False
    module = root.get_submodule(str(node.target))
    return any(not type(each).__module__.startswith(("torch.", "torchvision.")) for each in module.modules())


def watch(root: nn.Module, nodes: Iterable[fx.Node]) -> None:
    """Have what modules of one's own do be looked at when it is done, see `check_version`."""
    for node in nodes:
        if is_unknown(root, node):
            node.meta[WATCHED] = True


def version(value: Any) -> int | None:
    """Return how often a tensor was changed in place; None of what does not tell."""
    return value._version if isinstance(value, torch.Tensor) and not value.is_inference() else None


def check_version(value: Any, before: int | None, name: str) -> None:
    """Refuse a change of what a module was given, where the other side of a cut would have to see it.

    Raises
    ------
    CutError
        If it was changed.
    """
    if version(value) != before:
        raise CutError(
            f"the module {name!r} changes in place what it is given, which is used elsewhere, too, and there "
            f"that would not be seen: have it make a new tensor (x = x + 1, inplace=False), cut elsewhere, "
            f"or {BY_HAND}."
        )


def _told_to(node: fx.Node) -> bool:
    """Return whether a function is given ``inplace=True``, by name or position."""
    if not callable(node.target) or True not in node.args:
        return node.kwargs.get("inplace") is True
    try:
        return inspect.signature(node.target).bind(*node.args, **node.kwargs).arguments.get("inplace") is True
    except (TypeError, ValueError):  # of a function written in C
        return False


def _works_in_place(module: nn.Module) -> bool:
    """Return whether a module changes what it is given: one of torch's layers, or several that begin with one."""
    if isinstance(module, nn.Sequential):
        first = next(
            (each for each in module if not isinstance(each, _VIEW_MODULES) or each.__dict__.get("inplace")), None
        )
        return first is not None and _works_in_place(first)
    return type(module).__module__.startswith("torch.") and getattr(module, "inplace", False) is True


def _viewed(root: nn.Module, node: fx.Node) -> list[fx.Node]:
    """Return what a node may return as it is, or a view of."""
    if getattr(node.target, "_schema", None) is not None:
        return same_memory(node)
    if node.op == "call_module":
        return node.all_input_nodes[:1] if isinstance(root.get_submodule(str(node.target)), _VIEW_MODULES) else []
    if node.target is getattr:  # an entry of what a module returns is that, each time it is asked for
        entry = not hasattr(torch.Tensor, str(node.args[1]))
        return node.all_input_nodes[:1] if entry or node.args[1] in _VIEW_ATTRIBUTES else []
    name = str(getattr(node.target, "__name__", node.target))
    return node.all_input_nodes[:1] if node.op in ("call_function", "call_method") and name in _VIEWS else []
