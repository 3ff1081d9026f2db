"""Requests to all the clients of one process as one frame, and its reply: what they share is said once.

A step asks a hundred clients of two processes. Sent one by one, the bookkeeping would take longer than the model; as a
group it is one header with a column a field, and one tensor with the rows of all.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from psl_flower.errors import ProtocolError
from psl_flower.exchange.streams.frames import Frame
from psl_flower.exchange.streams.tensors import Packer, Unpacker
from psl_flower.protocol import (
    BACKWARD,
    DESCRIBE,
    EVALUATE,
    FORWARD,
    Activations,
    BackwardRequest,
    Config,
    DescribeRequest,
    Description,
    EvaluateRequest,
    ForwardRequest,
    Gradients,
    Reply,
    Request,
    Weights,
    WorkOrder,
)

REQUEST = "request"
REPLY = "reply"

_MAX_POSITIONS = 10_000  # tensors that cross the cut
_ORDER_FIELDS = ("client", "seed", "epoch", "step", "start", "count")


@dataclass(frozen=True, eq=False, kw_only=True)
class Group:
    """The same question to several clients of one process.

    Parameters
    ----------
    what : str
        Message type.
    nodes : tuple of int
        Whom it is for.
    config, evaluate_config : dict
        As in the requests.
    weights : Weights, optional
        The client half's; None to describe.
    orders : tuple of WorkOrder
        One for each node; forward and backward.
    delays : tuple of float
        Seconds each client is to wait first; forward.
    gradients : tuple of (tuple of Tensor) or None
        For each activation tensor its gradient, in parts that follow the order of `nodes`; backward. A decoded group
        has one part, with the rows of all.
    slices : tuple of (int, int)
        Start and count for each node; evaluate.
    label_counts : bool
        Describe.
    separate : bool
        Whether parameter gradients are wanted client by client, not as a sum; backward.
    """

    what: str
    nodes: tuple[int, ...]
    config: Config = field(default_factory=dict)
    evaluate_config: Config = field(default_factory=dict)
    weights: Weights | None = None
    orders: tuple[WorkOrder, ...] = ()
    delays: tuple[float, ...] = ()
    gradients: tuple[tuple[Tensor, ...] | None, ...] = ()
    slices: tuple[tuple[int, int], ...] = ()
    label_counts: bool = False
    separate: bool = False

    def counts(self) -> list[int]:
        """Return how many examples are asked of each node."""
        return [order.count for order in self.orders] if self.orders else [count for _, count in self.slices]

    def joined_gradients(self) -> tuple[Tensor | None, ...]:
        """Return the gradients of the activations of all clients, as one tensor each."""
        return tuple(None if parts is None else _joined(parts) for parts in self.gradients)

    def requests(self) -> list[Request]:
        """Return each node's own request."""
        if self.what == DESCRIBE:
            return [DescribeRequest(self.label_counts, self.config)] * len(self.nodes)
        weights = self.need_weights()
        if self.what == EVALUATE:
            return [EvaluateRequest(s, n, weights, self.config, self.evaluate_config) for s, n in self.slices]
        if self.what == FORWARD:
            return [
                ForwardRequest(order, weights, self.config, delay)
                for order, delay in zip(self.orders, self.delays, strict=True)
            ]
        split = [
            [None] * len(self.nodes) if whole is None else torch.split(whole, self.counts())
            for whole in self.joined_gradients()
        ]
        return [
            BackwardRequest(order, weights, tuple(part[i] for part in split), self.config)
            for i, order in enumerate(self.orders)
        ]

    def need_weights(self) -> Weights:
        """Return the weights, which every request but describe has."""
        if self.weights is None:
            raise ProtocolError(f"{self.what} needs weights")
        return self.weights


def group_requests(requests: Mapping[int, Request], *, separate: bool = False) -> list[Group]:
    """Put requests that share kind, weights and configuration together; in the order they come in.

    Parameters
    ----------
    requests : dict of int to Request
        By node id.
    separate : bool
        Whether parameter gradients are wanted client by client.
    """
    alike: dict[Any, dict[int, Request]] = {}
    for node, request in requests.items():
        shared: tuple[Any, ...]
        if isinstance(request, DescribeRequest):
            shared = (request.label_counts,)
        elif isinstance(request, EvaluateRequest):
            shared = (request.weights.version, _frozen(request.evaluate_config))
        elif isinstance(request, BackwardRequest):
            shared = (request.weights.version, tuple(g is None for g in request.gradients))
        else:
            shared = (request.weights.version,)
        alike.setdefault((type(request), _frozen(request.config), *shared), {})[node] = request
    return [_group(some, separate) for some in alike.values()]


