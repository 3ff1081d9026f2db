"""Whatever bytes come, the decoders refuse them with a ProtocolError or return what was sent; nothing else happens."""

import contextlib
import copy
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from psl_flower.errors import ProtocolError
from psl_flower.exchange.codec import WeightStore, decode_reply, decode_request, encode_reply, encode_request
from psl_flower.exchange.frames import Decoder, Frame, encode
from psl_flower.failures import Failure
from psl_flower.failures import Kind as FailureKind
from psl_flower.protocol import DESCRIBE, Description, Kind, Leaf, Orders, Part, Reply, Request, Weights

WEIGHTS = {"head": Weights({"w": torch.arange(6.0).reshape(2, 3)}, {"b": torch.tensor(3)}, "v1", "c1")}
NODES = (2**63 + 5, 7)
CONFIG = {"a": 1, "b": [1.5, float("inf")], "c": b"\0", "d": "x", "e": True}


def orders(counts=(2, 3), **more):
    counts = np.array(counts)
    return Orders(clients=np.arange(2), starts=np.array([4, 0]), counts=counts, seed=1, epoch=2, step=3, **more)


def rows(n):
    return (torch.randn(n, 5), None, {"x": torch.randn(n)})


BY_CLASS = {"class_starts": np.array([[0, 1], [0, 1]]), "class_counts": np.array([[1, 1], [1, 2]])}
COMMON = {"nodes": NODES, "weights": WEIGHTS, "config": CONFIG}
REQUESTS = {
    "describe": Request(stage=DESCRIBE, nodes=NODES, label_counts=True, config=CONFIG),
    "forward": Request(stage="forward", orders=orders(**BY_CLASS), delays=(0.5, 0.5), **COMMON),
    "backward": Request(
        stage="backward",
        orders=orders(left_out={0: (1, 2)}, checksums=np.array([5, 6])),
        inputs={
            "gradient": Leaf(Kind.ROWS, rows(5)),
            "own": Leaf(Kind.EACH, [torch.ones(2), None]),
            "all": Leaf(Kind.SHARED, {"s": torch.tensor(1.0)}),
        },
        **COMMON,
    ),
    "evaluate": Request(stage="forward", orders=orders(test=True), evaluate_config={"f": 2}, **COMMON),
}
OUTPUTS = {"activations": Leaf(Kind.ROWS, rows(5)), "labels": Leaf(Kind.ROWS, torch.zeros(5, dtype=torch.int64))}
REPLIES = {
    "describe": Reply(
        descriptions={n: Description(i, 5, 3, np.array([0, 4]), np.array([2, 3])) for i, n in enumerate(NODES)}
    ),
    "forward": Reply([Part(NODES, OUTPUTS, 3, np.array([5, 6]))]),
    "backward": Reply([Part(NODES, {"head": Leaf(Kind.SUM, {"w": torch.randn(2, 3), "u": None})}, 3)]),
    "evaluate": Reply(failures={n: Failure(FailureKind.UNREADABLE, "no", {3: "broken"}, {3: 1}) for n in NODES}),
}
FRAMES = {}
for _name, _request in REQUESTS.items():
    FRAMES[f"{_name} request"] = (encode_request(_request, 9, sent={}, wire_dtype="int8")[0], None)
    _reply = encode_reply(9, REPLIES[_name], _request, "float16")
    FRAMES[f"{_name} reply"] = (_reply, _request)


def decode(frame, request):
    """Return what a frame holds; a reply says something of each node."""
    if request is None:
        return decode_request(frame, WeightStore())
    reply = decode_reply(frame, request)
    assert reply.answered() == set(NODES)
    return reply


def received(frame):
    (chunk,) = encode(frame, 0)
    return Decoder().feed(chunk)


@pytest.mark.parametrize("name", FRAMES)
def test_the_frames_that_are_altered_below_are_good_ones(name):
    frame, request = FRAMES[name]
    decode(received(frame), request)


@settings(max_examples=300)
@given(st.lists(st.binary(max_size=200), max_size=4))
def test_arbitrary_chunks(chunks):
    decoder = Decoder()
    try:
        for chunk in chunks:
            decoder.feed(chunk)
    except ProtocolError:
        pass


@settings(max_examples=400)
@given(st.sampled_from(sorted(FRAMES)), st.integers(0, 10**6), st.binary(min_size=1, max_size=8), st.booleans())
def test_chunks_with_bytes_changed_or_cut(name, position, new, cut):
    frame, request = FRAMES[name]
    (chunk,) = encode(frame, 0)
    at = position % len(chunk)
    bad = chunk[:at] if cut else chunk[:at] + new + chunk[at + len(new) :]
    try:
        got = Decoder().feed(bad)
        if got is not None:
            decode(got, request)
    except ProtocolError:
        pass


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5)
    | st.sampled_from(["float32", "int64", "int8", "float16", "v1", "forward", "describe", "7", "rows", "sum", "each"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def paths(value, path=()):
    yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from paths(value[key], (*path, key))


@settings(max_examples=400)
@given(st.data())
def test_headers_with_a_value_replaced_or_removed(data):
    name = data.draw(st.sampled_from(sorted(FRAMES)))
    frame, request = FRAMES[name]
    header = copy.deepcopy(json.loads(json.dumps(frame.header)))
    path = data.draw(st.sampled_from([p for p in paths(header) if p]))
    parent = header
    for key in path[:-1]:
        parent = parent[key]
    if data.draw(st.booleans()):
        del parent[path[-1]]
    else:
        parent[path[-1]] = data.draw(JSON)
    with contextlib.suppress(ProtocolError):
        decode(received(Frame(header, frame.buffers)), request)


@settings(max_examples=100)
@given(st.sampled_from(sorted(FRAMES)), st.lists(st.binary(max_size=40), max_size=6))
def test_buffers_that_do_not_fit_the_header(name, buffers):
    frame, request = FRAMES[name]
    with contextlib.suppress(ProtocolError):
        decode(received(Frame(frame.header, [[memoryview(b)] for b in buffers])), request)
