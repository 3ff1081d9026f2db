"""Records: every request and reply survives the wire bit by bit, and nothing malformed gets past the decoder."""

import contextlib
import copy

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from hypothesis import given, settings
from hypothesis import strategies as st

from psl_flower.errors import ProtocolError
from psl_flower.exchange.codec import (
    RAW,
    RequestEncoder,
    decode_reply,
    decode_request,
    decode_seconds,
    decode_tensor,
    encode_reply,
    encode_tensor,
    num_bytes,
)
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
    Weights,
    WorkOrder,
)

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
INTEGERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]
COMPLEX = [torch.complex64, torch.complex128]


def over_the_wire(content):
    """Return content as it comes out at the other end of a deployment: through protobuf bytes."""
    proto = recorddict_to_proto(content)
    return recorddict_from_proto(type(proto).FromString(proto.SerializeToString()))


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


def all_same(a, b):
    return list(a) == list(b) and all(same(a[name], b[name]) for name in a)


def weights(version="abc.1"):
    parameters = {"stem.weight": torch.randn(2, 3), "stem.bias": torch.randn(2, dtype=torch.float64)}
    constants = {"norm.num_batches_tracked": torch.tensor(7), "mask": torch.tensor([True, False])}
    return Weights(parameters, constants, version)


def order(**changes):
    fields = {"client": 3, "seed": 2**40, "epoch": 0, "step": 5, "start": 8, "count": 2}
    return WorkOrder(**{**fields, **changes})


# --- tensors ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [*FLOATS, *INTEGERS, *COMPLEX, torch.bool], ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 0, 3), (2, 3, 4)])
def test_tensors_survive_in_every_dtype(dtype, shape):
    tensor = (torch.randn(shape) * 3).to(dtype)
    assert same(decode_tensor(encode_tensor(tensor)), tensor)


def test_special_values_keep_their_bits():
    tensor = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45])
    for value in (tensor, tensor.bfloat16()):
        decoded = decode_tensor(encode_tensor(value))
        width = {4: torch.int32, 2: torch.int16}[value.element_size()]
        assert torch.equal(decoded.view(width), value.view(width))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(12).reshape(3, 4).T,
        torch.arange(12.0)[::3],
        torch.ones(3, 1).expand(3, 5),
        torch.randn(1, 2, 3, 3).to(memory_format=torch.channels_last),
        torch.randn(4, dtype=torch.complex64).conj(),
        torch.randn(4, dtype=torch.complex64).conj().imag,
        torch.randn(3, requires_grad=True) * 2,
        torch.eye(3).to_sparse(),
    ],
    ids=["transposed", "strided", "expanded", "channels-last", "conjugate", "negated", "attached", "sparse"],
)
def test_tensors_survive_in_every_layout(tensor):
    decoded = decode_tensor(encode_tensor(tensor))
    expected = tensor.detach().to_dense().resolve_conj().resolve_neg()
    assert same(decoded, expected)
    assert not decoded.requires_grad


def test_a_decoded_tensor_is_a_view_of_the_bytes():
    array = encode_tensor(torch.randn(5, 7))
    decoded = decode_tensor(array)
    assert decoded.data_ptr() == np.frombuffer(array.data, np.uint8).ctypes.data
    assert len(array.data) == 5 * 7 * 4  # the elements alone, no header


def test_dtypes_that_cannot_be_sent_are_refused():
    with pytest.raises(ProtocolError, match=r"float8_e5m2 cannot be sent; allowed: float64, .*bfloat16"):
        encode_tensor(torch.zeros(2).to(torch.float8_e5m2))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (
            Array("float32", (2,), "numpy.ndarray", b"\0" * 8),
            "expected raw bytes of a known dtype, got 'numpy.ndarray'",
        ),
        (Array("float31", (2,), RAW, b"\0" * 8), "known dtype, got 'psl_flower.raw' of 'float31'"),
        (Array("object", (2,), RAW, b"\0" * 16), "of 'object'"),
        (Array("float32", (2,), RAW, b"\0" * 7), r"expected 8 bytes for float32 \(2,\), got 7"),
        (Array("float32", (), RAW, b""), "expected 4 bytes"),
        (Array("float32", (2**40, 2**40), RAW, b"\0" * 8), "too large"),
        (Array("float32", (2**40,), RAW, b"\0" * 8), "expected 4398046511104 bytes .*, got 8"),
        (Array("float32", (-1, -2), RAW, b"\0" * 8), "none negative"),
        (Array("float32", (1,) * 17, RAW, b"\0" * 4), "at most 16 dimensions"),
        (Array("float32", (0, 2**62, 2**62), RAW, b""), "too large"),
        (Array("float32", (0, 2**70), RAW, b""), "too large"),
    ],
)
def test_malformed_arrays_are_refused(array, message):
    with pytest.raises(ProtocolError, match=message):
        decode_tensor(array)


