"""Requests and replies as frames, and back: columns in the header, one buffer a tensor, nothing pickled.

Both carriers use it: what differs between them is only how the frames travel.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from psl_flower import tree
from psl_flower.data.classes import DIGEST, MAX_NAMED, ClassNumbers
from psl_flower.errors import ProtocolError
from psl_flower.exchange.fields import (
    decode_config,
    encode_config,
    field,
    integers,
    limited,
    node_of,
    nodes_of,
    seconds_of,
)
from psl_flower.exchange.frames import Frame
from psl_flower.exchange.limits import MAX_DELAY, MAX_HEADER_BYTES, MAX_MODEL, MAX_PARTS, MAX_ROWS, MAX_TEXT
from psl_flower.exchange.orders import decode_cohort, decode_orders, encode_cohort, encode_orders
from psl_flower.exchange.tensors import Packer, Unpacker
from psl_flower.failures import Failure
from psl_flower.failures import Kind as FailureKind
from psl_flower.precision import PRECISIONS
from psl_flower.privacy.cohort import KEY_BYTES
from psl_flower.protocol import (
    DESCRIBE,
    Description,
    Kind,
    Leaf,
    Part,
    Reply,
    Request,
    Weights,
)
from psl_flower.typing import IntArray

REQUEST = "request"
REPLY = "reply"
CONSTANTS = "constants"  # the kind of weights that stay as they are, see `Weights`
# Field of a message's header: the process that answers it will not be there for the next.
KEEP = "keep-constants"

# The weights a client process has been sent: by part and kind ("parameters", "constants"), their version.
Sent = dict[tuple[str, str], str]


class ForgottenError(ProtocolError):
    """A request names weights that its process does not have: it is to be sent again with them."""

    def __init__(self, message: str) -> None:
        super().__init__(message, FailureKind.FORGOTTEN)


class WeightStore:
    """The weights that a client process was sent last, for requests that only name their version."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, str], tuple[str, Mapping[str, Any]]] = {}

    def state_dict(self, kind: str) -> dict[str, Any]:
        """Return the weights of a kind, for another process: by part, their version and tensors."""
        return {part: {"version": v, "tensors": dict(t)} for (part, k), (v, t) in self._kept.items() if k == kind}

    def load_state_dict(self, kind: str, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` returned."""
        for part, saved in state.items():
            self.put(part, kind, saved["version"], saved["tensors"])

    def put(self, part: str, kind: str, version: str, tensors: Mapping[str, Any]) -> None:
        """Keep weights in place of their last version."""
        self._kept.pop((part, kind), None)
        self._kept[part, kind] = (version, tensors)
        while len(self._kept) > 2 * MAX_PARTS:  # more than a model has: the oldest go
            del self._kept[next(iter(self._kept))]

    def get(self, part: str, kind: str, version: str) -> Mapping[str, Any]:
        """Return weights, or raise ForgottenError if that version was not the last to be sent."""
        known, tensors = self._kept.get((part, kind), ("", {}))
        if known != version:
            raise ForgottenError(f"weights {version!r:.80} of {part!r} were not sent, and are not known")
        return tensors


def cannot_ask(stage: str, reason: object) -> ProtocolError:
    """Return what is raised for a request that can be sent to no client, so that none is to blame."""
    return ProtocolError(f"stage {stage!r} cannot be asked for: {reason}")


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
        "config": encode_config(request.config),
        "evaluate-config": encode_config(request.evaluate_config),
        "wire": wire_dtype,
        "separate": request.separate,
        "label-counts": request.label_counts,
        "delays": request.delays,
        "session": request.session,
        "kept": request.kept,
        "precision": request.precision,
        "cohort": None if request.cohort is None else encode_cohort(request.cohort, packer),
        "orders": None if request.orders is None else encode_orders(request.orders, packer),
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
    nodes = nodes_of(header)
    cohort = None
    if header.get("cohort") is not None:
        cohort = decode_cohort(field(header, "cohort", dict), unpacker)
    orders = None
    if header.get("orders") is not None:
        orders = decode_orders(field(header, "orders", dict), len(nodes), unpacker)
    elif field(header, "stage", str) != DESCRIBE:
        raise ProtocolError(f"stage {header['stage']!r:.80} needs orders")
    delays = tuple(seconds_of(delay, MAX_DELAY) for delay in field(header, "delays", list))
    if delays and len(delays) != len(nodes):
        raise ProtocolError(f"expected {len(nodes)} delays, got {len(delays)}")
    if (precision := field(header, "precision", str)) not in PRECISIONS:
        raise ProtocolError(f"this client computes in {' or '.join(PRECISIONS)}, not in {precision!r:.80}")
    weights = {
        part: _decode_weights(part, each, unpacker, store)
        for part, each in limited(field(header, "weights", dict), MAX_PARTS).items()
    }
    request = Request(
        stage=field(header, "stage", str),
        nodes=nodes,
        orders=orders,
        weights=weights,
        inputs=_decode_leaves(field(header, "inputs", dict), len(nodes), unpacker),
        delays=delays,
        separate=field(header, "separate", bool),
        label_counts=field(header, "label-counts", bool),
        session=field(header, "session", str),
        cohort=cohort,
        kept=field(header, "kept", bool),
        precision=precision,
        config=decode_config(header, "config"),
        evaluate_config=decode_config(header, "evaluate-config"),
    )
    unpacker.finish()
    _check_rows(request.inputs, 0 if orders is None else orders.num_rows)
    return field(header, "number", int), field(header, "wire", str), request


def _encode_weights(part: str, weights: Weights, packer: Packer, sent: Sent) -> dict[str, Any]:
    header: dict[str, Any] = {"version": weights.version, "constants-version": weights.constants_version}
    for kind, version, tensors in (
        ("parameters", weights.version, weights.parameters),
        (CONSTANTS, weights.constants_version, weights.constants),
    ):
        if not tensors or sent.get((part, kind)) != version:  # of nothing there is nothing to know
            header[kind] = packer.pack(tensors)
            sent[part, kind] = version
    return header


def _decode_weights(part: str, header: Any, unpacker: Unpacker, store: WeightStore) -> Weights:
    if not isinstance(header, dict):
        raise ProtocolError(f"expected the weights of {part!r:.80}, got {header!r:.80}")
    versions = {"parameters": field(header, "version", str), CONSTANTS: field(header, "constants-version", str)}
    found = {}
    for kind, version in versions.items():
        if kind in header:
            tensors = unpacker.unpack(header[kind])
            if not isinstance(tensors, dict) or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
                raise ProtocolError(f"expected the {kind} of {part!r:.80} by name")
            store.put(part, kind, version, tensors)
        found[kind] = store.get(part, kind, version)
    return Weights(found["parameters"], found[CONSTANTS], versions["parameters"], versions[CONSTANTS])


def _encode_leaves(leaves: Mapping[str, Leaf], packer: Packer) -> dict[str, Any]:
    return {
        name: {
            "kind": leaf.kind.value,
            "tree": packer.pack(leaf.value, reduce=leaf.kind is Kind.ROWS and not leaf.exact, packing=leaf.packing),
        }
        for name, leaf in leaves.items()
    }


def _decode_leaves(header: Mapping[str, Any], num_clients: int, unpacker: Unpacker) -> dict[str, Leaf]:
    leaves = {}
    for name, spec in limited(header, MAX_PARTS).items():
        if not isinstance(spec, dict):
            raise ProtocolError(f"expected the description of {name!r:.80}, got {spec!r:.80}")
        try:
            kind = Kind(spec.get("kind"))
        except ValueError as exc:
            raise ProtocolError(f"{name!r:.80} is of no known kind: {spec.get('kind')!r:.80}") from exc
        value = unpacker.unpack(spec.get("tree"))
        if kind is Kind.EACH:
            if not isinstance(value, tuple) or len(value) != num_clients:
                raise ProtocolError(f"{name}: expected one entry for each of {num_clients} clients")
            value = list(value)
        leaves[name] = Leaf(kind, value)
    return leaves


def _check_rows(leaves: Mapping[str, Leaf], rows: int) -> None:
    for name, leaf in leaves.items():
        for path, tensor in tree.named_leaves(leaf.value, name) if leaf.kind is Kind.ROWS else ():
            if tensor.ndim == 0 or len(tensor) != rows:
                got = f"got shape: {tuple(tensor.shape)}"
                raise ProtocolError(f"{path}: expected {rows} rows, {got}", FailureKind.SHAPE)


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
                "detail": each.detail[:MAX_TEXT],
                "rows": {str(row): why[:MAX_TEXT] for row, why in list(each.rows.items())[:MAX_ROWS]},
                "labels": {str(row): label for row, label in list(each.labels.items())[:MAX_ROWS]},
                "partition-id": each.partition_id,
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
    refused: dict[int, Failure] = {}
    for spec in limited(field(header, "parts", list), len(asked)):
        if not isinstance(spec, dict):
            raise ProtocolError(f"expected the description of a part, got {spec!r:.80}")
        nodes = nodes_of(spec)
        if not asked.keys() >= set(nodes) or seen & set(nodes):
            raise ProtocolError(f"a reply must name nodes that were asked, each once, got {nodes!r:.80}")
        seen |= set(nodes)
        part = _decode_part(spec, nodes, unpacker)
        try:
            _check_rows(part.outputs, sum(asked[node] for node in nodes))
            parts.append(part)
        except ProtocolError as error:  # the frame can be read, so the other parts can
            refused |= dict.fromkeys(nodes, Failure(error.kind, f"bad reply: {error}", joint=len(nodes) > 1))
    seconds = unpacker.column(header.get("seconds"), torch.float64, (len(asked),))
    if not ((seconds >= 0) & (seconds < 2**53)).all():
        raise ProtocolError("expected seconds, finite and not negative")
    unpacker.finish()
    failed = limited(field(header, "failures", dict), len(asked))
    failures = {node_of(node): _decode_failure(each) for node, each in failed.items()}
    descriptions = {}
    if request.stage == DESCRIBE:
        described = limited(field(header, "descriptions", dict), len(asked))
        descriptions = {node_of(node): _decode_description(each) for node, each in described.items()}
    missing = asked.keys() - seen - failures.keys() - descriptions.keys()
    failures |= dict.fromkeys(missing, Failure(FailureKind.MALFORMED, "its process sent no reply for it"))
    return Reply(
        parts,
        refused | {node: why for node, why in failures.items() if node in asked and node not in seen},
        {node: each for node, each in descriptions.items() if node in asked and node not in failures},
        dict(zip(request.nodes, seconds.tolist(), strict=True)),
        busy=seconds_of(header.get("busy", 0.0)),
        bytes_received=unpacker.num_bytes,
    )


def _encode_part(part: Part, packer: Packer) -> dict[str, Any]:
    return {
        "nodes": part.nodes,
        "step": part.step,
        "outputs": _encode_leaves(part.outputs, packer),
        "checksums": None if part.checksums is None else packer.column(part.checksums),
    }


def _decode_part(spec: Mapping[str, Any], nodes: tuple[int, ...], unpacker: Unpacker) -> Part:
    outputs = _decode_leaves(field(spec, "outputs", dict), len(nodes), unpacker)
    step = None if spec.get("step") is None else field(spec, "step", int)
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
    rows = {node_of(row): f"{why!s:.{MAX_TEXT}}" for row, why in limited(field(value, "rows", dict), MAX_ROWS).items()}
    held = limited(field(value, "labels", dict), MAX_ROWS)
    labels = dict(zip(map(node_of, held), integers({"labels": list(held.values())}, "labels"), strict=True))
    partition = None if value.get("partition-id") is None else field(value, "partition-id", int)
    return Failure(kind, field(value, "detail", str, MAX_HEADER_BYTES)[:MAX_TEXT], rows, labels, partition)


def _encode_description(each: Description) -> dict[str, Any]:
    header: dict[str, Any] = {
        "partition-id": each.partition_id,
        "num-examples": each.num_examples,
        "num-test-examples": each.num_test_examples,
        "left-out": {str(row): why[:MAX_TEXT] for row, why in list(each.left_out.items())[:MAX_ROWS]},
        "method": each.method,
        "model": each.model,
        "key": each.key.hex(),
        "private": each.private,
    }
    if each.labels is not None and each.counts is not None:
        header |= {"labels": each.labels.tolist(), "counts": each.counts.tolist()}
    if each.classes is not None:
        header["classes"] = {"numbers": dict(each.classes.numbers), "sure": each.classes.sure}
    return header


def _decode_description(header: Any) -> Description:
    if not isinstance(header, dict):
        raise ProtocolError(f"expected a description, got {header!r:.80}")

    def column(name: str) -> IntArray | None:
        return np.array(integers(header, name), dtype=np.int64) if name in header else None

    return Description(
        partition_id=None if header.get("partition-id") is None else field(header, "partition-id", int),
        num_examples=field(header, "num-examples", int),
        num_test_examples=field(header, "num-test-examples", int),
        labels=column("labels"),
        counts=column("counts"),
        left_out={
            node_of(row): f"{why!s:.{MAX_TEXT}}"
            for row, why in limited(field(header, "left-out", dict), MAX_ROWS).items()
        },
        method=field(header, "method", str),
        model=sys.intern(field(header, "model", str, MAX_MODEL)),  # all clients' alike, and kept
        key=_key(field(header, "key", str)),
        private=field(header, "private", str),
        classes=_decode_classes(field(header, "classes", dict)) if "classes" in header else None,
    )


def _decode_classes(spec: Mapping[str, Any]) -> ClassNumbers:
    numbers = limited(field(spec, "numbers", dict), MAX_NAMED)
    if any(len(name) > DIGEST for name in numbers):
        raise ProtocolError(f"expected digests of {DIGEST} characters, got {max(numbers, key=len)!r:.80}")
    values = integers({"numbers": list(numbers.values())}, "numbers")
    return ClassNumbers(dict(zip(map(sys.intern, numbers), values, strict=True)), field(spec, "sure", bool))


def _key(text: str) -> bytes:
    try:
        key = bytes.fromhex(text)
    except ValueError as exc:
        raise ProtocolError(f"expected a public key, got {text!r:.80}") from exc
    if len(key) not in (0, KEY_BYTES):
        raise ProtocolError(f"expected a public key of {KEY_BYTES} bytes, got {len(key)}")
    return key
