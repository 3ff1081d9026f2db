"""Requests and replies as frames: all survives either carrier, and nothing malformed gets past the decoder."""

import contextlib
import copy
import struct
from dataclasses import replace

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from hypothesis import given, settings
from hypothesis import strategies as st

from psl_flower.data import ClassNumbers
from psl_flower.errors import ProtocolError
from psl_flower.exchange.codec import WeightStore, decode_reply, decode_request, encode_reply, encode_request
from psl_flower.exchange.frames import Decoder, Frame, encode, join
from psl_flower.exchange.records import FRAME, content_to_frame, frame_to_content
from psl_flower.failures import Failure
from psl_flower.failures import Kind as FailureKind
from psl_flower.privacy import Cohort
from psl_flower.protocol import DESCRIBE, Description, Kind, Leaf, Orders, Part, Reply, Request, Weights

CONFIG = {"a": 1, "b": [1.5, float("-inf")], "c": b"\0\xff", "d": "x", "e": True, "empty": []}
BIG = 2**64 - 1  # Flower's node ids have no sign


def weights(version="v1", constants_version="c1"):
    parameters = {"stem.weight": torch.arange(6.0).reshape(2, 3), "h": torch.ones(3, dtype=torch.bfloat16)}
    constants = {"norm.num_batches_tracked": torch.tensor(7), "mask": torch.tensor([True, False])}
    return Weights(parameters, constants, version, constants_version)


def orders(counts=(2, 1, 3), *, by_class=False, **more):
    size = len(counts)
    counts = np.array(counts, dtype=np.int64)
    if by_class:
        more |= {"class_starts": np.full((size, 2), 2**40), "class_counts": np.stack([counts - 1, counts * 0 + 1], 1)}
    return Orders(
        clients=np.arange(size),
        starts=np.arange(size) * 4,
        counts=counts,
        **{"seed": 2**40, "epoch": 2, "step": 5} | more,
    )


def rows(n, *shape):
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(n))


NODES = (BIG, 7, 4)
COHORT = Cohort(
    session="s1",
    attempt=2**40,
    clients=np.array([0, 1, 2, 9]),
    counts=np.array([2, 1, 3, 4]),
    keys=np.arange(128, dtype=np.uint8).reshape(4, 32),
    degree=3,
    places={"head": 42, "loss": -3},
)
REQUESTS = {
    "describe": Request(stage=DESCRIBE, nodes=NODES, label_counts=True, session="s1", config=CONFIG),
    "masked": Request(
        stage="backward",
        nodes=NODES,
        orders=orders(put_off={0: ((-1, 4, 2), (-1, 0, 1)), 2: ((1, 0, 3),)}),
        weights={"head": weights()},
        inputs={"gradient": Leaf(Kind.ROWS, rows(6, 2))},
        cohort=COHORT,
    ),
    "forward": Request(
        stage="forward", nodes=NODES, orders=orders(), weights={"head": weights()}, config=CONFIG, delays=(0.5, 0.0, 2)
    ),
    "by class": Request(stage="forward", nodes=NODES, orders=orders(by_class=True), weights={"head": weights()}),
    "again": Request(
        stage="forward",
        nodes=NODES,
        orders=orders(left_out={1: (0, 5)}, checksums=np.array([1, 2**32 - 1, 0])),
        weights={"head": weights(), "tail": weights("v9", "c9")},
        separate=True,
    ),
    "backward": Request(
        stage="backward",
        nodes=NODES,
        orders=orders(),
        weights={"head": weights()},
        inputs={"gradient": Leaf(Kind.ROWS, (rows(6, 2, 2), None, rows(6)))},
    ),
    "each and shared": Request(
        stage="personal",
        nodes=NODES,
        orders=orders(),
        weights={"head": Weights({"w": torch.ones(1)}, {}, "v", "c")},
        inputs={
            "own": Leaf(Kind.EACH, [{"a": rows(k)} for k in (1, 2, 3)]),
            "all": Leaf(Kind.SHARED, {"scale": torch.tensor(2.0), "none": None}),
        },
    ),
    "evaluate": Request(
        stage="forward",
        nodes=NODES,
        orders=orders(test=True),
        weights={"head": weights()},
        config=CONFIG,
        evaluate_config={"k": 1},
    ),
}


