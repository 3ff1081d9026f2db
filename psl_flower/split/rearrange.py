"""What is changed of a recording before it is divided, so that what belongs on a client is computed there."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from psl_flower.split.asked import Taken
from psl_flower.split.in_place import seen, watch
from psl_flower.split.nodes import PLACE, asks_for_fact, at, is_input, is_known_of_any_batch, is_raw, modules_of
from psl_flower.split.partition import SIZES, Pieces, pieces_of, starts_of, state_of
from psl_flower.split.refused import BY_HAND
from psl_flower.split.told import tell_dtype, tell_sizes, told_dtype, told_sizes
from psl_flower.split.trace import Trace

# How code asks for the sizes of a tensor, by node target; `getattr` with one of the first.
_SIZE_ATTRIBUTES = ("shape", "ndim")
_SIZE_METHODS = ("size", "dim", "ndimension")

# What computes a number, or as many entries as there are, of the values of examples.
_COUNTING = {"argwhere", "bincount", "item", "masked_select", "nonzero", "repeat_interleave", "tolist", "unique"}
_COUNTING |= {"unique_consecutive"}


def prepared(root: nn.Module, recorded: Trace, cuts: Sequence[str]) -> Trace:
    """Return what was recorded as it can be divided at some cuts.

    What holds tensors is taken apart at once, see `taken_apart`. What modules of one side do after a cut has begun,
    with inputs of its own, is done before it, see `in_order`; inputs that may be None are, where they would have to
    cross; sizes that only one side knows cross as a tensor without values, see `with_sizes`.
    """
    recorded = _each(recorded, lambda graph: in_order(root, taken_apart(graph), cuts))
    recorded = without_raw_inputs(root, recorded, cuts)
    return _each(recorded, lambda graph: with_sizes(root, graph, cuts, recorded.shared))


def _each(recorded: Trace, change: Callable[[fx.Graph], fx.Graph]) -> Trace:
    graphs = {graph: change(graph) for graph in recorded.graphs.values()}
    return replace(recorded, graphs={mode: graphs[graph] for mode, graph in recorded.graphs.items()})


def taken_apart(graph: fx.Graph) -> fx.Graph:
    """Ask what holds tensors for its entries (``out.features``, ``out["aux"]``) when made, for only tensors cross.

    That is where some entry is none that a tensor has; what is used in another way may be changed, and is left.
    """
    nodes = list(graph.nodes)
    position = {node: i for i, node in enumerate(nodes)}
    moved: dict[fx.Node, list[fx.Node]] = {}
    for node in nodes:
        names = [user.args[1] for user in node.users if _is_entry(user)]
        if (
            all(_is_entry(user) or isinstance(user.target, Taken) for user in node.users)
            and not is_raw(node)
            and any(isinstance(name, str) and _is_foreign(name) for name in names)
        ):
            moved[node] = sorted(node.users, key=position.__getitem__)
    if not moved:
        return graph
    late = {user for users in moved.values() for user in users}
    order: list[fx.Node] = []
    for node in nodes:
        waiting = [] if node in late else [node]
        while waiting:
            order.append(waiting[0])
            waiting = [*moved.get(waiting[0], []), *waiting[1:]]
    return _copy(order)


def _is_entry(node: fx.Node) -> bool:
    """Return whether a step gives an entry of what it is given: an attribute, or an item by name or number."""
    return node.target in (getattr, operator.getitem) and len(node.args) == 2 and isinstance(node.args[1], str | int)


def _is_foreign(name: str) -> bool:
    """Return whether a tensor has no attribute of a name, but for methods: those are called, not asked for."""
    return callable(getattr(torch.Tensor, name, min))


def in_order(root: nn.Module, graph: fx.Graph, cuts: Sequence[str]) -> fx.Graph:
    """Put what modules of a piece do after the next one has begun, and could have done before, before it.

    ``head(body(a)), head(body(b))``, cut at the head: the second call of the body is the client's, like the first. With
    it go what it is computed of, and what leads from it to the cut.
    """
    for piece, cut in enumerate(cuts):
        nodes = list(graph.nodes)
        starts = [0, *starts_of(nodes, cuts)]
        before, after = nodes[starts[piece] : starts[piece + 1]], nodes[starts[piece + 1] : -1]
        held = {id(value) for node in before for value in state_of(root, node).values()}
        done = set(nodes[: starts[piece + 1]])
        free: dict[fx.Node, None] = {}
        for node in after:
            if done.issuperset(source for source in node.all_input_nodes if source not in free) and not _within(
                node, cuts[piece:]
            ):
                free[node] = None
        used = {node: [node, *(s for s in node.all_input_nodes if s.op == "get_attr")] for node in free}
        seeds = [n for n in free if any(id(v) in held for each in used[n] for v in state_of(root, each).values())]
        if not seeds:
            continue
        entered = [node for node in after if _within(node, [cut])]
        led = _reached(seeds, lambda node: node.users) & _reached(entered, lambda node: node.all_input_nodes)
        moved = {*_reached([*seeds, *(led & free.keys())], lambda node: node.all_input_nodes)} & free.keys()
        order = _in_order(nodes, moved, starts[piece + 1])
        if seen(root, order) == seen(root, nodes):
            if seen(root, order, wary=True) != seen(root, nodes, wary=True):
                watch(root, order)
            graph = _copy(order)
    return graph


def _within(node: fx.Node, names: Collection[str]) -> bool:
    """Return whether a step is one of some modules, or of modules within them."""
    return any(f"{module}.".startswith(f"{name}.") for module in modules_of(node) for name in names)


def _reached(begin: Iterable[fx.Node], ways: Callable[[fx.Node], Iterable[fx.Node]]) -> set[fx.Node]:
    """Return some nodes, and all those that can be reached from them."""
    found: set[fx.Node] = set()
    open_ = list(begin)
    while open_:
        node = open_.pop()
        if node not in found:
            found.add(node)
            open_ += ways(node)
    return found


def _in_order(nodes: Sequence[fx.Node], moved: Collection[fx.Node], start: int) -> list[fx.Node]:
    """Return nodes with some of them ahead of what begins at `start`, in their order."""
    late = nodes[start:]
    return [*nodes[:start], *(node for node in late if node in moved), *(node for node in late if node not in moved)]


def _copy(nodes: Iterable[fx.Node]) -> fx.Graph:
    """Return a graph of copies of nodes, in their order."""
    copy = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        values[node] = copy.node_copy(node, values.__getitem__)
    return copy


def with_sizes(root: nn.Module, graph: fx.Graph, cuts: Sequence[str], shared: Collection[str]) -> fx.Graph:
    """Let the sizes and the dtype of a tensor that stays on one side cross, where code on the other asks for them.

    They cross as the sizes of a tensor without values, see `told`.
    """
    asking = _asking(pieces_of(root, graph, cuts, shared))
    if not asking:
        return graph
    copy = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    told: dict[tuple[fx.Node, bool], fx.Node] = {}
    for node in graph.nodes:
        if node not in asking:
            values[node] = copy.node_copy(node, values.__getitem__)
            for kind in sorted({_asks_for_dtype(user) for user in node.users if user in asking}):
                told[node, kind] = _told(copy, node, values[node], dtype=kind)
            continue
        known = told[node.all_input_nodes[0], _asks_for_dtype(node)]
        asked = [*node.args[1:], *node.kwargs.values()]
        if node.target in ("dim", "ndimension") or asked == ["ndim"]:
            values[node] = copy.call_function(len, (known,))
        elif node.target == "size" and asked:
            values[node] = copy.call_function(operator.getitem, (known, asked[0]))
        else:
            values[node] = known
    return copy


def _asking(pieces: Pieces) -> set[fx.Node]:
    """Return the nodes that ask for sizes or the dtype of a tensor which is neither on their side nor crosses to it."""
    home = {node: piece for piece, run in reversed([*enumerate(pieces.runs)]) for node in run}
    found = set()
    for piece, run in enumerate(pieces.runs[1:], start=1):
        known = {*run, *pieces.sent[piece - 1], *(pieces.kept[piece - 2] if piece > 1 else ())}
        for node in run:
            if not (_asks_for_sizes(node) or _asks_for_dtype(node)) or is_known_of_any_batch(node, run):
                continue
            (tensor,) = node.all_input_nodes
            if tensor not in known and home[tensor] == piece - 1 and "val" not in tensor.meta and not _counts(tensor):
                found.add(node)
    return found


def _counts(tensor: fx.Node) -> bool:
    """Return whether the sizes of a tensor may tell of values of the examples: how many are positive, say."""
    for node in _reached([tensor], lambda node: node.all_input_nodes):
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        alone = name == "where" and len(node.args) == 1
        if name in _COUNTING or alone or (name == "getitem" and any(map(_has_values, node.all_input_nodes[1:]))):
            return True
    return False


def _has_values(node: fx.Node) -> bool:
    """Return whether a node is computed of more than sizes."""
    sources = _reached([node], lambda node: [] if asks_for_fact(node) else node.all_input_nodes)
    return any(source.op in ("placeholder", "get_attr", "call_module") for source in sources)


def _asks_for_sizes(node: fx.Node) -> bool:
    if node.target is getattr:
        return node.args[1] in _SIZE_ATTRIBUTES
    return node.op == "call_method" and node.target in _SIZE_METHODS and len(node.all_input_nodes) == 1


def _asks_for_dtype(node: fx.Node) -> bool:
    return node.target is getattr and node.args[1] == "dtype"


def _told(graph: fx.Graph, node: fx.Node, tensor: fx.Node, *, dtype: bool) -> fx.Node:
    """Add the tensor that tells a node's sizes or dtype, and return what reads that; `tensor` is the node's copy."""
    tell, read = (tell_dtype, told_dtype) if dtype else (tell_sizes, told_sizes)
    sent = graph.call_function(tell, (tensor, f"{node.name!r}{at(node)}"))
    sent.meta |= {SIZES: True, PLACE: node.meta.get(PLACE)}
    return graph.call_function(read, (graph.call_function(getattr, (sent, "shape")),))


def without_raw_inputs(root: nn.Module, recorded: Trace, cuts: Sequence[str]) -> Trace:
    """Let the inputs that may be None be None for good where they would have to cross a cut as they are."""
    arguments = recorded.arguments
    raw: set[str] = set()
    for graph in recorded.graphs.values():
        pieces = pieces_of(root, graph, cuts, recorded.shared)
        raw |= {str(node.target) for sent in pieces.sent for node in sent if is_input(node)}
    private = raw - recorded.shared
    optional = [name for name in arguments.inputs if name in private and name not in arguments.needed]
    if not optional:
        return recorded
    reason = (
        f"its value is used after the cut, so raw examples would be sent to the server: leave it out, cut later, or, "
        f"if that is intended, {BY_HAND}"
    )
    graphs = {graph: _without(graph, optional) for graph in recorded.graphs.values()}
    return replace(
        recorded,
        graphs={mode: graphs[graph] for mode, graph in recorded.graphs.items()},
        arguments=arguments.without(optional, reason),
    )


def _without(graph: fx.Graph, names: Iterable[str]) -> fx.Graph:
    """Return a copy of a graph that has None in place of some inputs."""
    copy = fx.Graph()
    values: dict[fx.Node, Any] = {node: None for node in graph.nodes if is_input(node) and node.target in names}
    copy.output(copy.graph_copy(graph, values))
    return copy