# --- requests --------------------------------------------------------------------------------------------------------
def round_trip(request):
    message_type, content = RequestEncoder().encode(request)
    return message_type, decode_request(message_type, over_the_wire(content))


def assert_same_weights(a, b):
    assert all_same(a.parameters, b.parameters)
    assert all_same(a.constants, b.constants)
    assert a.version == b.version


CONFIG = {"lr": 0.5, "name": "x", "on": True, "n": 3, "list": [1, 2], "empty": []}


@pytest.mark.parametrize("label_counts", [True, False])
def test_describe_request(label_counts):
    message_type, decoded = round_trip(DescribeRequest(label_counts, CONFIG))
    assert message_type == DESCRIBE == "query.describe"
    assert (decoded.label_counts, decoded.config) == (label_counts, CONFIG)


@pytest.mark.parametrize("by_class", [True, False])
def test_forward_request(by_class):
    starts, counts = (np.array([0, 5, 2**40]), np.array([1, 0, 1])) if by_class else (None, None)
    request = ForwardRequest(order(class_starts=starts, class_counts=counts), weights(), CONFIG, 0.25)
    message_type, decoded = round_trip(request)
    assert decoded.delay == 0.25
    assert message_type == FORWARD == "train.forward"
    assert_same_weights(decoded.weights, request.weights)
    assert decoded.config == CONFIG
    for name in ("client", "seed", "epoch", "step", "start", "count"):
        assert getattr(decoded.order, name) == getattr(request.order, name)
    if by_class:
        np.testing.assert_array_equal(decoded.order.class_starts, starts)
        np.testing.assert_array_equal(decoded.order.class_counts, counts)
        assert decoded.order.class_counts.dtype == np.int64
    else:
        assert decoded.order.class_starts is decoded.order.class_counts is None


@pytest.mark.parametrize(
    "gradients",
    [
        (torch.randn(2, 3),),
        (None, torch.randn(2, 3), None, torch.zeros(2, 0, dtype=torch.bfloat16)),
        (torch.randn(2), *[None] * 1000, torch.randn(2)),
    ],
    ids=["one", "gaps", "wide gap"],
)
def test_backward_request(gradients):
    request = BackwardRequest(order(), weights(), gradients, CONFIG)
    message_type, decoded = round_trip(request)
    assert message_type == BACKWARD == "train.backward"
    assert len(decoded.gradients) == len(gradients)
    for sent, received in zip(gradients, decoded.gradients, strict=True):
        assert sent is received is None or same(sent, received)
    assert_same_weights(decoded.weights, request.weights)


def test_trailing_gradients_that_are_none_need_not_travel():
    _, decoded = round_trip(BackwardRequest(order(), weights(), (torch.ones(2), None)))
    assert len(decoded.gradients) == 1  # Graph.backward takes missing ones at the end as None
    _, decoded = round_trip(BackwardRequest(order(), weights(), (None, None)))
    assert decoded.gradients == ()


def test_evaluate_request():
    request = EvaluateRequest(4, 9, weights(), CONFIG, {"k": 1})
    message_type, decoded = round_trip(request)
    assert message_type == EVALUATE == "evaluate.forward"
    assert (decoded.start, decoded.count, decoded.config, decoded.evaluate_config) == (4, 9, CONFIG, {"k": 1})
    assert_same_weights(decoded.weights, request.weights)


def test_empty_weights_travel():
    _, decoded = round_trip(ForwardRequest(order(), Weights({"w": torch.ones(1)}, {}, "v")))
    assert decoded.weights.constants == {}


def test_weights_are_encoded_once_and_anew_when_they_change():
    encoder, first, second = RequestEncoder(), weights("a.1"), weights("a.2")
    contents = [encoder.encode(ForwardRequest(order(client=k), first))[1] for k in range(3)]
    assert contents[0]["parameters"] is contents[2]["parameters"]
    _, content = encoder.encode(BackwardRequest(order(), second, ()))
    assert same(decode_tensor(content["parameters"]["stem.weight"]), second.parameters["stem.weight"])


