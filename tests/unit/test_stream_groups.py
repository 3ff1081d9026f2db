"""Requests and replies of many clients as one frame, and tensors in fewer bits."""

import numpy as np
import pytest
import torch
from psl_flower.exchange.streams.frames import Decoder, Frame, encode
from psl_flower.exchange.streams.groups import (
    GroupReply,
    Part,
    decode_group,
    decode_group_reply,
    encode_group,
    encode_group_reply,
    group_requests,
)
from psl_flower.exchange.streams.tensors import Packer, Unpacker

from psl_flower.errors import ConfigError, ProtocolError
from psl_flower.exchange.streams.options import StreamOptions, split_address
from psl_flower.protocol import (
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

CONFIG = {"a": 1, "b": [1.5, float("-inf")], "c": b"\0\xff", "d": "x", "e": True}
WEIGHTS = Weights(
    {"w": torch.arange(6.0).reshape(2, 3), "h": torch.ones(3, dtype=torch.bfloat16)}, {"n": torch.tensor(3)}, "v1"
)


def over_the_wire(frame):
    decoder, done = Decoder(), None
    for chunk in encode(frame, 0):
        done = decoder.feed(chunk)
    return done


def order(client, count=2, classes=False):
    by_class = {"class_starts": np.array([0, 5]), "class_counts": np.array([1, count - 1])} if classes else {}
    return WorkOrder(client=client, seed=1, epoch=2, step=3, start=4 * client, count=count, **by_class)


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    if hasattr(a, "__dataclass_fields__"):
        return type(a) is type(b) and all(equal(getattr(a, f), getattr(b, f)) for f in a.__dataclass_fields__)
    return type(a) is type(b) and a == b


BIG = 2**64 - 1
REQUESTS = {
    "describe": {BIG: DescribeRequest(True, CONFIG), 1: DescribeRequest(True, CONFIG)},
    "forward": {n: ForwardRequest(order(n), WEIGHTS, CONFIG, 0.5 * n) for n in (4, 2, 3)},
    "forward by class": {n: ForwardRequest(order(n, 3, True), WEIGHTS, CONFIG) for n in (4, 2)},
    "backward": {
        n: BackwardRequest(order(n, n), WEIGHTS, (torch.randn(n, 2, 2), None, torch.randn(n)), CONFIG)
        for n in (4, 2, 3)
    },
    "evaluate": {n: EvaluateRequest(n, 2, WEIGHTS, CONFIG, {"k": 1}) for n in (4, 2)},
}


@pytest.mark.parametrize("name", REQUESTS)
@pytest.mark.parametrize("with_weights", [True, False])
def test_requests_come_out_as_they_went_in(name, with_weights):
    (group,) = group_requests(REQUESTS[name], separate=True)
    frame = over_the_wire(encode_group(group, 17, with_weights=with_weights, wire_dtype="float32"))
    number, wire, decoded = decode_group(frame, lambda version: WEIGHTS if version == "v1" else None)
    assert (number, wire) == (17, "float32")
    assert equal(dict(zip(decoded.nodes, decoded.requests(), strict=True)), REQUESTS[name])
    assert decoded.separate == (name == "backward")


def test_weights_that_are_neither_sent_nor_at_hand():
    (group,) = group_requests(REQUESTS["forward"])
    frame = over_the_wire(encode_group(group, 0, with_weights=False, wire_dtype="float32"))
    with pytest.raises(ProtocolError, match="'v1' were not sent"):
        decode_group(frame, lambda version: None)


def test_requests_that_differ_in_what_is_shared_are_not_grouped():
    other = Weights(WEIGHTS.parameters, WEIGHTS.constants, "v2")
    requests = {
        1: ForwardRequest(order(1), WEIGHTS, CONFIG),
        2: ForwardRequest(order(2), other, CONFIG),
        3: ForwardRequest(order(3), WEIGHTS, {}),
        4: DescribeRequest(False, CONFIG),
        5: ForwardRequest(order(5), WEIGHTS, dict(CONFIG)),
    }
    assert [group.nodes for group in group_requests(requests)] == [(1, 5), (2,), (3,), (4,)]


def reply_over_the_wire(name, parts, wire="float32", failures=None, seconds=None):
    (group,) = group_requests(REQUESTS[name])
    reply = GroupReply(parts, failures or {}, seconds or {})
    return decode_group_reply(over_the_wire(encode_group_reply(1, reply, wire)), group)


def test_descriptions():
    sent = {
        BIG: Description(3, 10, 2, np.array([0, 7]), np.array([4, 6])),
        1: Description(None, 0, 0, np.array([], dtype=np.int64), np.array([], dtype=np.int64)),
    }
    replies, failures, _ = reply_over_the_wire("describe", [Part((node,), d) for node, d in sent.items()])
    assert equal(replies, sent)
    assert not failures


def test_activations_are_split_among_the_clients_in_the_order_named():
    x, y = torch.randn(6, 3), torch.arange(6)
    replies, failures, seconds = reply_over_the_wire(
        "forward",
        [Part((2, 4), Activations((x[:4],), y[:4], 3)), Part((3,), Activations((x[4:],), y[4:], 3))],
        seconds={2: 0.5},
    )
    assert equal(replies[2], Activations((x[:2],), y[:2], 3))
    assert equal(replies[4], Activations((x[2:4],), y[2:4], 3))
    assert equal(replies[3], Activations((x[4:],), y[4:], 3))
    assert not failures
    assert seconds == {2: 0.5}


def test_a_sum_of_gradients_is_one_object_for_all_it_covers():
    sent = Gradients({"w": torch.randn(2, 3)}, ("h",), 3)
    replies, failures, _ = reply_over_the_wire("backward", [Part((3, 4), sent)], failures={2: "no data"})
    assert equal(replies[3], sent)
    assert replies[3] is replies[4]
    assert failures == {2: "no data"}


def test_clients_left_out_of_a_reply_have_failed():
    replies, failures, _ = reply_over_the_wire("backward", [Part((3,), Gradients({}, (), 3))], failures={99: "who?"})
    assert list(replies) == [3]
    assert set(failures) == {2, 4}
    assert "no reply" in failures[2]


ROWS = Activations((torch.zeros(2, 3),), torch.zeros(2), 3)


@pytest.mark.parametrize(
    ("parts", "why"),
    [
        ([Part((2,), ROWS), Part((2,), ROWS)], "each once"),
        ([Part((2, 2), ROWS)], "each once"),
        ([Part((5,), ROWS)], "nodes that were asked"),
        ([Part((), ROWS)], "nodes that were asked"),
        ([Part((2, 3), ROWS)], "of 4 examples"),
        ([Part((2,), Activations((torch.tensor(1.0),), torch.zeros(2), 3))], "of 2 examples"),
        ([Part((2,), Activations((torch.zeros(2),), torch.zeros(3), 3))], "of 2 examples"),
        ([Part((2,), Activations((), torch.zeros(2), 3))], "at least one tensor"),
        ([Part((2,), Gradients({}))], "activations"),
        ([Part((n,), ROWS) for n in (2, 3, 4, 4)], "at most 3"),
    ],
)
def test_replies_that_do_not_fit_the_question(parts, why):
    with pytest.raises(ProtocolError, match=why):
        reply_over_the_wire("forward", parts)


# --- tensors in fewer bits -------------------------------------------------------------------------------------------
def reduced(tensor, wire_dtype, *more):
    packer = Packer(wire_dtype)
    spec = packer.pack(tensor, *more, reduce=True)
    frame = over_the_wire(Frame({"spec": spec}, packer.buffers))
    unpacker = Unpacker(frame.buffers)
    result = unpacker.unpack(frame.header["spec"])
    unpacker.finish()
    return result, frame.num_bytes()


@pytest.mark.parametrize(
    ("wire_dtype", "tolerance", "share"),
    [("float32", 0, 1), ("float16", 2**-11, 0.5), ("bfloat16", 2**-8, 0.5), ("int8", 0.5 / 127, 0.27)],
)
@pytest.mark.parametrize("magnitude", [1.0, 1e-12, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_error_is_small_beside_the_largest_value(wire_dtype, tolerance, share, magnitude, dtype):
    x = torch.randn(8, 4, 50, generator=torch.Generator().manual_seed(0), dtype=dtype) * magnitude
    y, num_bytes = reduced(x, wire_dtype)
    assert y.dtype == dtype
    assert y.shape == x.shape
    assert float((y - x).abs().max()) <= tolerance * 1.01 * float(x.abs().max())
    assert num_bytes <= x.numel() * 4 * share * (2 if wire_dtype == "float32" and dtype == torch.float64 else 1)


def test_int8_has_a_scale_of_its_own_for_each_example():
    x = torch.randn(3, 100) * torch.tensor([1.0, 1e-6, 0.0])[:, None]
    y, _ = reduced(x, "int8")
    assert ((y - x).abs().amax(dim=1) <= x.abs().amax(dim=1) / 127).all()


def test_float16_keeps_gradients_that_float16_alone_would_lose():
    x = torch.tensor([[3e-9, -1e-9, 0.0]])
    assert not x.half().any()
    y, _ = reduced(x, "float16")
    assert torch.allclose(y, x, rtol=1e-3, atol=0)


@pytest.mark.parametrize("wire_dtype", ["float16", "bfloat16", "int8"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(wire_dtype, bad):
    y, _ = reduced(torch.tensor([[1.0, bad], [1.0, 2.0]]), wire_dtype)
    assert not torch.isfinite(y[0]).all()


@pytest.mark.parametrize("wire_dtype", ["float16", "bfloat16", "int8"])
@pytest.mark.parametrize(
    "tensor", [torch.arange(5), torch.zeros(0, 3), torch.randn(4).half(), torch.tensor(2.5), torch.zeros(2, 2)]
)
def test_integers_and_empty_and_short_tensors(wire_dtype, tensor):
    y, _ = reduced(tensor, wire_dtype)
    assert y.dtype == tensor.dtype
    assert torch.allclose(y, tensor, atol=0.02)


@pytest.mark.parametrize("wire_dtype", ["float32", "int8"])
def test_parts_are_joined(wire_dtype):
    parts = [torch.randn(n, 7) for n in (1, 0, 3)]
    y, _ = reduced(parts[0], wire_dtype, *parts[1:])
    assert torch.allclose(y, torch.cat(parts), atol=0.03)


def test_parts_that_differ_are_refused():
    with pytest.raises(ProtocolError, match="differ in dtype"):
        Packer().pack(torch.zeros(2, 3), torch.zeros(2, 4))


# --- options ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("address", "expected"),
    [("127.0.0.1:0", ("127.0.0.1", 0)), ("[::]:9095", ("[::]", 9095)), ("example.org:1", ("example.org", 1))],
)
def test_addresses(address, expected):
    assert split_address(address, "bind") == expected


@pytest.mark.parametrize("address", ["", "host", "host:", "host:x", "host:70000", ":80", "::1", "a:b:80", "[]:80"])
def test_addresses_without_host_or_port_are_refused(address):
    with pytest.raises(ConfigError, match="bind must be host:port"):
        StreamOptions(bind=address)


@pytest.mark.parametrize(
    ("advertise", "address"),
    [
        ("", "0.0.0.0:4711"),
        ("psl.example.org", "psl.example.org:4711"),
        ("10.0.0.1:443", "10.0.0.1:443"),
        ("[::1]", "[::1]:4711"),
    ],
)
def test_what_clients_are_told(advertise, address):
    assert StreamOptions(bind="0.0.0.0:0", advertise=advertise).address(4711) == address
