"""Requests and replies as Flower records, and back; every tensor as its raw bytes, nothing pickled.

Both carriers use it: what differs between them is only how the records travel.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from torch import Tensor

from psl_flower.errors import ProtocolError
from psl_flower.protocol import (
    BACKWARD,
    DESCRIBE,
    EVALUATE,
    FORWARD,
    Activations,
    BackwardRequest,
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
from psl_flower.typing import IntArray

# ``Array.stype`` of ours: `data` is the tensor's elements, row-major and little-endian, without a header. numpy's own
# format (Flower's default) has no bfloat16, and its reader copies.
RAW = "psl_flower.raw"

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
        torch.complex64,
        torch.complex128,
    )
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_DIMENSIONS = 16
_MAX_ELEMENTS = 2**48  # as if no dimension were 0: torch's strides must not overflow

# torch warns once per process that a tensor over immutable bytes must not be written to; none of ours is.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch.frombuffer(b"\0", dtype=torch.uint8)

T = TypeVar("T")


# --- tensors ---------------------------------------------------------------------------------------------------------
def encode_tensor(tensor: Tensor) -> Array:
    """Return a tensor (of any device and layout) as a Flower Array of raw bytes."""
    return Array(dtype_name(tensor), tuple(tensor.shape), RAW, raw_bytes(tensor).tobytes())


def decode_tensor(array: Array) -> Tensor:
    """Return the tensor an Array holds: a read-only view of its bytes, not a copy.

    Raises
    ------
    ProtocolError
        If the dtype is unknown, the shape is impossible, or the number of bytes does not fit both.
    """
    if array.stype != RAW or array.dtype not in _DTYPES:
        raise ProtocolError(f"expected raw bytes of a known dtype, got {array.stype!r} of {array.dtype!r}")
    return from_raw_bytes(array.dtype, tuple(array.shape), array.data)


def dtype_name(tensor: Tensor) -> str:
    """Return how a tensor's dtype is called on the wire."""
    if tensor.dtype not in _NAMES:
        raise ProtocolError(f"tensors of dtype {tensor.dtype} cannot be sent; allowed: {', '.join(_DTYPES)}")
    return _NAMES[tensor.dtype]


def raw_bytes(tensor: Tensor) -> memoryview:
    """Return a tensor's elements, row-major, as bytes: a view if it lies so in memory already."""
    flat = tensor.detach().to_dense().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy().data) if flat.numel() else memoryview(b"")


def from_raw_bytes(dtype_name: str, shape: tuple[int, ...], data: bytes | memoryview) -> Tensor:
    """Return the tensor that raw bytes hold, as a view of them.

    Raises
    ------
    ProtocolError
        If the dtype is unknown, the shape is impossible, or the number of bytes does not fit both.
    """
    dtype = _DTYPES.get(dtype_name)
    if dtype is None:
        raise ProtocolError(f"expected raw bytes of a known dtype, got {dtype_name!r:.80}")
    if len(shape) > _MAX_DIMENSIONS or any(not isinstance(n, int) or n < 0 for n in shape):
        raise ProtocolError(f"expected at most {_MAX_DIMENSIONS} dimensions, none negative, got {shape!r:.80}")
    if math.prod(max(n, 1) for n in shape) > _MAX_ELEMENTS:
        raise ProtocolError(f"expected a shape of at most {_MAX_ELEMENTS} elements, got {shape!r:.80}: too large")
    expected = math.prod(shape) * dtype.itemsize
    if len(data) != expected:
        raise ProtocolError(f"expected {expected} bytes for {dtype_name} {shape}, got {len(data)}")
    return torch.frombuffer(data, dtype=dtype).reshape(shape) if expected else torch.empty(shape, dtype=dtype)