def test_num_bytes_counts_tensors_alone():
    _, content = RequestEncoder().encode(ForwardRequest(order(), weights(), CONFIG))
    assert num_bytes(content) == 6 * 4 + 2 * 8 + 8 + 2


# --- replies ---------------------------------------------------------------------------------------------------------
DESCRIBE_REQUEST = DescribeRequest(True)
FORWARD_REQUEST = ForwardRequest(order(), Weights({}, {}, "v"))
BACKWARD_REQUEST = BackwardRequest(order(), Weights({}, {}, "v"), ())
EVALUATE_REQUEST = EvaluateRequest(0, 1, Weights({}, {}, "v"))


@pytest.mark.parametrize("partition_id", [None, 0, 2**40])
@pytest.mark.parametrize("labels", [None, [], [0, 3, 7]])
def test_description(partition_id, labels):
    labels = None if labels is None else np.array(labels, dtype=np.int64)
    sent = Description(partition_id, 12, 4, labels, None if labels is None else labels * 2)
    decoded = decode_reply(DESCRIBE_REQUEST, over_the_wire(encode_reply(sent)))
    assert (decoded.partition_id, decoded.num_examples, decoded.num_test_examples) == (partition_id, 12, 4)
    if labels is None:
        assert decoded.labels is decoded.counts is None
    else:
        np.testing.assert_array_equal(decoded.labels, labels)
        np.testing.assert_array_equal(decoded.counts, labels * 2)
        assert decoded.labels.dtype == decoded.counts.dtype == np.int64


@pytest.mark.parametrize("request_", [FORWARD_REQUEST, EVALUATE_REQUEST], ids=["forward", "evaluate"])
@pytest.mark.parametrize("step", [None, 5])
def test_activations(request_, step):
    tensors = (torch.randn(4, 2).bfloat16(), torch.arange(4), *[torch.zeros(4, 0)] * 10)
    sent = Activations(tensors, torch.tensor([1, 2, 3, 4], dtype=torch.int32), step)
    decoded = decode_reply(request_, over_the_wire(encode_reply(sent)))
    assert decoded.step == step
    assert same(decoded.labels, sent.labels)
    assert len(decoded.tensors) == len(tensors)
    assert all(map(same, decoded.tensors, tensors))
    assert decoded.spec() == sent.spec()


def test_gradients():
    sent = Gradients({"b": torch.randn(3), "a": torch.tensor(2.0)}, ("unused", "too"), 5)
    decoded = decode_reply(BACKWARD_REQUEST, over_the_wire(encode_reply(sent)))
    assert all_same(decoded.tensors, sent.tensors)
    assert (decoded.unused, decoded.step) == (("unused", "too"), 5)


def test_gradients_of_nothing():
    decoded = decode_reply(BACKWARD_REQUEST, over_the_wire(encode_reply(Gradients({}, ("a",), 5))))
    assert (decoded.tensors, decoded.unused) == ({}, ("a",))


# --- refusals --------------------------------------------------------------------------------------------------------
def raw(**tensors):
    return ArrayRecord({name: encode_tensor(t) for name, t in tensors.items()})


def numbered(**tensors):
    return ArrayRecord({name[1:]: encode_tensor(t) for name, t in tensors.items()})