# --- the two ways a frame travels ------------------------------------------------------------------------------------
def by_stream(frame):
    decoder, done = Decoder(), None
    for chunk in encode(frame, 0):
        done = decoder.feed(chunk)
    return done


def by_message(frame):
    """Return a frame as it comes out at the other end of a deployment: through protobuf bytes."""
    proto = recorddict_to_proto(frame_to_content(frame))
    return content_to_frame(recorddict_from_proto(type(proto).FromString(proto.SerializeToString())))


WAYS = [by_stream, by_message]


def equal(a, b):
    if isinstance(a, Leaf):
        return a.kind is b.kind and equal(a.value, b.value)
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, tuple | list):
        return type(a) is type(b) and len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    if hasattr(a, "__dataclass_fields__"):
        return type(a) is type(b) and all(equal(getattr(a, f), getattr(b, f)) for f in a.__dataclass_fields__)
    return type(a) is type(b) and a == b


# --- requests --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", REQUESTS)
def test_requests_come_out_as_they_went_in(name, way):
    request = REQUESTS[name]
    frame, _ = encode_request(request, 17, sent={})
    number, wire_dtype, received = decode_request(way(frame), WeightStore())
    assert (number, wire_dtype) == (17, "float32")
    assert equal(received.delays, tuple(map(float, request.delays)))
    for field in set(Request.__dataclass_fields__) - {"delays"}:
        assert equal(getattr(received, field), getattr(request, field)), field


@pytest.mark.parametrize(
    ("name", "message_type"),
    [("describe", "query.describe"), ("backward", "train.backward"), ("evaluate", "evaluate.forward")],
)
def test_flower_knows_requests_by_stage_and_kind_of_data(name, message_type):
    assert REQUESTS[name].message_type == message_type


def ask(request, sent, store):
    """Return a request as the process sees it that was sent those before, and the bytes of its tensors."""
    frame, num_bytes = encode_request(request, 0, sent=sent)
    return decode_request(by_stream(frame), store)[2].weights["head"], num_bytes


def forward(head):
    return Request(stage="forward", nodes=(1,), orders=orders((2,)), weights={"head": head})


def test_weights_travel_once_to_a_process_and_constants_only_when_they_change():
    sent, store = {}, WeightStore()
    sizes = {"parameters": 6 * 4 + 3 * 2, "constants": 8 + 2}
    for head, expected in (
        (weights("v1", "c1"), sizes["parameters"] + sizes["constants"]),
        (weights("v1", "c1"), 0),
        (weights("v2", "c1"), sizes["parameters"]),
        (weights("v2", "c2"), sizes["constants"]),
    ):
        received, num_bytes = ask(forward(head), sent, store)
        assert num_bytes == expected
        assert equal(received, head)


def test_weights_that_are_neither_sent_nor_at_hand():
    sent, store = {}, WeightStore()
    ask(forward(weights("v1")), sent, store)
    with pytest.raises(ProtocolError, match="weights 'v1' of 'head' were not sent"):
        ask(forward(weights("v1")), sent, WeightStore())
    ask(forward(weights("v2")), sent, store)  # takes the place of v1
    with pytest.raises(ProtocolError, match="weights 'v1' of 'head' were not sent"):
        ask(forward(weights("v1")), {("head", "parameters"): "v1"}, store)


def test_num_bytes_counts_tensors_alone():
    _, num_bytes = encode_request(REQUESTS["backward"], 0, sent={})
    assert num_bytes == 6 * 4 + 3 * 2 + 8 + 2 + 6 * 4 * 4 + 6 * 4


@pytest.mark.parametrize("name", ["forward", "again", "each and shared", "backward", "by class"])
def test_a_part_of_a_request_is_that_of_its_nodes(name):
    request, store = REQUESTS[name], WeightStore()
    frame, _ = encode_request(request.take([0, 2]), 0, sent={})
    _, _, part = decode_request(by_stream(frame), store)
    assert part.nodes == (BIG, 4)
    assert part.orders.clients.tolist() == [0, 2]
    assert part.counts() == [2, 3]
    if name == "backward":
        first, _, third = request.inputs["gradient"].value
        kept = torch.tensor([0, 1, 3, 4, 5])
        assert equal(part.inputs["gradient"].value, (first[kept], None, third[kept]))
    if name == "each and shared":
        assert equal(part.inputs["own"].value, [request.inputs["own"].value[i] for i in (0, 2)])
        assert equal(part.inputs["all"].value, request.inputs["all"].value)
    if name == "again":
        assert part.orders.left_out == {}
        assert part.orders.checksums.tolist() == [1, 0]