def _group(requests: Mapping[int, Request], separate: bool) -> Group:
    nodes, each = tuple(requests), list(requests.values())
    first = each[0]
    if isinstance(first, DescribeRequest):
        return Group(what=DESCRIBE, nodes=nodes, config=first.config, label_counts=first.label_counts)
    if isinstance(first, EvaluateRequest):
        return Group(
            what=EVALUATE,
            nodes=nodes,
            config=first.config,
            evaluate_config=first.evaluate_config,
            weights=first.weights,
            slices=tuple((r.start, r.count) for r in each if isinstance(r, EvaluateRequest)),
        )
    if isinstance(first, ForwardRequest):
        forward = [r for r in each if isinstance(r, ForwardRequest)]
        return Group(
            what=FORWARD,
            nodes=nodes,
            config=first.config,
            weights=first.weights,
            orders=tuple(r.order for r in forward),
            delays=tuple(r.delay for r in forward),
        )
    backward = [r for r in each if isinstance(r, BackwardRequest)]
    return Group(
        what=BACKWARD,
        nodes=nodes,
        config=first.config,
        weights=first.weights,
        orders=tuple(r.order for r in backward),
        gradients=tuple(
            None if any(g is None for g in parts) else tuple(g for g in parts if g is not None)
            for parts in zip(*(r.gradients for r in backward), strict=True)
        ),
        separate=separate,
    )


# --- requests --------------------------------------------------------------------------------------------------------
def encode_group(group: Group, number: int, *, with_weights: bool, wire_dtype: str) -> Frame:
    """Return the frame of a group.

    Parameters
    ----------
    number : int
        To be repeated in the reply.
    with_weights : bool
        Whether the weights themselves travel, not only their version.
    wire_dtype : str
        For the gradients here, and for the activations in the reply.
    """
    packer = Packer(wire_dtype)
    header: dict[str, Any] = {
        "kind": REQUEST,
        "number": number,
        "what": group.what,
        "nodes": group.nodes,
        "config": _encode_config(group.config),
        "wire": wire_dtype,
    }
    if group.what == DESCRIBE:
        header["label-counts"] = group.label_counts
    else:
        header["weights"] = _encode_weights(group.need_weights(), packer, with_weights)
    if group.what == EVALUATE:
        header["slices"] = group.slices
        header["evaluate-config"] = _encode_config(group.evaluate_config)
    if group.orders:
        header["orders"] = _encode_orders(group.orders, packer)
    if group.what == FORWARD:
        header["delays"] = group.delays
    if group.what == BACKWARD:
        header["gradients"] = [None if g is None else packer.pack(*g, reduce=True) for g in group.gradients]
        header["separate"] = group.separate
    return Frame(header, packer.buffers)