def encode_tensors(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """Return named tensors as an ArrayRecord."""
    record = ArrayRecord()
    for name, tensor in tensors.items():
        record[name] = encode_tensor(tensor)
    return record


def decode_tensors(record: ArrayRecord) -> dict[str, Tensor]:
    """Return the tensors of an ArrayRecord, as views."""
    return {name: decode_tensor(array) for name, array in record.items()}


def num_bytes(content: RecordDict) -> int:
    """Return the bytes of all tensors in a message's content."""
    records = (record for record in content.values() if isinstance(record, ArrayRecord))
    return sum(len(array.data) for record in records for array in record.values())


# --- requests --------------------------------------------------------------------------------------------------------
class RequestEncoder:
    """Requests to records; the weights that many requests share are encoded once."""

    def __init__(self) -> None:
        self._weights: tuple[Weights, dict[str, ArrayRecord]] | None = None

    def encode(self, request: Request) -> tuple[str, RecordDict]:
        """Return the Flower message type and content of a request."""
        config = ConfigRecord(dict(request.config))
        if isinstance(request, DescribeRequest):
            header = ConfigRecord({"label-counts": request.label_counts})
            return DESCRIBE, RecordDict({"request": header, "config": config})
        weights = self._encode_weights(request.weights)
        if isinstance(request, EvaluateRequest):
            header = ConfigRecord({"start": request.start, "count": request.count, "weights": request.weights.version})
            evaluate_config = ConfigRecord(dict(request.evaluate_config))
            return EVALUATE, RecordDict(
                {"request": header, "config": config, "evaluate-config": evaluate_config, **weights}
            )
        header = _encode_order(request.order)
        header["weights"] = request.weights.version
        if isinstance(request, ForwardRequest):
            header["delay"] = float(request.delay)
            return FORWARD, RecordDict({"request": header, "config": config, **weights})
        gradients = encode_tensors({str(i): g for i, g in enumerate(request.gradients) if g is not None})
        return BACKWARD, RecordDict({"request": header, "config": config, "gradients": gradients, **weights})

    def _encode_weights(self, weights: Weights) -> dict[str, ArrayRecord]:
        if self._weights is None or self._weights[0] is not weights:
            records = {
                "parameters": encode_tensors(weights.parameters),
                "constants": encode_tensors(weights.constants),
            }
            self._weights = (weights, records)
        return self._weights[1]


def decode_request(message_type: str, content: RecordDict) -> Request:
    """Return the request a message carries.

    Raises
    ------
    ProtocolError
        If a record or a field is missing or of the wrong type.
    """
    if message_type not in (DESCRIBE, FORWARD, BACKWARD, EVALUATE):
        raise ProtocolError(f"unknown message type {message_type!r}")
    header = _config(content, "request")
    config = dict(_config(content, "config"))
    if message_type == DESCRIBE:
        return DescribeRequest(_get(header, "label-counts", bool), config)
    weights = Weights(
        decode_tensors(_arrays(content, "parameters")),
        decode_tensors(_arrays(content, "constants")),
        _get(header, "weights", str),
    )
    if message_type == EVALUATE:
        start, count = _get(header, "start", int), _get(header, "count", int)
        return EvaluateRequest(start, count, weights, config, dict(_config(content, "evaluate-config")))
    if message_type == FORWARD:
        return ForwardRequest(_decode_order(header), weights, config, _get_seconds(header, "delay"))
    gradients = decode_tensors(_arrays(content, "gradients"))
    if not all(_POSITION.fullmatch(name) for name in gradients):
        raise ProtocolError(f"gradients must be named by position, got {', '.join(gradients):.80}")
    length = max(map(int, gradients), default=-1) + 1
    in_order = tuple(gradients.get(str(i)) for i in range(length))
    return BackwardRequest(_decode_order(header), weights, in_order, config)


# Activations without a gradient (integers crossing the cut) leave gaps, so positions need a bound of their own.
_POSITION = re.compile("0|[1-9][0-9]{0,3}")


_ORDER_FIELDS = ("client", "seed", "epoch", "step", "start", "count")


def _encode_order(order: WorkOrder) -> ConfigRecord:
    header = ConfigRecord({name: getattr(order, name) for name in _ORDER_FIELDS})
    if order.class_starts is not None and order.class_counts is not None:
        header["class-starts"] = order.class_starts.tolist()
        header["class-counts"] = order.class_counts.tolist()
    return header


def _decode_order(header: ConfigRecord) -> WorkOrder:
    starts, counts = _integers(header, "class-starts"), _integers(header, "class-counts")
    if (starts is None) != (counts is None) or (
        starts is not None and counts is not None and len(starts) != len(counts)
    ):
        raise ProtocolError("class-starts and class-counts must name the same classes")
    fields = {name: _get(header, name, int) for name in _ORDER_FIELDS}
    for name, value in fields.items():
        if value < 0:
            raise ProtocolError(f"{name!r} must not be negative, got {value}")
    return WorkOrder(**fields, class_starts=starts, class_counts=counts)


# --- replies ---------------------------------------------------------------------------------------------------------
def encode_reply(reply: Reply, seconds: float = 0.0) -> RecordDict:
    """Return a reply's content; `seconds` is how long the client worked on it."""
    content = _encode_reply(reply)
    _config(content, "reply")["seconds"] = seconds
    return content


def _encode_reply(reply: Reply) -> RecordDict:
    if isinstance(reply, Description):
        header = ConfigRecord({"num-examples": reply.num_examples, "num-test-examples": reply.num_test_examples})
        if reply.partition_id is not None:
            header["partition-id"] = reply.partition_id
        if reply.labels is not None and reply.counts is not None:
            header["labels"] = reply.labels.tolist()
            header["counts"] = reply.counts.tolist()
        return RecordDict({"reply": header})
    header = ConfigRecord() if reply.step is None else ConfigRecord({"step": reply.step})
    if isinstance(reply, Activations):
        activations = encode_tensors({str(i): t for i, t in enumerate(reply.tensors)})
        return RecordDict(
            {"reply": header, "activations": activations, "labels": encode_tensors({"labels": reply.labels})}
        )
    header["unused"] = list(reply.unused)
    return RecordDict({"reply": header, "gradients": encode_tensors(reply.tensors)})


def decode_seconds(content: RecordDict) -> float:
    """Return how long the client says it worked on a reply.

    Raises
    ------
    ProtocolError
        If it does not say, or says nonsense.
    """
    return _get_seconds(_config(content, "reply"), "seconds")


def decode_reply(request: Request, content: RecordDict) -> Reply:
    """Return the reply to `request` that a message carries.

    Raises
    ------
    ProtocolError
        If a record or a field is missing or of the wrong type.
    """
    header = _config(content, "reply")
    if isinstance(request, DescribeRequest):
        return Description(
            partition_id=_get(header, "partition-id", int) if "partition-id" in header else None,
            num_examples=_get(header, "num-examples", int),
            num_test_examples=_get(header, "num-test-examples", int),
            labels=_integers(header, "labels"),
            counts=_integers(header, "counts"),
        )
    step = _get(header, "step", int) if "step" in header else None
    if isinstance(request, BackwardRequest):
        unused = header.get("unused", [])
        if not isinstance(unused, list) or not all(isinstance(name, str) for name in unused):
            raise ProtocolError(f"'unused' must be a list of names, got {unused!r}")
        names = tuple(str(name) for name in unused)
        return Gradients(decode_tensors(_arrays(content, "gradients")), names, step)
    activations = decode_tensors(_arrays(content, "activations"))
    if not activations:
        raise ProtocolError("expected at least one tensor of activations, got none")
    if list(activations) != [str(i) for i in range(len(activations))]:
        raise ProtocolError(f"activations must be named by position, got {', '.join(activations):.80}")
    labels = decode_tensors(_arrays(content, "labels"))
    if list(labels) != ["labels"]:
        raise ProtocolError(f"expected one tensor of labels, got {', '.join(labels)[:80] or 'none'}")
    tensors = (*activations.values(), labels["labels"])
    if any(tensor.ndim == 0 for tensor in tensors):
        raise ProtocolError("activations and labels need a batch dimension, got a scalar")
    return Activations(tensors[:-1], tensors[-1], step)


# --- fields ----------------------------------------------------------------------------------------------------------
def _config(content: RecordDict, name: str) -> ConfigRecord:
    return _record(content, name, ConfigRecord)


def _arrays(content: RecordDict, name: str) -> ArrayRecord:
    return _record(content, name, ArrayRecord)


def _record(content: RecordDict, name: str, kind: type[T]) -> T:
    # not through ``content.array_records`` and the like: each makes a checked dictionary anew
    record = content.get(name)
    if not isinstance(record, kind):
        held = [key for key, value in content.items() if isinstance(value, kind)]
        article = "an" if kind is ArrayRecord else "a"
        raise ProtocolError(f"expected {article} {kind.__name__} named {name!r}, got {_listed(held)}")
    return record


def _get(header: ConfigRecord, name: str, kind: type[T]) -> T:
    value: Any = header.get(name)
    if type(value) is not kind or (kind is int and not _fits(header[name])):
        raise ProtocolError(f"expected {name!r} to be of type {kind.__name__}, got {value!r:.80}")
    return value


def _get_seconds(header: ConfigRecord, name: str) -> float:
    seconds = _get(header, name, float)
    if not 0 <= seconds < math.inf:
        raise ProtocolError(f"expected {name!r} to be finite and not negative, got {seconds}")
    return seconds


def _integers(header: ConfigRecord, name: str) -> IntArray | None:
    values: Any = header.get(name)
    if values is None:
        return None
    if not isinstance(values, list) or not all(map(_fits, values)):
        raise ProtocolError(f"expected {name!r} to be a list of integers, got {values!r:.80}")
    return np.array(values, dtype=np.int64)


def _fits(value: object) -> bool:
    """Return whether a value is an integer of at most 64 bits with a sign; Flower's records also take larger ones."""
    return type(value) is int and value.bit_length() < 64


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names)) or "none"