X, Y = torch.ones(2, 3), torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("request_", "content", "message"),
    [
        (FORWARD_REQUEST, {}, "expected a ConfigRecord named 'reply', got none"),
        (FORWARD_REQUEST, {"other": ConfigRecord()}, "named 'reply', got 'other'"),
        (FORWARD_REQUEST, {"reply": raw(a=X)}, "expected a ConfigRecord named 'reply', got none"),
        (FORWARD_REQUEST, {"reply": ConfigRecord()}, "expected an ArrayRecord named 'activations'"),
        (
            FORWARD_REQUEST,
            {"reply": ConfigRecord({"step": "5"}), "activations": numbered(_0=X), "labels": raw(labels=Y)},
            "expected 'step' to be of type int, got '5'",
        ),
        (
            FORWARD_REQUEST,
            {"reply": ConfigRecord({"step": True}), "activations": numbered(_0=X), "labels": raw(labels=Y)},
            "expected 'step' to be of type int, got True",
        ),
        (
            FORWARD_REQUEST,
            {"reply": ConfigRecord(), "activations": numbered(_1=X), "labels": raw(labels=Y)},
            "activations must be named by position, got 1",
        ),
        (
            FORWARD_REQUEST,
            {"reply": ConfigRecord(), "activations": ArrayRecord(), "labels": raw(labels=Y)},
            "expected at least one tensor of activations",
        ),
        (
            FORWARD_REQUEST,
            {"reply": ConfigRecord(), "activations": numbered(_0=X), "labels": ArrayRecord()},
            "expected one tensor of labels, got none",
        ),
        (
            EVALUATE_REQUEST,
            {"reply": ConfigRecord(), "activations": numbered(_0=X), "labels": raw(labels=Y, more=Y)},
            "expected one tensor of labels, got labels, more",
        ),
        (
            EVALUATE_REQUEST,
            {"reply": ConfigRecord(), "activations": numbered(_0=torch.tensor(1.0)), "labels": raw(labels=Y)},
            "need a batch dimension, got a scalar",
        ),
        (
            BACKWARD_REQUEST,
            {"reply": ConfigRecord({"unused": 3}), "gradients": raw()},
            "'unused' must be a list of names",
        ),
        (BACKWARD_REQUEST, {"reply": ConfigRecord({"unused": [3]}), "gradients": raw()}, "must be a list of names"),
        (BACKWARD_REQUEST, {"reply": ConfigRecord()}, "expected an ArrayRecord named 'gradients'"),
        (DESCRIBE_REQUEST, {"reply": ConfigRecord({"num-examples": 3})}, "expected 'num-test-examples' .* got None"),
        (
            DESCRIBE_REQUEST,
            {"reply": ConfigRecord({"num-examples": 3.0, "num-test-examples": 0})},
            "expected 'num-examples' to be of type int, got 3.0",
        ),
        (
            DESCRIBE_REQUEST,
            {"reply": ConfigRecord({"num-examples": 3, "num-test-examples": 0, "labels": [1.5], "counts": [1]})},
            "expected 'labels' to be a list of integers",
        ),
        (
            DESCRIBE_REQUEST,
            {"reply": ConfigRecord({"num-examples": 3, "num-test-examples": 0, "labels": [2**63], "counts": [1]})},
            "expected 'labels' to be a list of integers",
        ),
    ],
)
def test_malformed_replies_are_refused(request_, content, message):
    with pytest.raises(ProtocolError, match=message):
        decode_reply(request_, RecordDict(content))


def broken_request(message_type, change):
    requests = {
        DESCRIBE: DESCRIBE_REQUEST,
        FORWARD: ForwardRequest(order(class_starts=np.zeros(2, int), class_counts=np.ones(2, int)), weights()),
        BACKWARD: BackwardRequest(order(), weights(), (X,)),
        EVALUATE: EVALUATE_REQUEST,
    }
    _, content = RequestEncoder().encode(requests.get(message_type, DESCRIBE_REQUEST))
    change(content)
    return content


@pytest.mark.parametrize(
    ("message_type", "change", "message"),
    [
        ("train.sideways", lambda c: None, "unknown message type 'train.sideways'"),
        (DESCRIBE, lambda c: c.pop("request"), "expected a ConfigRecord named 'request'"),
        (DESCRIBE, lambda c: c.pop("config"), "expected a ConfigRecord named 'config', got 'request'"),
        (DESCRIBE, lambda c: c["request"].update({"label-counts": 1}), "'label-counts' to be of type bool, got 1"),
        (FORWARD, lambda c: c.pop("parameters"), "expected an ArrayRecord named 'parameters', got 'constants'"),
        (FORWARD, lambda c: c["request"].pop("weights"), "expected 'weights' to be of type str, got None"),
        (FORWARD, lambda c: c["request"].update({"count": 2.0}), "expected 'count' to be of type int, got 2.0"),
        (FORWARD, lambda c: c["request"].update({"seed": -1}), "'seed' must not be negative, got -1"),
        (FORWARD, lambda c: c["request"].update({"client": -1}), "'client' must not be negative, got -1"),
        (FORWARD, lambda c: c["request"].update({"delay": -1.0}), "'delay' to be finite and not negative, got -1.0"),
        (
            FORWARD,
            lambda c: c["request"].update({"delay": float("nan")}),
            "'delay' to be finite and not negative, got nan",
        ),
        (FORWARD, lambda c: c["request"].pop("class-starts"), "must name the same classes"),
        (FORWARD, lambda c: c["request"].update({"class-counts": [1]}), "must name the same classes"),
        (FORWARD, lambda c: c["request"].update({"class-counts": "ab"}), "'class-counts' to be a list of integers"),
        (BACKWARD, lambda c: c.pop("gradients"), "expected an ArrayRecord named 'gradients'"),
        (BACKWARD, lambda c: c["gradients"].update({"x": encode_tensor(X)}), "must be named by position, got 0, x"),
        (BACKWARD, lambda c: c["gradients"].update({"01": encode_tensor(X)}), "must be named by position, got 0, 01"),
        (BACKWARD, lambda c: c["gradients"].update({"٣": encode_tensor(X)}), "must be named by position"),
        (BACKWARD, lambda c: c["gradients"].update({"9" * 5000: encode_tensor(X)}), "must be named by position"),
        (BACKWARD, lambda c: c["gradients"].update({"99999": encode_tensor(X)}), "must be named by position"),
        (EVALUATE, lambda c: c.pop("evaluate-config"), "expected a ConfigRecord named 'evaluate-config'"),
        (EVALUATE, lambda c: c["request"].pop("start"), "expected 'start' to be of type int, got None"),
    ],
)
def test_malformed_requests_are_refused(message_type, change, message):
    with pytest.raises(ProtocolError, match=message):
        decode_request(message_type, broken_request(message_type, change))