def decode_group(frame: Frame, known_weights: Callable[[str], Weights | None]) -> tuple[int, str, Group]:
    """Return the number, the wire dtype for the reply, and the group that a frame carries.

    Parameters
    ----------
    known_weights : callable
        Takes a version and returns the weights if they are there already.

    Raises
    ------
    ProtocolError
        If the frame is not a group of requests.
    """
    header, unpacker = frame.header, Unpacker(frame.buffers)
    what = _get(header, "what", str)
    if what not in (DESCRIBE, FORWARD, BACKWARD, EVALUATE):
        raise ProtocolError(f"unknown message type {what!r:.80}")
    nodes = tuple(_nodes(header))
    if not nodes or len(set(nodes)) != len(nodes):
        raise ProtocolError(f"expected nodes, each once, got {nodes!r:.80}")
    fields: dict[str, Any] = {"what": what, "nodes": nodes, "config": _decode_config(header, "config")}
    if what == DESCRIBE:
        fields["label_counts"] = _get(header, "label-counts", bool)
    else:
        fields["weights"] = _decode_weights(_get(header, "weights", dict), unpacker, known_weights)
    if what == EVALUATE:
        fields["slices"] = _decode_slices(header, len(nodes))
        fields["evaluate_config"] = _decode_config(header, "evaluate-config")
    elif what != DESCRIBE:
        fields["orders"] = _decode_orders(_get(header, "orders", dict), len(nodes), unpacker)
    if what == FORWARD:
        fields["delays"] = _decode_delays(header, len(nodes))
    if what == BACKWARD:
        specs = _limited(_get(header, "gradients", list), _MAX_POSITIONS)
        gradients = tuple(None if spec is None else (unpacker.unpack(spec),) for spec in specs)
        rows = sum(order.count for order in fields["orders"])
        for parts in gradients:
            if parts is not None and (parts[0].ndim == 0 or len(parts[0]) != rows):
                raise ProtocolError(f"expected gradients of {rows} examples, got {tuple(parts[0].shape)}")
        fields["gradients"], fields["separate"] = gradients, _get(header, "separate", bool)
    unpacker.finish()
    return _get(header, "number", int), _get(header, "wire", str), Group(**fields)


def _encode_weights(weights: Weights, packer: Packer, with_tensors: bool) -> dict[str, Any]:
    header: dict[str, Any] = {"version": weights.version}
    if with_tensors:
        for name in ("parameters", "constants"):
            header[name] = {key: packer.pack(tensor) for key, tensor in getattr(weights, name).items()}
    return header


def _decode_weights(header: Mapping[str, Any], unpacker: Unpacker, known: Callable[[str], Weights | None]) -> Weights:
    version = _get(header, "version", str)
    if "parameters" in header:
        parameters, constants = (
            {key: unpacker.unpack(spec) for key, spec in _get(header, name, dict).items()}
            for name in ("parameters", "constants")
        )
        return Weights(parameters, constants, version)
    weights = known(version)
    if weights is None:
        raise ProtocolError(f"weights {version!r:.80} were not sent, and are not at hand")
    return weights


def _encode_orders(orders: Sequence[WorkOrder], packer: Packer) -> dict[str, Any]:
    header: dict[str, Any] = {name: [getattr(order, name) for order in orders] for name in _ORDER_FIELDS}
    if orders[0].class_starts is not None:
        for name in ("class_starts", "class_counts"):
            header[name] = packer.pack(torch.from_numpy(np.stack([getattr(order, name) for order in orders])))
    return header


def _decode_orders(header: Mapping[str, Any], length: int, unpacker: Unpacker) -> tuple[WorkOrder, ...]:
    columns = [_integers(header, name) for name in _ORDER_FIELDS]
    if any(len(column) != length for column in columns):
        raise ProtocolError(f"expected {length} work orders, got {[len(column) for column in columns]}")
    if any(value < 0 for column in columns for value in column) or any(count == 0 for count in columns[-1]):
        raise ProtocolError("work orders must not hold negative numbers, and count at least one example")
    by_class: list[Any] = [[None] * length, [None] * length]
    if "class_starts" in header:
        tables = [unpacker.unpack(header.get(name)) for name in ("class_starts", "class_counts")]
        if any(t.dtype != torch.int64 or t.ndim != 2 or len(t) != length for t in tables) or (
            tables[0].shape != tables[1].shape
        ):
            raise ProtocolError(f"expected a row of int64 class counts for each of {length} work orders")
        by_class = [table.numpy() for table in tables]
    return tuple(
        WorkOrder(**dict(zip(_ORDER_FIELDS, row, strict=True)), class_starts=starts, class_counts=counts)
        for row, starts, counts in zip(zip(*columns, strict=True), *by_class, strict=True)
    )


def _decode_slices(header: Mapping[str, Any], length: int) -> tuple[tuple[int, int], ...]:
    slices = _get(header, "slices", list)
    if len(slices) != length:
        raise ProtocolError(f"expected {length} slices, got {len(slices)}")
    pairs = [_integers({"slice": pair}, "slice") for pair in slices]
    if any(len(pair) != 2 for pair in pairs):
        raise ProtocolError("a slice is a start and a count")
    return tuple((pair[0], pair[1]) for pair in pairs)


