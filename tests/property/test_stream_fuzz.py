"""Whatever bytes come, the decoders refuse them with a ProtocolError or return what was sent; nothing else happens."""

import contextlib
import copy
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
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

from psl_flower.errors import ProtocolError
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

WEIGHTS = Weights({"w": torch.arange(6.0).reshape(2, 3)}, {"b": torch.tensor(3)}, "v1")


def order(client, count=2, by_class=False):
    classes = (np.array([0, 1]), np.array([1, count - 1])) if by_class else (None, None)
    return WorkOrder(
        client=client, seed=1, epoch=2, step=3, start=4, count=count, class_starts=classes[0], class_counts=classes[1]
    )


def cut_gradient(count=2):
    return (torch.randn(count, 5), None)


NODES = (2**63 + 5, 7)
CONFIG = {"a": 1, "b": [1.5, float("inf")], "c": b"\0", "d": "x", "e": True}
REQUESTS = {
    "describe": dict.fromkeys(NODES, DescribeRequest(True, CONFIG)),
    "forward": {n: ForwardRequest(order(i, 2 + i, True), WEIGHTS, CONFIG, 0.5) for i, n in enumerate(NODES)},
    "backward": {n: BackwardRequest(order(i), WEIGHTS, cut_gradient(), CONFIG) for i, n in enumerate(NODES)},
    "evaluate": {n: EvaluateRequest(i, 2, WEIGHTS, CONFIG, {"f": 2}) for i, n in enumerate(NODES)},
}
REPLIES = {
    "describe": [Part((n,), Description(i, 5, 3, np.array([0, 4]), np.array([2, 3]))) for i, n in enumerate(NODES)],
    "forward": [Part(NODES, Activations((torch.randn(5, 4),), torch.zeros(5, dtype=torch.int64), 3))],
    "backward": [Part(NODES, Gradients({"w": torch.randn(2, 3)}, (), 3))],
    "evaluate": [Part(NODES, Activations((torch.randn(4, 4),), torch.zeros(4, dtype=torch.int64)))],
}
FRAMES = {}
for _name, _requests in REQUESTS.items():
    (_group,) = group_requests(_requests)
    _reply = GroupReply(REPLIES[_name], {}, dict.fromkeys(NODES, 0.25))
    FRAMES[f"{_name} request"] = (encode_group(_group, 9, with_weights=True, wire_dtype="int8"), None)
    FRAMES[f"{_name} reply"] = (encode_group_reply(9, _reply, "float16"), _group)


def decode(frame, group):
    return decode_group(frame, {"v1": WEIGHTS}.get) if group is None else decode_group_reply(frame, group)


def received(frame):
    (chunk,) = encode(frame, 0)
    return Decoder().feed(chunk)


@pytest.mark.parametrize("name", FRAMES)
def test_the_frames_that_are_altered_below_are_good_ones(name):
    frame, group = FRAMES[name]
    decode(received(frame), group)


@settings(max_examples=300)
@given(st.lists(st.binary(max_size=200), max_size=4))
def test_arbitrary_chunks(chunks):
    decoder = Decoder()
    try:
        for chunk in chunks:
            decoder.feed(chunk)
    except ProtocolError:
        pass


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(sorted(FRAMES)), st.integers(0, 10**6), st.binary(min_size=1, max_size=8), st.booleans())
def test_chunks_with_bytes_changed_or_cut(name, position, new, cut):
    frame, group = FRAMES[name]
    (chunk,) = encode(frame, 0)
    at = position % len(chunk)
    bad = chunk[:at] if cut else chunk[:at] + new + chunk[at + len(new) :]
    try:
        got = Decoder().feed(bad)
        if got is not None:
            decode(got, group)
    except ProtocolError:
        pass


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5)
    | st.sampled_from(["float32", "int64", "int8", "float16", "v1", "train.forward", "query.describe", "7"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def paths(value, path=()):
    yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from paths(value[key], (*path, key))


@settings(max_examples=1000, deadline=None)
@given(st.data())
def test_headers_with_a_value_replaced_or_removed(data):
    name = data.draw(st.sampled_from(sorted(FRAMES)))
    frame, group = FRAMES[name]
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
        decode(received(Frame(header, frame.buffers)), group)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(sorted(FRAMES)), st.lists(st.binary(max_size=40), max_size=6))
def test_buffers_that_do_not_fit_the_header(name, buffers):
    frame, group = FRAMES[name]
    with contextlib.suppress(ProtocolError):
        decode(received(Frame(frame.header, [[memoryview(b)] for b in buffers])), group)
