"""Cutting an unmodified model in two at a named submodule.

The client half is what the model computes before it first enters that submodule, the server half everything else.
What is not computed from the examples (parameters, constants, sizes) lives where it is used, wherever the code
mentions it first.
"""

from __future__ import annotations

import copy
import difflib
import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import fx, nn

from psl_flower.errors import CutError
from psl_flower.split.half import TracedHalf, as_activations, copy_model
from psl_flower.split.trace import Trace, trace

# What to ask a tensor for that is no tensor: known without its values, but `item` and `tolist`.
_FACTS = frozenset({"shape", "ndim", "dtype", "device", "layout", "requires_grad", "is_cuda", "is_sparse"})
_FACT_METHODS = frozenset({"size", "dim", "ndimension", "numel", "nelement", "stride", "get_device", "element_size"})
_FACT_METHODS |= {"is_floating_point", "is_complex", "is_contiguous", "item", "tolist", "len"}


def split_module(model: nn.Module, cut: str) -> tuple[nn.Module, nn.Module]:
    """Cut a model into a client half and a server half; the model itself is left untouched.

    Both halves together compute exactly what the model computes, in training and in evaluation, for any batch size,
    and their parameters and buffers carry the model's own names. No parameter is in both; parameters that the model
    never uses are in neither. Residual connections stay, and several tensors may cross the cut.

    Only the modules that contain the cut are traced with torch.fx; the others are taken over whole. Where they behave
    differently in training and evaluation, both are traced and the half's ``training`` flag decides.
    Arguments of ``model.forward`` that have a default keep it.

    Parameters
    ----------
    model : nn.Module
    cut : str
        Qualified name of the first server-side submodule, such as "layer2" or "features.3".

    Returns
    -------
    client_half : nn.Module
        ``client_half(*inputs)`` returns a tuple of tensors, each with the batch first, also when only one crosses.
    server_half : nn.Module
        ``server_half(*activations)`` returns the model's output. It works on copies of the activations.

    Raises
    ------
    CutError
        If there is no such submodule or the model never calls it; if nothing would be left on one side; if a module,
        parameter or buffer would be needed on both sides; if raw inputs or numbers that depend on them would have to
        cross; or if the code around the cut cannot be traced.
    """
    _check_name(model, cut)
    root = copy_model(model)
    name = _first_name(root, cut)
    try:
        recorded = trace(root, name)
        graphs = _divide(root, recorded, name)
    except CutError as error:
        raise CutError(f"cut {cut!r}: {error}{_suggestions(model, cut)}") from error.__cause__
    client, server = (
        TracedHalf(root, {mode: pair[side] for mode, pair in graphs.items()}, recorded) for side in (0, 1)
    )
    shared = {*client.modules()} & {*server.modules()}  # without state, so each half gets its own
    for parent in list(client.modules()):
        for child, module in parent.named_children():
            if module in shared:
                setattr(parent, child, copy.deepcopy(module))
    return client, server


def cut_candidates(model: nn.Module, depth: int | None = None) -> list[str]:
    """List the submodules a model can be cut at, in the order in which it defines them.

    Parameters
    ----------
    model : nn.Module
    depth : int, optional
        How deep to look: 1 for the model's own children; by default all the way down.

    Returns
    -------
    list of str
        Names that `split_module` accepts.
    """
    root = copy_model(model)
    return list(_candidates(root, "", depth))