# --- replies ---------------------------------------------------------------------------------------------------------
def answered(name, reply, way=by_stream, wire_dtype="float32"):
    return decode_reply(way(encode_reply(3, reply, REQUESTS[name], wire_dtype)), REQUESTS[name])


def forward_part(nodes, count, step=5, checksums=None):
    outputs = {
        "activations": Leaf(Kind.ROWS, (rows(count, 4).bfloat16(), torch.arange(count), torch.zeros(count, 0))),
        "labels": Leaf(Kind.ROWS, torch.arange(count, dtype=torch.int32), exact=True),
    }
    return Part(nodes, outputs, step, checksums)


@pytest.mark.parametrize("way", WAYS)
def test_parts_come_out_as_they_went_in(way):
    sent = Reply(
        parts=[forward_part((BIG, 4), 5, checksums=np.array([2**32 - 1, 0])), forward_part((7,), 1, step=None)],
        seconds={BIG: 0.5, 7: 0.25, 4: 0.0},
    )
    received = answered("forward", sent, way)
    assert equal(received.parts, sent.parts)
    assert (received.failures, received.descriptions, received.seconds) == ({}, {}, sent.seconds)
    assert received.bytes_received == 6 * (4 * 2 + 8 + 4)


@pytest.mark.parametrize("way", WAYS)
def test_sums_and_what_is_each_clients_come_out_as_they_went_in(way):
    gradients = {"stem.weight": rows(2, 3), "unused": None, "scalar": torch.tensor(2.0)}
    sent = Reply(
        parts=[
            Part((4, BIG), {"head": Leaf(Kind.SUM, gradients), "own": Leaf(Kind.EACH, [rows(1), None])}, 5),
            Part((7,), {"head": Leaf(Kind.SUM, {}), "own": Leaf(Kind.EACH, [{"x": rows(4)}])}, 5),
        ]
    )
    assert equal(answered("backward", sent, way).parts, sent.parts)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("partition_id", [None, 0, 2**40])
@pytest.mark.parametrize("labels", [None, [], [0, 3, 7]])
def test_descriptions_come_out_as_they_went_in(labels, partition_id, way):
    labels = None if labels is None else np.array(labels, dtype=np.int64)
    counts = None if labels is None else labels * 2
    unreadable = {3: "not a picture", 10**6: "empty"}
    described = Description(
        partition_id, 12, 4, labels, counts, left_out=unreadable, method="parallel", model="head: stem"
    )
    if counts is not None:
        described = replace(described, classes=ClassNumbers({"cat": 0, "owl": 1}).digests())
    received = answered("describe", Reply(descriptions={BIG: described, 7: described}), way)
    assert equal(received.descriptions, {BIG: described, 7: described})
    assert received.failures.keys() == {4}


@pytest.mark.parametrize("kind", FailureKind)
def test_failures_come_out_as_they_went_in(kind):
    failure = Failure(kind, "it cannot", rows={3: "not a picture", 10**6: "empty"}, labels={3: 7})
    received = answered("forward", Reply(failures={7: failure}, parts=[forward_part((BIG, 4), 5)]))
    assert received.failures == {7: failure}


def test_long_texts_are_cut():
    received = answered("forward", Reply(failures={7: Failure(FailureKind.RAISED, "x" * 10**5, {1: "y" * 10**5})}))
    assert (len(received.failures[7].detail), len(received.failures[7].rows[1])) == (2000, 2000)


def test_nodes_that_a_reply_leaves_out_have_failed():
    received = answered("backward", Reply(failures={99: Failure(FailureKind.RAISED, "who?")}, parts=[Part((7,), {})]))
    assert [part.nodes for part in received.parts] == [(7,)]
    assert received.failures.keys() == {BIG, 4}
    assert {failure.kind for failure in received.failures.values()} == {FailureKind.MALFORMED}
    assert "no reply" in received.failures[4].detail


