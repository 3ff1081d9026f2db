"""What frozen parts on the clients make of an example, kept on the server: no client is asked for it twice.

Labels are kept with it, so that the two belong together whatever a client's process holds by then. Where labels stay
with the clients, nothing would tell that they do: clients draw a batch again in a process that may be another, and
whose data may be in another order.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn

from psl_flower import tree
from psl_flower.data import IGNORED
from psl_flower.errors import ConfigError
from psl_flower.exchange import Clients
from psl_flower.exchange.streams import StreamOptions
from psl_flower.methods.base import CLIENT, ROWS, SplitMethod, Stage
from psl_flower.protocol import Description, Leaf, Orders, Part, Weights, WorkOrder
from psl_flower.samplers.base import Sampler
from psl_flower.split import Halves, shortened
from psl_flower.tree import Tree
from psl_flower.typing import IntArray

log = logging.getLogger("flwr.psl_flower")

_Row = tuple[dict[str, Tree], int]  # trees of rows that came together, and which one it is

Describe = Callable[[int], Description]  # what a client says of itself


def check_cache(
    cache: Any, method: SplitMethod, parts: Mapping[str, nn.Module], sampler: Sampler, streams: StreamOptions
) -> bool:
    """Return whether activations are kept; refuse it where what is kept would not be what would be sent.

    Raises
    ------
    ConfigError
        Naming why.
    """
    if not isinstance(cache, bool):
        raise ConfigError(f"cache_activations must be True or False, got {cache!r:.80}")
    if not cache:
        return False
    rule, remedy = "cache_activations needs", "or leave cache_activations out"
    places = list(method.parts.values())
    first = list(method.parts)[: next(i for i, place in enumerate([*places, None]) if place != CLIENT)]
    training = [n for name in first for n, p in parts[name].named_parameters() if p.requires_grad]
    if training:
        raise ConfigError(
            f"{rule} a frozen {first[-1]}, {len(training)} of its parameters train, {training[0]!r} is the first: "
            f"freeze them, p.requires_grad_(False), on the server, {remedy}"
        )
    stages = method.stages().values()
    if method.trains_on_clients() or not any(map(is_kept, stages)):
        raise ConfigError(f"{rule} rows that clients send first in a step, method {method.name!r} has none: {remedy}")
    later = [each.name for each in stages if each.batch and not is_kept(each) and not set(each.outputs) <= set(first)]
    if later or sum(map(is_kept, stages)) > 1:
        raise ConfigError(
            f"{rule} labels that come with the activations: method {method.name!r} leaves them with the clients, and "
            f"{' and '.join(later) or 'several stages'} would go on from a batch drawn anew, of which nobody can tell "
            "that it is the one whose activations are kept, if the client's process is another by then: take a method "
            f"without a tail, {remedy}"
        )
    if sampler.needs_label_counts or sampler.clients_draw:
        how = "plans by class" if sampler.needs_label_counts else "lets clients draw"
        raise ConfigError(
            f"{rule} to know which examples a client takes, {type(sampler).__name__} {how}, and only clients "
            f"know which those are: take UniformGlobalSampler, {remedy}"
        )
    if streams.wire_dtype == "float16":
        raise ConfigError(
            f"{rule} rows that travel alike in any batch, wire_dtype 'float16' scales all by the largest of the batch: "
            f"take 'bfloat16' or 'int8', {remedy}"
        )
    return True


def is_kept(stage: Stage) -> bool:
    """Return whether what a stage gives are rows that depend on the examples and the weights, and on nothing else."""
    alone = stage.after is None and not stage.inputs and stage.batch and not stage.own
    return alone and bool(stage.outputs) and all(kind is ROWS for kind in stage.outputs.values())


@dataclass(eq=False)
class _Client:
    """What is kept of a client's training or test data."""

    described: Description
    rows: dict[int, _Row] = field(default_factory=dict)  # by example


