"""Requests and replies as frames, and back: columns in the header, one buffer a tensor, nothing pickled.

Both carriers use it: what differs between them is only how the frames travel.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from psl_flower import tree
from psl_flower.errors import ProtocolError
from psl_flower.exchange.frames import Frame
from psl_flower.exchange.tensors import Packer, Unpacker
from psl_flower.failures import Failure
from psl_flower.failures import Kind as FailureKind
from psl_flower.protocol import (
    DESCRIBE,
    Config,
    Description,
    Kind,
    Leaf,
    Orders,
    Part,
    Reply,
    Request,
    Weights,
)
from psl_flower.tree import Tree
from psl_flower.typing import IntArray

REQUEST = "request"
REPLY = "reply"

_MAX_PARTS = 64  # of the model, and leaves of a stage
_MAX_TEXT = 2000  # characters of a failure
_MAX_ROWS = 10_000  # unreadable rows told at once

# The weights a client process has been sent: by part and kind ("parameters", "constants"), their version.
Sent = dict[tuple[str, str], str]


class WeightStore:
    """The weights that a client process was sent last, for requests that only name their version."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, str], tuple[str, Mapping[str, Any]]] = {}

    def put(self, part: str, kind: str, version: str, tensors: Mapping[str, Any]) -> None:
        """Keep weights in place of their last version."""
        self._kept[part, kind] = (version, tensors)

    def get(self, part: str, kind: str, version: str) -> Mapping[str, Any]:
        """Return weights, or raise ProtocolError if that version was not the last to be sent."""
        known, tensors = self._kept.get((part, kind), ("", {}))
        if known != version:
            raise ProtocolError(f"weights {version!r:.80} of {part!r} were not sent, and are not known")
        return tensors


# --- requests --------------------------------------------------------------------------------------------------------
def encode_request(request: Request, number: int, *, sent: Sent, wire_dtype: str = "float32") -> tuple[Frame, int]:
    """Return the frame of a request, and the bytes of its tensors.

    Parameters
    ----------
    number : int
        To be repeated in the reply.
    sent : dict
        What the process has been sent before: that is named only. Brought up to date.
    wire_dtype : str
        For the rows here, and in the reply.
    """
    packer = Packer(wire_dtype)
    header: dict[str, Any] = {
        "kind": REQUEST,
        "number": number,
        "stage": request.stage,
        "nodes": request.nodes,
        "config": _encode_config(request.config),
        "evaluate-config": _encode_config(request.evaluate_config),
        "wire": wire_dtype,
        "separate": request.separate,
        "label-counts": request.label_counts,
        "delays": request.delays,
        "orders": None if request.orders is None else _encode_orders(request.orders, packer),
        "weights": {part: _encode_weights(part, each, packer, sent) for part, each in request.weights.items()},
        "inputs": _encode_leaves(request.inputs, packer),
    }
    return Frame(header, packer.buffers), packer.num_bytes


def decode_request(frame: Frame, store: WeightStore) -> tuple[int, str, Request]:
    """Return the number, the wire dtype for the reply, and the request that a frame carries.

    Raises
    ------
    ProtocolError
        If the frame is not a request.
    """
    header, unpacker = frame.header, Unpacker(frame.buffers)
    nodes = _nodes(header)
    orders = None
    if header.get("orders") is not None:
        orders = _decode_orders(_get(header, "orders", dict), len(nodes), unpacker)
    elif _get(header, "stage", str) != DESCRIBE:
        raise ProtocolError(f"stage {header['stage']!r:.80} needs orders")
    delays = tuple(_seconds(delay) for delay in _get(header, "delays", list))
    if delays and len(delays) != len(nodes):
        raise ProtocolError(f"expected {len(nodes)} delays, got {len(delays)}")
    weights = {
        part: _decode_weights(part, each, unpacker, store)
        for part, each in _limited(_get(header, "weights", dict), _MAX_PARTS).items()
    }
    counts = [0] * len(nodes) if orders is None else orders.counts.tolist()
    request = Request(
        stage=_get(header, "stage", str),
        nodes=nodes,
        orders=orders,
        weights=weights,
        inputs=_decode_leaves(_get(header, "inputs", dict), counts, unpacker),
        delays=delays,
        separate=_get(header, "separate", bool),
        label_counts=_get(header, "label-counts", bool),
        config=_decode_config(header, "config"),
        evaluate_config=_decode_config(header, "evaluate-config"),
    )
    unpacker.finish()
    return _get(header, "number", int), _get(header, "wire", str), request