def test_a_node_cannot_both_have_answered_and_have_failed():
    received = answered(
        "forward", Reply(failures={7: Failure(FailureKind.RAISED, "no")}, parts=[forward_part((7,), 1)])
    )
    assert 7 not in received.failures


def test_descriptions_are_for_those_who_ask():
    received = answered("forward", Reply(descriptions={7: Description(0, 1, 1)}))
    assert received.descriptions == {}
    assert received.failures.keys() == set(NODES)


def test_rows_may_travel_in_fewer_bits_and_what_is_exact_does_not():
    x, y = torch.randn(6, 50), torch.randn(6)
    part = Part(NODES, {"activations": Leaf(Kind.ROWS, x), "targets": Leaf(Kind.ROWS, y, exact=True)}, 5)
    (received,) = answered("forward", Reply([part]), wire_dtype="bfloat16").parts
    assert torch.equal(received.outputs["targets"].value, y)
    found = received.outputs["activations"].value
    assert not torch.equal(found, x)
    assert torch.allclose(found, x, rtol=2**-8)
    (received,) = answered(
        "backward", Reply([Part(NODES, {"head": Leaf(Kind.SUM, {"w": x})})]), wire_dtype="int8"
    ).parts
    assert torch.equal(received.outputs["head"].value["w"], x)


# --- refusals --------------------------------------------------------------------------------------------------------
def header_of(name):
    """Return a request's header as JSON has it, to be changed, and its buffers."""
    frame = by_stream(encode_request(REQUESTS[name], 0, sent={})[0])
    return frame.header, frame.buffers


def put(*path):
    """Return a change of a header: the last of `path` is the new value of what the others lead to."""
    *keys, last, value = path

    def change(header):
        for key in keys:
            header = header[key]
        header[last] = value

    return change