class KeptRows:
    """The rows that clients have sent, by example.

    They lie in the server's memory for the run. A checkpoint does not hold them: a resumed run asks for them once more.

    Parameters
    ----------
    describe : callable
        Returns what a client says of itself: with other data, what was kept of it is forgotten.
    long : sequence of bool
        Which tensors of a row are as long as its text, see `psl_flower.split.lengths`: they are kept without what they
        are padded with.
    """

    def __init__(self, describe: Describe, long: Sequence[bool] = ()) -> None:
        self._describe, self._long = describe, long
        self._versions: tuple[str, ...] = ()
        self._clients: dict[tuple[str, int, bool], _Client] = {}
        self._drawn: dict[tuple[int, bool], tuple[Hashable, IntArray]] = {}  # orders of the epoch, by client and data

    @classmethod
    def of(cls, clients: Clients, halves: Halves) -> Self:
        """Return what keeps the rows of some clients, of a model cut so."""
        return cls(lambda client: clients.members[client].description, getattr(halves.parts[1], "takes", ()))

    def num_bytes(self) -> int:
        """Return the bytes of all that is kept."""
        came = {id(rows): rows for client in self._clients.values() for rows, _ in client.rows.values()}
        return sum(tree.num_bytes(value) for rows in came.values() for value in rows.values())

    def find(
        self, stage: Stage, orders: Orders, weights: Collection[Weights]
    ) -> tuple[list[Part], list[int], list[list[int]]]:
        """Return what is there of some orders.

        Returns
        -------
        list of Part
            Of the clients all of whose examples are there; one part or none.
        list of int
            The positions of the others.
        list of list of int
            The examples of each order.

        Raises
        ------
        ConfigError
            If it cannot be known which examples an order is about.
        """
        if orders.class_counts is not None:
            raise ConfigError("cache_activations does not go with orders by class: use another sampler")
        versions = tuple(each.constants_version for each in weights)
        if versions != self._versions:  # a frozen part has other values than before
            self._versions = versions
            self._clients.clear()
        nodes, rows, missing, examples = list[int](), list[_Row](), list[int](), list[list[int]]()
        for i, order in enumerate(orders.each()):
            held = self._of(stage, order.client, test=order.test)
            size = held.described.num_test_examples if order.test else held.described.num_examples
            wanted = self._order_of(order, size)[order.start : order.start + order.count].tolist()
            examples.append(wanted)
            if len(wanted) == order.count and all(example in held.rows for example in wanted):
                nodes.append(order.client)
                rows += [held.rows[example] for example in wanted]
            else:
                missing.append(i)
        return [self._part(stage, nodes, rows, orders.step)] if nodes else [], missing, examples

    def put(self, stage: Stage, orders: Orders, examples: Sequence[Sequence[int]], parts: Sequence[Part]) -> None:
        """Keep what clients have sent.

        Parameters
        ----------
        orders : Orders
        examples : sequence of sequence of int
            Of each order.
        parts : sequence of Part
            Of some of the orders.
        """
        wanted = dict(zip(orders.clients.tolist(), examples, strict=True))
        for part in parts:
            values = {name: leaf.value for name, leaf in part.outputs.items()}
            lengths, at = self._lengths(stage, values), 0
            held = [self._of(stage, client, test=orders.test).rows for client in part.nodes]
            known = any(e in rows for rows, client in zip(held, part.nodes, strict=True) for e in wanted[client])
            # a tensor for each row takes a kilobyte more; one for all would stay whole for the last of its rows
            together = None if lengths[0] or known else {n: tree.map_leaves(torch.clone, v) for n, v in values.items()}
            for rows, client in zip(held, part.nodes, strict=True):
                for example in wanted[client]:
                    rows[example] = (together, at) if together else (self._row(stage, values, at, lengths), 0)
                    at += 1

    def _order_of(self, order: WorkOrder, size: int) -> IntArray:
        """Return a client's order of examples for the epoch, made once for all its steps."""
        of = (order.seed, order.epoch, size, order.left_out, order.put_off)
        made = self._drawn.get((order.client, order.test))
        if made is None or made[0] != of:
            made = self._drawn[order.client, order.test] = (of, order.order_of(size))
        return made[1]

    def _of(self, stage: Stage, client: int, *, test: bool) -> _Client:
        described, key = self._describe(client), (stage.name, client, test)
        held = self._clients.get(key)
        if held is None or not _same_data(held.described, described):
            held = self._clients[key] = _Client(described)
        return held

    def _part(self, stage: Stage, nodes: Sequence[int], rows: Sequence[_Row], step: int) -> Part:
        outputs = {}
        for name, kind in stage.outputs.items():
            exact = name in stage.exact
            fill = IGNORED if exact else 0
            each = [tree.map_leaves(lambda t, at=at: t[at : at + 1], came[name]) for came, at in rows]
            value = tree.join(each, name, fill=fill if any(self._long) else None)
            outputs[name] = Leaf(kind, value, exact)
        return Part(tuple(nodes), outputs, step)

    def _row(
        self, stage: Stage, values: Mapping[str, Tree], at: int, lengths: tuple[int, list[int]]
    ) -> dict[str, Tree]:
        """Return one row of some values, in memory of its own; of a text, as long as it is."""
        padded, length = lengths[0], lengths[1][at] if lengths[0] else 0

        def own(leaf: Tensor) -> Tensor:
            return leaf[at : at + 1].clone()

        row = {}
        for name, value in values.items():
            if name in stage.exact:  # labels, a number for each position or one for all, see `_lengths`
                cut = tree.map_leaves(lambda t: t[:, :length] if t.ndim > 1 and t.shape[1] == padded else t, value)
            else:
                cut = shortened(value, self._long, length or None)
            row[name] = tree.map_leaves(own, cut)
        return row

    def _lengths(self, stage: Stage, values: Mapping[str, Tree]) -> tuple[int, list[int]]:
        """Return how long a batch of texts is padded, and how long each is, as their mask says; else 0 and none.

        Where labels that are as long tell anything behind a text's end, or are no classes, all counts: they may be
        several for each text.
        """
        found: list[Tensor] = []
        for name, value in values.items():
            if name not in stage.exact and isinstance(value, tuple):
                found += [t for t, long in zip(value, self._long, strict=False) if long and is_mask(t)]
        if not found:
            return 0, []
        ends = [(mask != 0).int().cumsum(1).argmax(1) + 1 for mask in found]  # of the last position that is not hidden
        padded, lengths = found[0].shape[1], torch.stack(ends).amax(0)
        behind = (torch.arange(padded, device=lengths.device) >= lengths[:, None]).cpu()
        labels = [t for name in stage.exact for t in tree.leaves(values[name]) if t.shape[1:2] == behind.shape[1:]]
        if any(t.is_floating_point() or bool((t.cpu()[behind] != IGNORED).any()) for t in labels):
            lengths = torch.full_like(lengths, padded)
        return padded, lengths.tolist()


def is_mask(value: Any) -> bool:
    """Return whether something says of each position of each text whether it counts."""
    if not isinstance(value, Tensor) or value.ndim != 2 or value.is_floating_point():
        return False
    return bool(((value == 0) | (value == 1)).all())


def _same_data(one: Description, other: Description) -> bool:
    return one is other or (one.same_data(other) and one.num_test_examples == other.num_test_examples)