def _encode_weights(part: str, weights: Weights, packer: Packer, sent: Sent) -> dict[str, Any]:
    header: dict[str, Any] = {"version": weights.version, "constants-version": weights.constants_version}
    for kind, version, tensors in (
        ("parameters", weights.version, weights.parameters),
        ("constants", weights.constants_version, weights.constants),
    ):
        if sent.get((part, kind)) != version:
            header[kind] = packer.pack(tensors)
            sent[part, kind] = version
    return header


def _decode_weights(part: str, header: Any, unpacker: Unpacker, store: WeightStore) -> Weights:
    if not isinstance(header, dict):
        raise ProtocolError(f"expected the weights of {part!r:.80}, got {header!r:.80}")
    versions = {"parameters": _get(header, "version", str), "constants": _get(header, "constants-version", str)}
    found = {}
    for kind, version in versions.items():
        if kind in header:
            tensors = unpacker.unpack(header[kind])
            if not isinstance(tensors, dict) or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
                raise ProtocolError(f"expected the {kind} of {part!r:.80} by name")
            store.put(part, kind, version, tensors)
        found[kind] = store.get(part, kind, version)
    return Weights(found["parameters"], found["constants"], versions["parameters"], versions["constants"])


_SCALARS = ("seed", "epoch", "step")
_COLUMNS = ("clients", "starts", "counts")
_TABLES = ("class_starts", "class_counts")


def _encode_orders(orders: Orders, packer: Packer) -> dict[str, Any]:
    header: dict[str, Any] = {name: getattr(orders, name) for name in _SCALARS}
    header |= {name: packer.column(getattr(orders, name)) for name in _COLUMNS}
    header |= {name: packer.column(table) for name in _TABLES if (table := getattr(orders, name)) is not None}
    if orders.checksums is not None:
        header["checksums"] = packer.column(orders.checksums)
    header["left-out"] = {str(client): list(rows) for client, rows in orders.left_out.items()}
    header["test"] = orders.test
    return header


def _decode_orders(header: Mapping[str, Any], length: int, unpacker: Unpacker) -> Orders:
    scalars: dict[str, Any] = {name: _get(header, name, int) for name in _SCALARS}
    columns: dict[str, Any] = {name: unpacker.column(header.get(name), torch.int64, (length,)) for name in _COLUMNS}
    negative = [name for name, values in {**scalars, **columns}.items() if np.min(values) < 0]
    if negative or (length and columns["counts"].min() < 1):
        raise ProtocolError("orders must not hold negative numbers, and count at least one example a client")
    tables: dict[str, Any] = {
        name: unpacker.column(header[name], torch.int64, (length, None)) for name in _TABLES if name in header
    }
    if len({table.shape for table in tables.values()}) > 1 or len(tables) == 1:
        raise ProtocolError("class_starts and class_counts must name the same classes")
    checksums = unpacker.column(header["checksums"], torch.int64, (length,)) if "checksums" in header else None
    left_out = {
        _node(client): tuple(_integers({"rows": rows}, "rows"))
        for client, rows in _get(header, "left-out", dict).items()
    }
    return Orders(
        **scalars, **columns, **tables, left_out=left_out, checksums=checksums, test=_get(header, "test", bool)
    )


def _encode_leaves(leaves: Mapping[str, Leaf], packer: Packer) -> dict[str, Any]:
    return {
        name: {
            "kind": leaf.kind.value,
            "tree": packer.pack(leaf.value, reduce=leaf.kind is Kind.ROWS and not leaf.exact),
        }
        for name, leaf in leaves.items()
    }