def drop(*path):
    *keys, last = path

    def change(header):
        for key in keys:
            header = header[key]
        del header[last]

    return change


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("describe", drop("stage"), "expected 'stage' to be of type str, got None"),
        ("describe", drop("config"), "expected 'config' to be of type dict"),
        ("describe", put("config", "a", None), "not a configuration value: None"),
        ("describe", put("config", "a", {"bytes": "!"}), "not a configuration value"),
        ("describe", put("label-counts", 1), "'label-counts' to be of type bool, got 1"),
        ("describe", put("nodes", []), "expected nodes, each once"),
        ("describe", put("nodes", [1, 1]), "expected nodes, each once"),
        ("describe", put("nodes", [2**64]), "expected 'nodes' to be a list of integers"),
        ("describe", put("number", True), "expected 'number' to be of type int, got True"),
        ("describe", put("number", 2**63), "expected 'number' to be of type int"),
        ("forward", put("orders", None), "stage 'forward' needs orders"),
        ("forward", put("orders", []), "expected 'orders' to be of type dict"),
        ("forward", drop("orders", "counts"), "expected the description of a tensor, got None"),
        ("forward", put("orders", "seed", -1), "orders must not hold negative numbers"),
        ("forward", put("orders", "step", 2.0), "expected 'step' to be of type int, got 2.0"),
        ("forward", put("orders", "test", 0), "expected 'test' to be of type bool, got 0"),
        ("forward", put("orders", "left-out", {"x": [1]}), "expected a number, got 'x'"),
        ("forward", put("orders", "left-out", {"1": ["a"]}), "list of integers"),
        ("forward", put("orders", "put-off", {"0": [[0, 1]]}), "expected class, start and count of examples"),
        ("forward", put("orders", "put-off", {"0": 3}), "expected class, start and count of examples"),
        ("forward", put("orders", "put-off", {"0": [[-2, 1, 1]]}), "expected class, start and count of examples"),
        ("masked", put("cohort", []), "expected 'cohort' to be of type dict"),
        ("masked", drop("cohort", "keys"), "expected the description of a tensor, got None"),
        ("masked", put("cohort", "attempt", -1), "of a cohort are out of range"),
        ("masked", put("cohort", "degree", 4), "of a cohort are out of range"),
        ("masked", put("cohort", "places", {"head": 1001}), "of a cohort are out of range"),
        ("masked", put("cohort", "max-norm", 0.0), "of a cohort are out of range"),
        ("masked", put("cohort", "max-norm", "1"), "expected 'max-norm' to be of type float, got '1'"),
        ("masked", put("cohort", "places", {"head": 1.0}), "expected 'head' to be of type int, got 1.0"),
        ("masked", put("session", 5), "expected 'session' to be of type str, got 5"),
        ("by class", drop("orders", "class_starts"), "must name the same classes"),
        ("forward", put("delays", [1.0]), "expected 3 delays, got 1"),
        ("forward", put("delays", [-1.0, 0, 0]), "expected seconds, finite and not negative, got -1.0"),
        ("forward", put("delays", [True, 0, 0]), "expected seconds, finite and not negative, got True"),
        ("forward", drop("weights", "head", "version"), "expected 'version' to be of type str, got None"),
        ("forward", put("weights", "head", 5), "expected the weights of 'head'"),
        ("forward", drop("weights", "head", "parameters"), "weights 'v1' of 'head' were not sent"),
        ("forward", put("weights", "head", "parameters", None), "expected the parameters of 'head' by name"),
        ("forward", put("weights", {str(i): {} for i in range(65)}), "expected at most 64 entries, got 65"),
        ("backward", put("inputs", "gradient", None), "expected the description of 'gradient'"),
        ("backward", put("inputs", "gradient", "kind", "columns"), "'gradient' is of no known kind: 'columns'"),
        ("backward", put("inputs", "gradient", "kind", ["rows"]), "'gradient' is of no known kind"),
        ("each and shared", put("inputs", "all", "kind", "each"), "expected one entry for each of 3 clients"),
        ("each and shared", put("inputs", "all", "kind", "rows"), "rows, got shape"),
    ],
)
def test_malformed_requests_are_refused(name, change, message):
    header, buffers = header_of(name)
    change(header)
    with pytest.raises(ProtocolError, match=message):
        decode_request(Frame(header, buffers), WeightStore())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"counts": np.array([2, 0, 3])}, "count at least one example"),
        ({"starts": np.array([0, -1, 3])}, "must not hold negative numbers"),
        ({"counts": np.array([2, 3])}, r"expected a column torch.int64 \(3,\), got torch.int64 \(2,\)"),
        ({"counts": np.array([2.0, 3.0, 1.0])}, "got torch.float64"),
        ({"class_starts": np.zeros((3, 2), int)}, "must name the same classes"),
        ({"class_starts": np.zeros((3, 2), int), "class_counts": np.zeros((3, 4), int)}, "must name the same classes"),
        ({"checksums": np.zeros(2, int)}, r"expected a column torch.int64 \(3,\)"),
    ],
)
def test_orders_that_cannot_be_are_refused(changes, message):
    wrong = Orders(**{**vars(orders()), **changes})
    request = Request(stage="forward", nodes=NODES, orders=wrong)
    with pytest.raises(ProtocolError, match=message):
        decode_request(by_stream(encode_request(request, 0, sent={})[0]), WeightStore())


X = torch.zeros(2, 3)


def of(nodes, value, kind=Kind.ROWS):
    return Part(nodes, {"x": Leaf(kind, value)}, 5)


@pytest.mark.parametrize(
    ("parts", "kind", "message"),
    [
        ([of((BIG,), X), of((BIG,), X)], FailureKind.MALFORMED, "nodes that were asked, each once"),
        ([of((BIG, BIG), X)], FailureKind.MALFORMED, "each once"),
        ([of((5,), X)], FailureKind.MALFORMED, "nodes that were asked"),
        ([of((), X)], FailureKind.MALFORMED, "expected nodes"),
        ([of((BIG,), [X, X], Kind.EACH)], FailureKind.MALFORMED, "one entry for each of 1 clients"),
        ([of((n,), None) for n in (BIG, 7, 4, 4)], FailureKind.MALFORMED, "at most 3 entries, got 4"),
        ([Part((7,), {}, 5, np.zeros(2, int))], FailureKind.MALFORMED, r"expected a column torch.int64 \(1,\)"),
    ],
)
def test_replies_that_do_not_fit_the_question(parts, kind, message):
    with pytest.raises(ProtocolError, match=message) as caught:
        answered("forward", Reply(parts))
    assert caught.value.kind is kind


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (of((BIG, 7), X), "x: expected 3 rows, got shape: (2, 3)"),
        (of((BIG,), (X, torch.zeros(3))), "x[1]: expected 2 rows, got shape: (3,)"),
        (of((BIG,), {"a": torch.tensor(1.0)}), "x['a']: expected 2 rows, got shape: ()"),
    ],
)
def test_rows_that_do_not_add_up_cost_that_part_only(part, message):
    other = of((4,), torch.zeros(3, 3))
    reply = answered("forward", Reply([part, other]))
    assert [each.nodes for each in reply.parts] == [(4,)]
    for node in part.nodes:
        assert reply.failures[node].kind is FailureKind.SHAPE
        assert reply.failures[node].detail == f"bad reply: {message}"
        assert reply.failures[node].joint == (len(part.nodes) > 1)