# --- mutations -------------------------------------------------------------------------------------------------------
scalars = st.one_of(
    st.integers(-(2**63), 2**64 - 1), st.floats(), st.booleans(), st.text(max_size=5), st.binary(max_size=5)
)
values = st.one_of(
    scalars,
    st.lists(st.integers(-(2**63), 2**64 - 1), max_size=4),
    st.lists(st.text(max_size=3), max_size=4),
    st.lists(st.floats(), max_size=4),
)
arrays = st.builds(
    Array,
    st.sampled_from(["float32", "int64", "bool", "bfloat16", "complex64", "", "U4"]),
    st.lists(st.one_of(st.integers(-1, 4), st.integers(-(2**63), 2**64)), max_size=4).map(tuple),
    st.sampled_from([RAW, "numpy.ndarray", ""]),
    st.binary(max_size=64),
)

SAMPLES = [
    RequestEncoder().encode(request)
    for request in (
        DESCRIBE_REQUEST,
        ForwardRequest(order(class_starts=np.zeros(2, int), class_counts=np.ones(2, int)), weights(), CONFIG),
        BackwardRequest(order(), weights(), (X, None, X), CONFIG),
        EvaluateRequest(0, 3, weights(), CONFIG, CONFIG),
    )
]
REPLIES = [
    (DESCRIBE_REQUEST, encode_reply(Description(1, 4, 2, np.array([0, 1]), np.array([2, 2])))),
    (FORWARD_REQUEST, encode_reply(Activations((X, X), Y, 5))),
    (EVALUATE_REQUEST, encode_reply(Activations((X,), Y))),
    (BACKWARD_REQUEST, encode_reply(Gradients({"a": X}, ("b",), 5))),
]


def mutate(data, content):
    """Change, add or drop a few records, fields and arrays, in ways Flower's own records allow."""
    content = copy.deepcopy(content)
    for _ in range(data.draw(st.integers(1, 3))):
        names = list(content)
        if not names:
            break
        name = data.draw(st.sampled_from(names))
        record = content[name]
        action = data.draw(st.sampled_from(["drop record", "rename record", "drop", "set", "add"]))
        if action == "drop record":
            del content[name]
        elif action == "rename record":
            del content[name]
            content[data.draw(st.sampled_from([*names, "other"]))] = record
        elif action == "drop":
            if record:
                del record[data.draw(st.sampled_from(list(record)))]
        else:
            fields = (
                list(record)
                if action == "set" and record
                else ["0", "1", "00", "٣", "labels", "step", "unused", "seconds", "delay"]
            )
            value = data.draw(arrays if isinstance(record, ArrayRecord) else values)
            record[data.draw(st.sampled_from(fields))] = value
    return content


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_mutated_requests_raise_nothing_but_protocol_errors(data):
    message_type, content = data.draw(st.sampled_from(SAMPLES))
    with contextlib.suppress(ProtocolError):
        decode_request(message_type, mutate(data, content))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_mutated_replies_raise_nothing_but_protocol_errors(data):
    request, content = data.draw(st.sampled_from(REPLIES))
    mutated = mutate(data, content)
    with contextlib.suppress(ProtocolError):
        assert decode_seconds(mutated) >= 0
    with contextlib.suppress(ProtocolError):
        reply = decode_reply(request, mutated)
        if isinstance(reply, Description):
            reply.check(request)
        elif isinstance(reply, Activations):
            reply.check(2, Activations((X, X), Y).spec(), 5)
        else:
            reply.check({"a": X, "b": X}, 5)
