"""Dividing a recorded model into consecutive pieces, which run in turn on the client and on the server.

A piece starts where the model first enters the submodule it is named after. What is not computed from the examples
(parameters, constants, sizes) lives where it is used, wherever the code mentions it first. What a piece computes goes
to the next one; what is needed again two pieces later, which is on the same side, is kept there and does not cross.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import fx, nn

from psl_flower.errors import CutError
from psl_flower.split.half import as_activations
from psl_flower.split.in_place import WATCHED, changed_in_place, check_version, seen_otherwise, version, watch
from psl_flower.split.nodes import (
    asks_for_device,
    asks_for_fact,
    at,
    input_name,
    is_batch_size,
    is_input,
    is_known_of_any_batch,
    is_raw,
    is_shape_of_input,
    is_symbol,
    modules_of,
    shown,
    size_in,
)
from psl_flower.split.refused import BY_HAND
from psl_flower.split.trace import Trace

NAMES = {2: ("client half", "server half"), 3: ("head", "body", "tail")}
_SIDES = ("client", "server")

SIZES = "psl_flower.sizes"  # in the meta of a tensor without values, which crosses a cut to tell the sizes of another


class UnknownNumber(CutError):
    """A number would have to cross a cut: torch.export may know it as the size of a tensor that does."""


@dataclass(frozen=True, eq=False)
class Pieces:
    """The nodes of a graph by piece.

    Parameters
    ----------
    runs : list of list of fx.Node
        What each piece runs.
    sent : list of list of fx.Node
        What each piece hands to the next, across a cut.
    kept : list of list of fx.Node
        What each piece hands to the one after that, on its own side.
    """

    runs: list[list[fx.Node]]
    sent: list[list[fx.Node]]
    kept: list[list[fx.Node]]


def divide(root: nn.Module, recorded: Trace, cuts: Sequence[str]) -> list[dict[bool, fx.Graph]]:
    """Divide what was recorded at one or two cuts.

    Returns
    -------
    list of dict[bool, fx.Graph]
        For each piece its graph in each mode. The first takes the model's inputs and the last returns its outputs.
        Between them go tuples of tensors; of three pieces, the first returns two, ``(sent, kept)``, and the last takes
        what the second returned and then what was kept.

    Raises
    ------
    CutError
        If it cannot be divided so.
    """
    divided = {graph: _divide(root, graph, cuts, recorded.shared) for graph in recorded.graphs.values()}
    _check_disjoint(root, divided.values(), len(cuts) + 1)
    return [{mode: divided[graph][i] for mode, graph in recorded.graphs.items()} for i in range(len(cuts) + 1)]


def pieces_of(root: nn.Module, graph: fx.Graph, cuts: Sequence[str], shared: Collection[str]) -> Pieces:
    """Return the nodes of a graph by piece.

    Raises
    ------
    CutError
        If the model never enters a cut, or in another order.
    """
    nodes = list(graph.nodes)
    return _assign(root, nodes, starts_of(nodes, cuts), shared)


def _divide(root: nn.Module, graph: fx.Graph, cuts: Sequence[str], shared: Collection[str]) -> list[fx.Graph]:
    pieces = pieces_of(root, graph, cuts, shared)
    _check_parameters(root, pieces)
    _check_changes(root, list(graph.nodes), pieces)
    for piece, sent in enumerate(pieces.sent):
        for node in sent:
            if is_raw(node) and input_name(node) not in shared:
                name = input_name(node)
                later = (at(user) for user in node.users if user in {*chain(*pieces.runs[piece + 1 :])})
                raise CutError(
                    f"the input {name!r} is used after the cut{next(later, '')}, so raw examples would be sent to the "
                    f"server: cut later, or if that is intended, say so, Cut(name, share=({name!r},)), or "
                    f"{BY_HAND}."
                )
            _check_rows(node)
        if all(is_raw(node) or SIZES in node.meta for node in sent):
            what = "it" if piece == 0 else f"the tail {cuts[1]!r}"
            raise CutError(f"nothing computed before {what} is used after it, so no tensor would cross the cut.")
    return [_piece_graph(pieces, piece) for piece in range(len(cuts) + 1)]


def _check_changes(root: nn.Module, nodes: Sequence[fx.Node], pieces: Pieces) -> None:
    """Refuse a change in place that would not be seen, or be seen too early, across a cut."""
    sent, kept = [[], *pieces.sent], [[], [], *pieces.kept]
    handed = [{i - 1: sent[i], i - 2: kept[i]} if i > 1 else {i - 1: sent[i]} for i in range(len(pieces.runs))]
    node = seen_otherwise(root, nodes, pieces.runs, handed)
    if node is None:
        if seen_otherwise(root, nodes, pieces.runs, handed, wary=True) is not None:
            watch(root, nodes)
    else:
        raise CutError(
            f"{node.name!r}{at(node)} changes a tensor in place that is used on the other side of a cut, too, which "
            f"would not see it: make a new one there (relu in place of relu_, inplace=False), cut elsewhere, or "
            f"{BY_HAND}."
        )


def _check_rows(node: fx.Node) -> None:
    """Refuse what would cross and is known, by torch.export, to have no row an example."""
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor) and not (value.ndim and is_symbol(value.shape[0])):
        modules = modules_of(node)
        where = f", computed in {modules[-1]!r}," if any(modules) else ""
        raise CutError(
            f"{node.name!r}{where} would cross, but its first dimension is not the batch, its shape is "
            f"{tuple(value.shape)}: cut before what computes it, or after its last use, or {BY_HAND}."
        )


def starts_of(nodes: Sequence[fx.Node], cuts: Sequence[str]) -> list[int]:
    """Return where each cut, or a module inside it, is first called."""
    starts: list[int] = []
    for cut in cuts:
        calls = [any(f"{name}.".startswith(f"{cut}.") for name in modules_of(node)) for node in nodes]
        if True not in calls:
            raise CutError(f"the model never calls {'it' if cut == cuts[0] else repr(cut)}.")
        starts.append(calls.index(True))
    if sorted({*starts}) != starts:
        raise CutError(f"the tail {cuts[1]!r} must come after it, but the model calls it before, or with it.")
    return starts


def _classify(root: nn.Module, nodes: Iterable[fx.Node], shared: Collection[str]) -> tuple[set[fx.Node], set[fx.Node]]:
    """Return the nodes that are facts (sizes, dtypes, numbers) and the nodes computed from the examples' values.

    What is computed of shared inputs alone, without parameters, is neither: it is computed where it is used, as
    constants are.
    """
    facts: set[fx.Node] = set()
    from_data = changed_in_place(root, nodes)
    of_shared: set[fx.Node] = set()
    for node in nodes:
        sources = node.all_input_nodes
        if node.op == "placeholder":
            (of_shared if node.target in shared else from_data).add(node)
        elif is_raw(node) and input_name(node) in shared:
            of_shared.add(node)
        elif node in from_data:
            continue
        elif node.op in ("call_function", "call_method") and (
            asks_for_fact(node) or (sources and facts.issuperset(sources))
        ):
            facts.add(node)
        elif not from_data.isdisjoint(sources):
            from_data.add(node)
        elif not of_shared.isdisjoint(sources):
            (from_data if any(state_of(root, used) for used in (node, *sources)) else of_shared).add(node)
    return facts, from_data


def _assign(root: nn.Module, nodes: Sequence[fx.Node], starts: Sequence[int], shared: Collection[str]) -> Pieces:
    """Say which piece runs a node, and what the pieces hand to one another."""
    last = len(starts)
    facts, from_data = _classify(root, nodes, shared)
    given = {node for node in nodes if is_input(node) or (is_raw(node) and input_name(node) in shared)}
    own = {
        node: 0 if is_raw(node) else sum(start <= position for start in starts) for position, node in enumerate(nodes)
    }
    for node in reversed(nodes):  # a new tensor is made where it is filled
        if (
            node in from_data
            and node.users
            and node.op == "call_function"
            and from_data.isdisjoint(node.all_input_nodes)
        ):
            own[node] = max(own[node], min(own[user] for user in node.users))
    for piece in range(2, last + 1):
        own.update(dict.fromkeys(_joins(root, nodes, own, piece, facts, from_data), piece))
    runs: dict[fx.Node, set[int]] = {}
    for node in reversed(nodes):
        if node in from_data or node in given or not node.users or own[node] == last:
            runs[node] = {own[node]}
        else:  # what does not come from the examples runs where it is used
            users = [user for user in node.users if not asks_for_device(user)] or node.users
            runs[node] = set().union(*(runs[user] for user in users))
    running = [[node for node in nodes if piece in runs[node]] for piece in range(last + 1)]
    needed: list[set[fx.Node]] = []
    for piece in range(last + 1):
        wanted = {
            source
            for node in running[piece]
            for source in node.all_input_nodes
            if node not in facts or SIZES in source.meta
            if (source in from_data or source in given) and own[source] < piece
        }
        for node in running[piece]:
            # a number known two pieces back is known on the same side: its tensor is kept, and asked again
            if node in facts:
                wanted |= {s for s in _tensors_of(node, facts) if s in from_data and own[s] == piece - 2}
        needed.append(wanted)

    def handed(steps: int) -> list[list[fx.Node]]:
        return [
            [node for node in nodes if own[node] == i and node in wanted] for i, wanted in enumerate(needed[steps:])
        ]

    return Pieces(running, sent=handed(1), kept=handed(2))


def _joins(
    root: nn.Module,
    nodes: Sequence[fx.Node],
    own: dict[fx.Node, int],
    piece: int,
    facts: set[fx.Node],
    from_data: set[fx.Node],
) -> list[fx.Node]:
    """Return what stands ahead of a piece and is better run in it: what joins a skip connection to its input.

    ``self.up(torch.cat([skip, x], 1))``: if the cat ran before the piece that starts at `up`, the skip connection would
    cross to the other side and back. It has no parameters and is for this piece only, so it can run there.
    """
    position = {node: i for i, node in enumerate(nodes)}
    late: set[fx.Node] = set()
    for node in reversed(nodes):
        if (
            own[node] == piece - 1
            and node.op in ("call_function", "call_method", "call_module")
            and node.users
            and all(own[user] == piece or user in late for user in node.users)
            # nothing comes in between: it might change in place what this reads
            and all(
                own[user] == piece or user in late or position[user] <= position[node]
                for source in node.all_input_nodes
                for user in source.users
            )
            and not state_of(root, node)
            and not any(state_of(root, source) for source in node.all_input_nodes if source.op == "get_attr")
        ):
            late.add(node)
    joined: dict[fx.Node, None] = {}
    for node in nodes:
        if (
            node in late
            and node not in facts
            and any(s in joined or (s in from_data and own[s] == piece - 2) for s in _tensors_of(node, facts))
        ):
            joined[node] = None
    return list(joined)


def _tensors_of(node: fx.Node, facts: set[fx.Node]) -> Iterator[fx.Node]:
    """Yield what a node is computed from; instead of sizes and other facts, what they were asked of."""
    for source in node.all_input_nodes:
        if source not in facts:
            yield source
        elif not is_known_of_any_batch(source):
            yield from _tensors_of(source, facts)


def _piece_graph(pieces: Pieces, piece: int) -> fx.Graph:
    graph = fx.Graph()
    last = len(pieces.runs) - 1
    received = [*pieces.sent[piece - 1], *(pieces.kept[piece - 2] if piece > 1 else [])] if piece else []
    given = [graph.placeholder(node.name) for node in received]
    # Copies, because the model may go on in place, which autograd refuses on the leaf tensors a piece receives.
    copies = {node: graph.call_method("clone", (tensor,)) for node, tensor in zip(received, given, strict=True)}
    for node in pieces.runs[piece]:
        if all(source in copies for source in node.all_input_nodes):
            watched = [copies[source] for source in node.all_input_nodes] if WATCHED in node.meta else []
            before = [graph.call_function(version, (source,)) for source in watched]
            copies[node] = graph.node_copy(node, copies.__getitem__)
            for source, number in zip(watched, before, strict=True):
                graph.call_function(check_version, (source, number, str(node.target)))
        elif (size := size_in(node, received)) is not None:
            copies[node] = graph.call_method("size", (given[size[0]], size[1]))
        elif is_batch_size(node):
            shape = graph.call_function(getattr, (given[0], "shape"))
            copies[node] = graph.call_function(operator.getitem, (shape, 0))
        elif asks_for_device(node):
            copies[node] = graph.call_function(getattr, (given[0], "device"))
        elif not is_shape_of_input(node):
            side = _SIDES[(piece + 1) % 2]
            raise UnknownNumber(
                f"{node.format_node()}{at(node)} is a number that only the {side} knows, and only tensors cross the "
                f"cut: compute it from a tensor that crosses, cut elsewhere, or {BY_HAND}."
            )
    if piece < last:
        inputs = tuple(given or (copies[node] for node in pieces.runs[piece] if is_input(node)))

        def handed(nodes: list[fx.Node]) -> fx.Node:
            names = tuple(map(shown, nodes))
            return graph.call_function(as_activations, (tuple(copies[node] for node in nodes), inputs, names))

        out = handed(pieces.sent[piece])
        keeps = piece + 2 <= last
        kept = handed(pieces.kept[piece]) if keeps and pieces.kept[piece] else ()
        graph.output((out, kept) if keeps else out)
    return graph


def state_of(root: nn.Module, node: fx.Node) -> dict[str, torch.Tensor]:
    """Return the parameters and persistent buffers that a node uses, by their names in the whole model."""
    target = str(node.target)
    if node.op == "call_module":
        return dict(root.get_submodule(target).state_dict(prefix=f"{target}.", keep_vars=True))
    if node.op == "get_attr":
        owner, _, name = target.rpartition(".")
        kept = root.get_submodule(owner).state_dict(keep_vars=True)
        return {target: kept[name]} if name in kept else {}
    return {}


def _check_parameters(root: nn.Module, pieces: Pieces) -> None:
    """Refuse a piece with nothing to train; a tail may be just that, for it is there to keep labels on the client."""
    names = NAMES[len(pieces.runs)]
    remedies = ("cut later", "cut earlier" if len(names) == 2 else "cut earlier, or let the tail begin later")
    for name, nodes, remedy in zip(names, pieces.runs, remedies, strict=False):
        if not any(isinstance(value, nn.Parameter) for node in nodes for value in state_of(root, node).values()):
            raise CutError(f"the {name} would have no parameters, {remedy}.")


def _check_disjoint(root: nn.Module, divided: Iterable[Sequence[fx.Graph]], pieces: int) -> None:
    """Refuse parameters and persistent buffers used on both sides (in training, in evaluation, or one in each)."""
    names: tuple[dict[int, str], dict[int, str]] = ({}, {})
    for graphs in divided:
        for piece, graph in enumerate(graphs):
            side = names[piece % 2]
            side.update((id(value), name) for node in graph.nodes for name, value in state_of(root, node).items())
    for key in names[0].keys() & names[1].keys():
        ours, theirs = names[0][key], names[1][key]
        other = f" (there as {theirs!r})" if ours != theirs else ""
        back = ", or, where both ends of the model use it, bring the end back to the client by naming a tail"
        raise CutError(
            f"{ours!r} would be needed on the client and on the server{other}: cut where all that uses it is on one "
            f"side, or give each side its own{back if pieces == 2 else ''}."
        )