@pytest.mark.parametrize("seconds", [-1.0, float("nan"), float("inf")])
def test_nonsense_seconds_are_refused(seconds):
    with pytest.raises(ProtocolError, match="expected seconds, finite and not negative"):
        answered("forward", Reply(seconds={7: seconds}))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("forward", drop("parts"), "expected 'parts' to be of type list"),
        ("forward", drop("failures"), "expected 'failures' to be of type dict"),
        ("forward", drop("seconds"), "expected the description of a tensor"),
        ("forward", put("parts", 0, 5), "expected the description of a part, got 5"),
        ("forward", put("parts", 0, "step", "5"), "expected 'step' to be of type int, got '5'"),
        ("forward", put("parts", 0, "step", True), "expected 'step' to be of type int, got True"),
        ("forward", put("failures", "7", "no"), "expected a failure, got 'no'"),
        ("forward", put("failures", "7", {"kind": "boredom"}), "expected a failure of a known kind, got 'boredom'"),
        ("forward", put("failures", "x", {"kind": "timeout"}), "expected a number, got 'x'"),
        ("describe", drop("descriptions"), "expected 'descriptions' to be of type dict"),
        ("describe", put("descriptions", "7", 3), "expected a description, got 3"),
        ("describe", drop("descriptions", "7", "num-test-examples"), "expected 'num-test-examples' .* got None"),
        ("describe", put("descriptions", "7", "num-examples", 3.0), "expected 'num-examples' .* int, got 3.0"),
        ("describe", put("descriptions", "7", "labels", [1.5]), "expected 'labels' to be a list of integers"),
        ("describe", put("descriptions", "7", "labels", [2**63]), "expected 'labels' to be a list of integers"),
    ],
)
def test_malformed_replies_are_refused(name, change, message):
    described = {7: Description(0, 3, 0, np.array([0]), np.array([3]))} if name == "describe" else {}
    reply = Reply(parts=[] if described else [forward_part((7,), 1)], descriptions=described)
    frame = by_stream(encode_reply(0, reply, REQUESTS[name]))
    change(frame.header)
    with pytest.raises(ProtocolError, match=message):
        decode_reply(frame, REQUESTS[name])


# --- records ---------------------------------------------------------------------------------------------------------
def content(data=b"", name="frame", stype=FRAME):
    return {"frame": ArrayRecord({name: Array("uint8", (len(data),), stype, data)})}


WHOLE = join(Frame({}, [[memoryview(b"x")]]))


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ({}, "expected a frame, got records named nothing"),
        ({"other": ConfigRecord()}, "got records named other"),
        ({"frame": ConfigRecord({"header": b"{}"}), "buffers": ArrayRecord()}, "got records named frame, buffers"),
        ({"frame": ArrayRecord()}, "expected a frame in one array of the type 'psl_flower.frame'"),
        (content(WHOLE, name="0"), "expected a frame in one array"),
        (content(WHOLE, stype="psl_flower.raw"), "expected a frame in one array"),
        (content(), "at least 16 bytes long, got 0"),
        (content(WHOLE[:20]), "a frame of 64 bytes is too long, the most is 20"),
        (content(WHOLE[:-1]), "lacks 1 bytes of its payload"),
        (content(WHOLE + b"x"), "or more"),
    ],
)
def test_records_that_hold_no_frame_are_refused(records, message):
    with pytest.raises(ProtocolError, match=message):
        content_to_frame(RecordDict(records))


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"{", "the header is not JSON"),
        (b"\xff", "the header is not JSON"),
        (b"[" * 10**5, "the header is not JSON"),
        (b"[[],{},NaN]", "the header is not JSON: NaN is not JSON"),
        (b"[]", "the header must be a pair"),
        (b"[[1],{}]", "do not make a payload"),
    ],
)
def test_headers_that_say_nothing_are_refused(header, message):
    data = struct.pack("<I4xQ", len(header), 0) + header
    with pytest.raises(ProtocolError, match=message):
        content_to_frame(RecordDict(content(data)))