def _decode_leaves(header: Mapping[str, Any], counts: list[int], unpacker: Unpacker) -> dict[str, Leaf]:
    leaves = {}
    for name, spec in _limited(header, _MAX_PARTS).items():
        if not isinstance(spec, dict):
            raise ProtocolError(f"expected the description of {name!r:.80}, got {spec!r:.80}")
        try:
            kind = Kind(spec.get("kind"))
        except ValueError as exc:
            raise ProtocolError(f"{name!r:.80} is of no known kind: {spec.get('kind')!r:.80}") from exc
        value = unpacker.unpack(spec.get("tree"))
        if kind is Kind.EACH:
            if not isinstance(value, tuple) or len(value) != len(counts):
                raise ProtocolError(f"{name}: expected one entry for each of {len(counts)} clients")
            value = list(value)
        if kind is Kind.ROWS:
            check_rows(value, sum(counts), name)
        leaves[name] = Leaf(kind, value)
    return leaves


def check_rows(value: Tree, rows: int, name: str) -> None:
    """Raise ProtocolError unless every tensor of a tree has so many rows."""
    for path, leaf in leaves_of(value, name):
        if leaf.ndim == 0 or len(leaf) != rows:
            raise ProtocolError(f"{path}: expected {rows} rows, got shape: {tuple(leaf.shape)}", FailureKind.SHAPE)


def leaves_of(value: Tree, name: str) -> list[tuple[str, torch.Tensor]]:
    """Return the tensors of a tree with their paths."""
    return list(zip(tree.paths(value, name), tree.leaves(value), strict=True))


# --- replies ---------------------------------------------------------------------------------------------------------
def encode_reply(number: int, reply: Reply, request: Request, wire_dtype: str = "float32") -> Frame:
    """Return the frame of a reply to the request of that number."""
    packer = Packer(wire_dtype)
    header = {
        "kind": REPLY,
        "number": number,
        "parts": [_encode_part(part, packer) for part in reply.parts],
        "failures": {
            str(node): {
                "kind": each.kind.value,
                "detail": each.detail[:_MAX_TEXT],
                "rows": {str(row): why[:_MAX_TEXT] for row, why in list(each.rows.items())[:_MAX_ROWS]},
                "labels": {str(row): label for row, label in list(each.labels.items())[:_MAX_ROWS]},
            }
            for node, each in reply.failures.items()
        },
        "descriptions": {str(node): _encode_description(each) for node, each in reply.descriptions.items()},
        "seconds": packer.column(np.array([reply.seconds.get(node, 0.0) for node in request.nodes])),
        "busy": reply.busy,
    }
    return Frame(header, packer.buffers)


def decode_reply(frame: Frame, request: Request) -> Reply:
    """Return the reply to `request` that a frame carries.

    Raises
    ------
    ProtocolError
        If the frame is not one.
    """
    header, unpacker = frame.header, Unpacker(frame.buffers)
    asked = dict(zip(request.nodes, request.counts(), strict=True))
    parts: list[Part] = []
    seen: set[int] = set()
    for spec in _limited(_get(header, "parts", list), len(asked)):
        if not isinstance(spec, dict):
            raise ProtocolError(f"expected the description of a part, got {spec!r:.80}")
        nodes = _nodes(spec)
        if not asked.keys() >= set(nodes) or seen & set(nodes):
            raise ProtocolError(f"a reply must name nodes that were asked, each once, got {nodes!r:.80}")
        seen |= set(nodes)
        parts.append(_decode_part(spec, nodes, [asked[node] for node in nodes], unpacker))
    seconds = unpacker.column(header.get("seconds"), torch.float64, (len(asked),))
    if not ((seconds >= 0) & (seconds < 2**53)).all():
        raise ProtocolError("expected seconds, finite and not negative")
    unpacker.finish()
    failures = {_node(node): _decode_failure(each) for node, each in _get(header, "failures", dict).items()}
    descriptions = {}
    if request.stage == DESCRIBE:
        described = _limited(_get(header, "descriptions", dict), len(asked))
        descriptions = {_node(node): _decode_description(each) for node, each in described.items()}
    missing = asked.keys() - seen - failures.keys() - descriptions.keys()
    failures |= dict.fromkeys(missing, Failure(FailureKind.MALFORMED, "its process sent no reply for it"))
    return Reply(
        parts,
        {node: why for node, why in failures.items() if node in asked and node not in seen},
        {node: each for node, each in descriptions.items() if node in asked and node not in failures},
        dict(zip(request.nodes, seconds.tolist(), strict=True)),
        busy=_seconds(header.get("busy", 0.0)),
        bytes_received=unpacker.num_bytes,
    )