def listing(names: Sequence[object], most: int = 8) -> str:
    """Return at most `most` names, quoted and joined, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(repr, names[:most])) + more


def _candidates(root: nn.Module, parent: str, depth: int | None) -> Iterator[str]:
    children = [(f"{parent}.{name}" if parent else name) for name, _ in root.get_submodule(parent).named_children()]
    children = [child for child in children if _first_name(root, child) == child]
    if not children or depth == 0:
        return
    try:
        recorded = trace(root, children[0])
    except CutError:
        return  # nor can anything deeper be cut, for that needs the same code traced
    for child in children:
        try:
            _divide(root, recorded, child)
        except CutError:
            pass
        else:
            yield child
        yield from _candidates(root, child, None if depth is None else depth - 1)


def _check_name(model: nn.Module, cut: str) -> None:
    if not isinstance(cut, str) or not cut:
        raise CutError(f"cut must be the name of a submodule, got {cut!r}.{_suggestions(model, '')}")
    try:
        model.get_submodule(cut)
    except AttributeError:
        raise CutError(
            f"cut {cut!r}: {type(model).__name__} has no such submodule.{_suggestions(model, cut)}"
        ) from None


def _suggestions(model: nn.Module, cut: str) -> str:
    """Say which names might have been meant, and where the model can be cut."""
    names = [name for name, _ in model.named_modules() if name and name != cut]
    near = difflib.get_close_matches(cut, names, n=3)
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    candidates = cut_candidates(model, depth=1)
    if candidates:
        return f"{hint} {type(model).__name__} can be cut at {listing(candidates)}, or deeper inside them."
    return f"{hint} None of its children is a place to cut {type(model).__name__}: cut deeper, or use SplitModel."


def _first_name(root: nn.Module, name: str) -> str:
    """Return the name under which torch.fx knows the submodule called `name` (a module may have several names)."""
    module = root.get_submodule(name)
    return next(str(first) for first, candidate in root.named_modules() if candidate is module)


def _divide(root: nn.Module, recorded: Trace, cut: str) -> dict[bool, tuple[fx.Graph, fx.Graph]]:
    """Divide what was recorded into a client's and a server's part, in each mode."""
    pairs = {graph: _divide_graph(root, graph, cut) for graph in recorded.graphs.values()}
    _check_disjoint(root, pairs.values())
    return {mode: pairs[graph] for mode, graph in recorded.graphs.items()}


def _divide_graph(root: nn.Module, graph: fx.Graph, cut: str) -> tuple[fx.Graph, fx.Graph]:
    """Divide a graph at the first call of the submodule `cut` or of a module inside it."""
    nodes = list(graph.nodes)
    calls = [node.op == "call_module" and f"{node.target}.".startswith(f"{cut}.") for node in nodes]
    if True not in calls:
        raise CutError("the model never calls it.")
    ahead = frozenset(nodes[: calls.index(True)])
    facts, from_data = _classify(nodes)

    # On which sides each node runs: 0 client, 1 server. What does not come from the examples runs where it is used.
    sides: dict[fx.Node, set[int]] = {}
    for node in reversed(nodes):
        if node not in ahead:
            sides[node] = {1}
        elif node in from_data or not node.users:
            sides[node] = {0}
        else:
            sides[node] = set().union(*(sides[user] for user in node.users))
    client, server = ([node for node in nodes if side in sides[node]] for side in (0, 1))
    for side, part, remedy in (("client", client, "later"), ("server", server, "earlier")):
        if not any(isinstance(value, nn.Parameter) for node in part for value in _state(root, node).values()):
            raise CutError(f"the {side} half would have no parameters, cut {remedy}.")
    crossing = [
        node
        for node in client
        if node in from_data and any(1 in sides[user] and user not in facts for user in node.users)
    ]
    for node in crossing:
        if node.op == "placeholder":
            raise CutError(
                f"the input {node.target!r} is used after the cut, so raw examples would be sent to the server: cut "
                f"later, or cut by hand if that is intended: SplitModel(client=..., server=...)."
            )
    if not crossing:
        raise CutError("nothing computed before it is used after it, so no tensor would cross the cut.")
    return _client_graph(client, crossing), _server_graph(server, crossing)


def _classify(nodes: Iterable[fx.Node]) -> tuple[set[fx.Node], set[fx.Node]]:
    """Return the nodes that are facts (sizes, dtypes, numbers) and the nodes computed from the examples' values."""
    facts: set[fx.Node] = set()
    from_data: set[fx.Node] = set()
    for node in nodes:
        sources = node.all_input_nodes
        if node.op == "placeholder":
            from_data.add(node)
        elif node.op in ("call_function", "call_method") and (
            _asks_for_fact(node) or (sources and facts.issuperset(sources))
        ):
            facts.add(node)
        elif not from_data.isdisjoint(sources):
            from_data.add(node)
    return facts, from_data