# --- mutations -------------------------------------------------------------------------------------------------------
scalars = st.one_of(
    st.integers(-(2**63), 2**64 - 1), st.floats(), st.booleans(), st.text(max_size=5), st.binary(max_size=5)
)
values = st.one_of(
    scalars,
    st.lists(st.integers(-(2**63), 2**64 - 1), max_size=4),
    st.lists(st.text(max_size=3), max_size=4),
    st.lists(st.floats(), max_size=4),
    st.sampled_from([b"{}", b"[]", b"null", b'{"nodes": [1]}']),
)
arrays = st.builds(
    Array,
    st.sampled_from(["float32", "uint8", ""]),
    st.lists(st.one_of(st.integers(-1, 4), st.integers(-(2**63), 2**64)), max_size=4).map(tuple),
    st.sampled_from([FRAME, "numpy.ndarray", ""]),
    st.one_of(st.binary(max_size=64), st.sampled_from([WHOLE, WHOLE[:-1]])),
)
SAMPLES = {name: frame_to_content(encode_request(request, 0, sent={})[0]) for name, request in REQUESTS.items()}
ANSWERS = {
    "describe": Reply(descriptions=dict.fromkeys(NODES, Description(1, 4, 2, np.array([0, 1]), np.array([2, 2])))),
    "forward": Reply([forward_part(NODES, 6)]),
    "evaluate": Reply([forward_part((BIG, 4), 5)], {7: Failure(FailureKind.UNREADABLE, "no", {1: "x"}, {1: 2})}),
    "backward": Reply([Part(NODES, {"head": Leaf(Kind.SUM, {"a": X, "b": None})}, 5)]),
}
REPLIES = {name: frame_to_content(encode_reply(0, reply, REQUESTS[name])) for name, reply in ANSWERS.items()}


def mutate(data, content):
    """Change, add or drop a few records, fields, arrays and bytes, in ways Flower's own records allow."""
    content = copy.deepcopy(content)
    for _ in range(data.draw(st.integers(1, 3))):
        names = list(content)
        if not names:
            break
        name = data.draw(st.sampled_from(names))
        record = content[name]
        action = data.draw(st.sampled_from(["drop record", "rename record", "drop", "set", "add", "damage"]))
        if action == "drop record":
            del content[name]
        elif action == "rename record":
            del content[name]
            content[data.draw(st.sampled_from([*names, "other"]))] = record
        elif action == "drop":
            if record:
                del record[data.draw(st.sampled_from(list(record)))]
        elif action == "damage" and isinstance(record, ArrayRecord) and record:
            array = record[next(iter(record))]
            raw = bytearray(array.data or b"x")
            raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
            record[next(iter(record))] = Array(array.dtype, array.shape, array.stype, bytes(raw))
        else:
            fields = list(record) if action == "set" and record else ["frame", "0", "header"]
            value = data.draw(arrays if isinstance(record, ArrayRecord) else values)
            record[data.draw(st.sampled_from(fields))] = value
    return content


@settings(max_examples=300)
@given(st.data())
def test_mutated_requests_raise_nothing_but_protocol_errors(data):
    content = SAMPLES[data.draw(st.sampled_from(sorted(SAMPLES)))]
    with contextlib.suppress(ProtocolError):
        decode_request(content_to_frame(mutate(data, content)), WeightStore())


@settings(max_examples=300)
@given(st.data())
def test_mutated_replies_raise_nothing_but_protocol_errors(data):
    name = data.draw(st.sampled_from(sorted(REPLIES)))
    with contextlib.suppress(ProtocolError):
        reply = decode_reply(content_to_frame(mutate(data, REPLIES[name])), REQUESTS[name])
        assert reply.answered() >= set(NODES)
        for description in reply.descriptions.values():
            description.check(label_counts=True)
