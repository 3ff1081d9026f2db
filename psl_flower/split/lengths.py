"""Texts of several lengths: which tensors at a cut are as long as they are, so that those of clients can be joined.

Clients pad to the longest of their own texts, and what they send is padded to the longest of the step: the activations
with zeros, the mask with zeros too, so that nothing looks at them, labels with -100. What comes back is cut to the own
length. torch.export tells which sizes are that of the text; what torch.fx has recorded is run on an example, and on one
of shorter texts. It is always the second size, beside the batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, fx, nn

from psl_flower import tree
from psl_flower.split.half import Part
from psl_flower.split.modes import modes_kept
from psl_flower.split.nodes import constant, is_raw
from psl_flower.split.partition import pieces_of
from psl_flower.split.place import is_text
from psl_flower.split.trace import Trace
from psl_flower.tree import Tree


def mark_lengths(
    parts: Sequence[Part], root: nn.Module, recorded: Trace, cuts: Sequence[str], batch: Mapping[str, Any] | None
) -> None:
    """Tell parts which of the tensors they are given and give are as long as the texts; none, where that is no use.

    They are of use only if a mask of the texts crosses to the server, which hides what was padded. A batch is needed
    for what torch.fx has recorded.
    """
    if batch is None:
        found = {_long(root, graph, cuts, recorded.shared) for graph in recorded.graphs.values()}
    else:
        sent = (pieces_of(root, graph, cuts, recorded.shared).sent[0] for graph in recorded.graphs.values())
        found = {_tried(parts, raw, batch) for raw in {tuple(is_raw(node) for node in nodes) for nodes in sent}}
    config = getattr(root, "config", None)
    for i, flags in enumerate(found.pop() if len(found) == 1 else ()):
        parts[i].gives = parts[i + 1].takes = flags
        parts[i + 1].longest = getattr(config, "max_position_embeddings", None)


def _long(
    root: nn.Module, graph: fx.Graph, cuts: Sequence[str], shared: frozenset[str]
) -> tuple[tuple[bool, ...], ...]:
    """Return for each cut, and each tensor that crosses it, whether its second size is the length of the texts."""
    inputs = [node for node in graph.nodes if is_raw(node)]
    values = [node.meta.get("val") for node in inputs]
    lengths: list[Any] = [value.shape[1] for value in values if isinstance(value, Tensor) and is_text(value)]
    if not lengths or constant(lengths[0]) is not None:
        return ()
    length = lengths[0].node.expr
    found = []
    for sent in pieces_of(root, graph, cuts, shared).sent:
        sizes = [[_expression(size) for size in node.meta["val"].shape] for node in sent]
        if any(length in getattr(size, "free_symbols", ()) for each in sizes for size in (*each[:1], *each[2:])):
            return ()
        found.append(tuple(len(each) > 1 and each[1] == length for each in sizes))
        if len(found) == 1 and not any(long and node in inputs for long, node in zip(found[0], sent, strict=True)):
            return ()
    return tuple(found)


def _tried(parts: Sequence[Part], raw: Sequence[bool], batch: Mapping[str, Any]) -> tuple[tuple[bool, ...], ...]:
    """Return the same, by the shapes for a batch and for one whose texts are shorter by one."""
    texts = [value.shape[1] for value in tree.leaves(batch) if is_text(value)]
    if len(set(texts)) != 1 or not any(raw):
        return ()
    shorter = tree.map_leaves(lambda value: value[:, :-1] if is_text(value) else value, batch)
    try:
        shapes = zip(_shapes(parts, batch), _shapes(parts, shorter), strict=True)
    except Exception:  # its texts have one length
        return ()
    found = []
    for whole, less in shapes:
        long = tuple(before != after for before, after in zip(whole, less, strict=True))
        for at_cut, before, after in zip(long, whole, less, strict=True):
            if at_cut and after != (*before[:1], texts[0] - 1, *before[2:]):
                return ()
        found.append(long)
    return tuple(found) if any(long and each for long, each in zip(found[0], raw, strict=False)) else ()


def _shapes(parts: Sequence[Part], batch: Mapping[str, Any]) -> list[list[tuple[int, ...]]]:
    """Return the shapes of what crosses each cut."""
    with ExitStack() as stack:
        for part in parts:
            stack.enter_context(modes_kept(part))
            part.eval()
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.random.fork_rng(devices=[]))
        sent = parts[0](**batch)
        crossing = [sent] if len(parts) == 2 else [sent[0], parts[1](*sent[0])]
    return [[tuple(tensor.shape) for tensor in tensors] for tensors in crossing]


def _expression(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else size


def most_positions(parts: Iterable[nn.Module]) -> float:
    """Return how long the texts of a model may be: any length (inf) if it tells none; 0 if they may not differ."""
    taking = [part for part in parts if any(getattr(part, "takes", ()))]
    known = [part.longest for part in taking if isinstance(part.longest, int)]
    return min(known, default=math.inf) if taking else 0


def text_length(inputs: Tree) -> int | None:
    """Return how long the texts of a batch are; None if it holds none."""
    return next((int(leaf.shape[1]) for leaf in tree.leaves(inputs) if is_text(leaf)), None)


def shortened(tensors: Tree, flags: Sequence[bool], length: int | None) -> Tree:
    """Return tensors, those that are as long as the texts of a step cut to the own length.

    Parameters
    ----------
    tensors : tuple
        None for one that is not there; others than a tuple are returned as they are.
    flags : sequence of bool
        Which are; there may be more tensors, of which none is.
    length : int or None
        Where it is None, nothing is cut.
    """
    if length is None or not isinstance(tensors, tuple) or not any(flags):
        return tensors
    flags = [*flags, *[False] * (len(tensors) - len(flags))]
    return tuple(
        tensor[:, :length] if long and isinstance(tensor, Tensor) and tensor.shape[1] > length else tensor
        for tensor, long in zip(tensors, flags, strict=True)
    )