def _asks_for_fact(node: fx.Node) -> bool:
    if node.target is getattr:
        return node.args[1] in _FACTS
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name in _FACT_METHODS


def _client_graph(nodes: Iterable[fx.Node], crossing: list[fx.Node]) -> fx.Graph:
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    inputs = tuple(copy for node, copy in copies.items() if node.op == "placeholder")
    names = tuple(repr(node.name) for node in crossing)
    graph.output(graph.call_function(as_activations, (tuple(copies[node] for node in crossing), inputs, names)))
    return graph


def _server_graph(nodes: Iterable[fx.Node], crossing: list[fx.Node]) -> fx.Graph:
    graph = fx.Graph()
    received = [graph.placeholder(node.name) for node in crossing]
    # Copies, because the model may go on in place, which autograd refuses on the leaf tensors a server receives.
    copies = {node: graph.call_method("clone", (tensor,)) for node, tensor in zip(crossing, received, strict=True)}
    for node in nodes:
        if all(source in copies for source in node.all_input_nodes):
            copies[node] = graph.node_copy(node, copies.__getitem__)
        elif _is_batch_size(node):
            shape = graph.call_function(getattr, (received[0], "shape"))
            copies[node] = graph.call_function(operator.getitem, (shape, 0))
        elif _is_device_of_input(node):
            copies[node] = graph.call_function(getattr, (received[0], "device"))
        elif not _is_shape_of_input(node):
            raise CutError(
                f"{node.format_node()} is a number that only the client knows, and only tensors cross the cut: compute "
                f"it from a tensor that crosses, cut elsewhere, or cut by hand: SplitModel(client=..., server=...)."
            )
    return graph


def _is_input(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "placeholder"


def _is_shape_of_input(node: Any) -> bool:
    """Whether a node is ``x.shape`` or ``x.size()``, of an input x."""
    if not isinstance(node, fx.Node) or not node.args or not _is_input(node.args[0]):
        return False
    if node.target is getattr:
        return node.args[1] == "shape"
    return node.target == "size" and len(node.args) == 1 and not node.kwargs


def _is_batch_size(node: fx.Node) -> bool:
    """Whether a node is ``x.shape[0]``, ``x.size()[0]`` or ``x.size(0)``, of an input x."""
    if node.target is operator.getitem:
        return _is_shape_of_input(node.args[0]) and node.args[1:] == (0,)
    asked = [*node.args[1:], *node.kwargs.values()]
    return node.target == "size" and _is_input(node.args[0]) and asked == [0]


def _is_device_of_input(node: fx.Node) -> bool:
    return node.target is getattr and _is_input(node.args[0]) and node.args[1] == "device"


def _state(root: nn.Module, node: fx.Node) -> dict[str, torch.Tensor]:
    """Return the parameters and persistent buffers that a node uses, by their names in the whole model."""
    target = str(node.target)
    if node.op == "call_module":
        return dict(root.get_submodule(target).state_dict(prefix=f"{target}.", keep_vars=True))
    if node.op == "get_attr":
        owner, _, name = target.rpartition(".")
        kept = root.get_submodule(owner).state_dict(keep_vars=True)
        return {target: kept[name]} if name in kept else {}
    return {}


def _check_disjoint(root: nn.Module, pairs: Iterable[tuple[fx.Graph, fx.Graph]]) -> None:
    """Refuse parameters and persistent buffers that both halves use (in training, in evaluation, or one in each)."""
    names: tuple[dict[int, str], dict[int, str]] = ({}, {})
    for pair in pairs:
        for side, graph in zip(names, pair, strict=True):
            side.update((id(value), name) for node in graph.nodes for name, value in _state(root, node).items())
    for key in names[0].keys() & names[1].keys():
        ours, theirs = names[0][key], names[1][key]
        other = f" (there as {theirs!r})" if ours != theirs else ""
        raise CutError(
            f"{ours!r} would be needed on the client and on the server{other}: cut where all that uses it is on one "
            f"side, or give each side its own."
        )