def _decode_delays(header: Mapping[str, Any], length: int) -> tuple[float, ...]:
    delays = _get(header, "delays", list)
    if len(delays) != length:
        raise ProtocolError(f"expected {length} delays, got {len(delays)}")
    return tuple(_seconds(delay) for delay in delays)


# --- replies ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class Part:
    """A piece of a reply.

    Parameters
    ----------
    nodes : tuple of int
        Whose it is: activations hold their rows in this order; gradients are the sum over these.
    reply : Reply
    """

    nodes: tuple[int, ...]
    reply: Reply


@dataclass(frozen=True, eq=False)
class GroupReply:
    """What came of a group: parts for some nodes, failures for the others.

    Parameters
    ----------
    seconds : dict of int to float
        How long each client worked: of what was done for several at once, its share by examples.
    """

    parts: Sequence[Part]
    failures: Mapping[int, str] = field(default_factory=dict)
    seconds: Mapping[int, float] = field(default_factory=dict)


def encode_group_reply(number: int, reply: GroupReply, wire_dtype: str) -> Frame:
    """Return the frame of a reply to the group of that number."""
    packer = Packer(wire_dtype)
    header = {
        "kind": REPLY,
        "number": number,
        "parts": [_encode_part(part, packer) for part in reply.parts],
        "failures": {str(node): why for node, why in reply.failures.items()},
        "seconds": {str(node): seconds for node, seconds in reply.seconds.items()},
    }
    return Frame(header, packer.buffers)


def decode_group_reply(frame: Frame, group: Group) -> tuple[dict[int, Reply], dict[int, str], dict[int, float]]:
    """Return the replies, the failures and the seconds worked, by node id, that a frame carries.

    Clients whose gradients were summed share one `Gradients` object.

    Raises
    ------
    ProtocolError
        If the frame is not a reply to `group`.
    """
    header, unpacker = frame.header, Unpacker(frame.buffers)
    asked = dict(zip(group.nodes, group.counts() or [0] * len(group.nodes), strict=True))
    replies: dict[int, Reply] = {}
    for spec in _limited(_get(header, "parts", list), len(asked)):
        if not isinstance(spec, dict):
            raise ProtocolError(f"expected the description of a part, got {spec!r:.80}")
        nodes = _nodes(spec)
        if not nodes or len(set(nodes)) != len(nodes) or not asked.keys() >= set(nodes) or replies.keys() & set(nodes):
            raise ProtocolError(f"a reply must name nodes that were asked, each once, got {nodes!r:.80}")
        replies |= _decode_part(group, {node: asked[node] for node in nodes}, spec, unpacker)
    unpacker.finish()
    failures = {_node(node): f"{why!s:.2000}" for node, why in _get(header, "failures", dict).items()}
    missing = asked.keys() - replies.keys() - failures.keys()
    failures |= dict.fromkeys(missing, "its process sent no reply for it")
    seconds = {_node(node): _seconds(value) for node, value in _get(header, "seconds", dict).items()}
    return replies, {node: why for node, why in failures.items() if node in asked and node not in replies}, seconds


def _encode_part(part: Part, packer: Packer) -> dict[str, Any]:
    reply = part.reply
    if isinstance(reply, Description):
        header: dict[str, Any] = {
            "nodes": part.nodes,
            "partition-id": reply.partition_id,
            "num-examples": reply.num_examples,
            "num-test-examples": reply.num_test_examples,
        }
        if reply.labels is not None and reply.counts is not None:
            header |= {"labels": reply.labels.tolist(), "counts": reply.counts.tolist()}
        return header
    header = {"nodes": part.nodes, "step": reply.step}
    if isinstance(reply, Activations):
        activations = [packer.pack(tensor, reduce=True) for tensor in reply.tensors]
        return {**header, "activations": activations, "labels": packer.pack(reply.labels)}
    gradients = {name: packer.pack(tensor) for name, tensor in reply.tensors.items()}
    return {**header, "gradients": gradients, "unused": reply.unused}


