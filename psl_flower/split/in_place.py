"""What is changed in place, and who sees it: dividing or reordering a recording must not change that.

Each piece works on copies of what crosses. Who reads a tensor, or a view of it, that is changed in another piece would
see it as it was.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import fx, nn
from torch.nn.modules.dropout import _DropoutNd

from psl_flower.split.nodes import asks_for_fact, same_memory

# Of functions and methods: what may return its first argument, or a view of it.
_VIEWS = {"chunk", "contiguous", "detach", "diagonal", "double", "dropout", "expand", "expand_as", "flatten", "float"}
_VIEWS |= {"getitem", "movedim", "narrow", "permute", "real", "reshape", "select", "split", "squeeze", "swapaxes", "t"}
_VIEWS |= {"to", "transpose", "type_as", "unbind", "unflatten", "unfold", "unsqueeze", "view", "view_as"}
_VIEW_ATTRIBUTES = ("T", "mT", "data", "real")
_VIEW_MODULES = (nn.Identity, nn.Flatten, nn.Unflatten, _DropoutNd)
_CHANGING = (operator.setitem, operator.iadd, operator.isub, operator.imul, operator.itruediv)

# The changes that a tensor has gone through.
History = tuple[fx.Node, ...]


class Memory:
    """Follows tensors through the nodes of a graph, as they are run.

    Parameters
    ----------
    root : nn.Module
    """

    def __init__(self, root: nn.Module) -> None:
        self._root = root
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
        for source in changed:
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


def seen(root: nn.Module, nodes: Iterable[fx.Node]) -> dict[fx.Node, dict[fx.Node, History]]:
    """Return for each node of an order what changes its sources have gone through when it reads them."""
    memory = Memory(root)
    return {node: memory.run(node) for node in nodes}


def seen_otherwise(
    root: nn.Module, nodes: Sequence[fx.Node], runs: Sequence[Sequence[fx.Node]], handed: Sequence[Mapping[int, Any]]
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
    """
    whole = seen(root, nodes)
    if not any(changes for read in whole.values() for changes in read.values()):
        return None
    sides, ends = (Memory(root), Memory(root)), list[dict[fx.Node, History]]()
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
    name = str(getattr(node.target, "__name__", node.target))
    changes = (
        _works_in_place(root.get_submodule(name))
        if node.op == "call_module"
        else node.op in ("call_function", "call_method")
        and (
            node.target in _CHANGING
            or node.kwargs.get("inplace") is True
            or (name.endswith("_") and not name.endswith("__"))
        )
    )
    return node.all_input_nodes[:1] if changes else []


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
    if node.target is getattr:
        return node.all_input_nodes[:1] if node.args[1] in _VIEW_ATTRIBUTES else []
    name = str(getattr(node.target, "__name__", node.target))
    return node.all_input_nodes[:1] if node.op in ("call_function", "call_method") and name in _VIEWS else []