def _encode_part(part: Part, packer: Packer) -> dict[str, Any]:
    return {
        "nodes": part.nodes,
        "step": part.step,
        "outputs": _encode_leaves(part.outputs, packer),
        "checksums": None if part.checksums is None else packer.column(part.checksums),
    }


def _decode_part(spec: Mapping[str, Any], nodes: tuple[int, ...], counts: list[int], unpacker: Unpacker) -> Part:
    outputs = _decode_leaves(_get(spec, "outputs", dict), counts, unpacker)
    step = None if spec.get("step") is None else _get(spec, "step", int)
    checksums = None
    if spec.get("checksums") is not None:
        checksums = unpacker.column(spec["checksums"], torch.int64, (len(nodes),))
    return Part(nodes, outputs, step, checksums)


def _decode_failure(value: Any) -> Failure:
    if not isinstance(value, dict):
        raise ProtocolError(f"expected a failure, got {value!r:.80}")
    try:
        kind = FailureKind(value.get("kind"))
    except ValueError as exc:
        raise ProtocolError(f"expected a failure of a known kind, got {value.get('kind')!r:.80}") from exc
    rows = {_node(row): f"{why!s:.{_MAX_TEXT}}" for row, why in _limited(_get(value, "rows", dict), _MAX_ROWS).items()}
    held = _limited(_get(value, "labels", dict), _MAX_ROWS)
    labels = dict(zip(map(_node, held), _integers({"labels": list(held.values())}, "labels"), strict=True))
    return Failure(kind, _get(value, "detail", str)[:_MAX_TEXT], rows, labels)


def _encode_description(each: Description) -> dict[str, Any]:
    header: dict[str, Any] = {
        "partition-id": each.partition_id,
        "num-examples": each.num_examples,
        "num-test-examples": each.num_test_examples,
        "left-out": {str(row): why[:_MAX_TEXT] for row, why in list(each.left_out.items())[:_MAX_ROWS]},
        "method": each.method,
        "model": each.model,
    }
    if each.labels is not None and each.counts is not None:
        header |= {"labels": each.labels.tolist(), "counts": each.counts.tolist()}
    return header


def _decode_description(header: Any) -> Description:
    if not isinstance(header, dict):
        raise ProtocolError(f"expected a description, got {header!r:.80}")

    def column(name: str) -> IntArray | None:
        return np.array(_integers(header, name), dtype=np.int64) if name in header else None

    return Description(
        partition_id=None if header.get("partition-id") is None else _get(header, "partition-id", int),
        num_examples=_get(header, "num-examples", int),
        num_test_examples=_get(header, "num-test-examples", int),
        labels=column("labels"),
        counts=column("counts"),
        left_out={
            _node(row): f"{why!s:.{_MAX_TEXT}}"
            for row, why in _limited(_get(header, "left-out", dict), _MAX_ROWS).items()
        },
        method=_get(header, "method", str)[:_MAX_TEXT],
        model=_get(header, "model", str)[: 2**20],
    )


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


def _nodes(header: Mapping[str, Any]) -> tuple[int, ...]:
    nodes = tuple(_integers(header, "nodes", bits=64))  # Flower's node ids have no sign
    if not nodes or len(set(nodes)) != len(nodes):
        raise ProtocolError(f"expected nodes, each once, got {nodes!r:.80}")
    return nodes


def _limited(values: Any, most: int) -> Any:
    if len(values) > most:
        raise ProtocolError(f"expected at most {most} entries, got {len(values)}")
    return values


def _seconds(value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 2**53:
        raise ProtocolError(f"expected seconds, finite and not negative, got {value!r:.80}")
    return float(value)


def _node(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 20):
        raise ProtocolError(f"expected a number, got {text!r:.80}")
    return int(text)


# --- configuration ---------------------------------------------------------------------------------------------------
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