def _decode_part(
    group: Group, counts: Mapping[int, int], spec: Mapping[str, Any], unpacker: Unpacker
) -> Mapping[int, Reply]:
    if group.what == DESCRIBE:
        partition, labelled = spec.get("partition-id"), "labels" in spec
        description = Description(
            partition_id=None if partition is None else _get(spec, "partition-id", int),
            num_examples=_get(spec, "num-examples", int),
            num_test_examples=_get(spec, "num-test-examples", int),
            labels=np.array(_integers(spec, "labels"), dtype=np.int64) if labelled else None,
            counts=np.array(_integers(spec, "counts"), dtype=np.int64) if labelled else None,
        )
        if len(counts) != 1:
            raise ProtocolError("every client describes itself")
        return dict.fromkeys(counts, description)
    step = None if spec.get("step") is None else _get(spec, "step", int)
    if group.what == BACKWARD:
        unused = _get(spec, "unused", list)
        if not all(isinstance(name, str) for name in unused):
            raise ProtocolError(f"'unused' must be a list of names, got {unused!r:.80}")
        tensors = {name: unpacker.unpack(value) for name, value in _get(spec, "gradients", dict).items()}
        return dict.fromkeys(counts, Gradients(tensors, tuple(unused), step))
    activations = [unpacker.unpack(value) for value in _limited(_get(spec, "activations", list), _MAX_POSITIONS)]
    labels = unpacker.unpack(spec.get("labels"))
    if not activations:
        raise ProtocolError("expected at least one tensor of activations, got none")
    rows = sum(counts.values())
    for tensor in (*activations, labels):
        if tensor.ndim == 0 or len(tensor) != rows:
            raise ProtocolError(f"expected activations and labels of {rows} examples, got shape {tuple(tensor.shape)}")
    split = [torch.split(tensor, list(counts.values())) for tensor in (*activations, labels)]
    return {
        node: Activations(tensors[:-1], tensors[-1], step)
        for node, tensors in zip(counts, zip(*split, strict=True), strict=True)
    }


# --- fields ----------------------------------------------------------------------------------------------------------
def _get(header: Mapping[str, Any], name: str, kind: type) -> Any:
    value = header.get(name)
    if type(value) is not kind or (type(value) is int and value.bit_length() > 63):
        raise ProtocolError(f"expected {name!r} to be of type {kind.__name__}, got {value!r:.80}")
    return value


def _integers(header: Mapping[str, Any], name: str, bits: int = 63) -> list[int]:
    values: list[int] = _get(header, name, list)
    if not all(type(value) is int and value.bit_length() <= bits for value in values):
        raise ProtocolError(f"expected {name!r} to be a list of integers, got {values!r:.80}")
    return values


def _nodes(header: Mapping[str, Any]) -> list[int]:
    return _integers(header, "nodes", bits=64)  # Flower's node ids have no sign


def _limited(values: list[Any], most: int) -> list[Any]:
    if len(values) > most:
        raise ProtocolError(f"expected at most {most} entries, got {len(values)}")
    return values


def _seconds(value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 2**53:
        raise ProtocolError(f"expected seconds, finite and not negative, got {value!r:.80}")
    return float(value)


def _node(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 20):
        raise ProtocolError(f"expected a node id, got {text!r:.80}")
    return int(text)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts))


def _frozen(config: Config) -> Any:
    return tuple(sorted((name, repr(value)) for name, value in config.items()))


def _encode_config(config: Config) -> dict[str, Any]:
    """Return a ConfigRecord's values as JSON has them: bytes as base64, and floats that are no number by name."""
    return {name: _each(_encode_value, value) for name, value in config.items()}


def _encode_value(value: Any) -> Any:
    if isinstance(value, bytes):
        return {"bytes": base64.b64encode(value).decode()}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    return value


def _decode_config(header: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: _each(_decode_value, value) for key, value in _get(header, name, dict).items()}


def _each(function: Callable[[Any], Any], value: Any) -> Any:
    return [function(v) for v in value] if isinstance(value, list) else function(value)


def _decode_value(value: Any) -> Any:
    if isinstance(value, dict):
        try:
            if set(value) == {"bytes"}:
                return base64.b64decode(value["bytes"], validate=True)
            if set(value) == {"float"}:
                return float(value["float"])
        except (TypeError, ValueError) as exc:
            raise ProtocolError(f"not a configuration value: {value!r:.80}") from exc
    if not isinstance(value, bool | int | float | str):
        raise ProtocolError(f"not a configuration value: {value!r:.80}")
    return value
