"""Every bound on what comes from the wire, from both sides: at most so much is let in, one more is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_stream_fuzz import BY_CLASS, REPLIES, REQUESTS, orders

from psl_flower.errors import ProtocolError
from psl_flower.exchange import limits
from psl_flower.exchange.codec import WeightStore, decode_reply, decode_request, encode_reply, encode_request
from psl_flower.exchange.frames import _LENGTHS, _PREFIX, Decoder, Frame, encode, parse_header
from psl_flower.exchange.limits import LIMITS
from psl_flower.exchange.streams.connection import Connection
from psl_flower.exchange.tensors import Unpacker
from psl_flower.protocol import Description


def request(name="forward", **changes):
    """Decode a request whose header has other values."""
    frame, _ = encode_request(REQUESTS[name], 9, sent={})
    header = {**json.loads(json.dumps(frame.header)), **changes}
    return decode_request(Frame(header, frame.buffers), WeightStore())


def described(**changes):
    """Decode and check a description with other values."""
    asked = REQUESTS["describe"]
    frame = encode_reply(9, REPLIES["describe"], asked)
    header = json.loads(json.dumps(frame.header))
    header["descriptions"] = {str(node): {**header["descriptions"][str(node)], **changes} for node in asked.nodes}
    return decode_reply(Frame(header, frame.buffers), asked)


def failed(**changes):
    """Decode a reply with a failure that has other values."""
    asked = REQUESTS["evaluate"]
    frame = encode_reply(9, REPLIES["evaluate"], asked)
    header = json.loads(json.dumps(frame.header))
    header["failures"] = {node: {**each, **changes} for node, each in header["failures"].items()}
    return decode_reply(Frame(header, frame.buffers), asked)


def first_chunk(header_bytes, payload):
    lengths = [payload] if payload else []
    text = json.dumps([lengths, {}]).encode().ljust(header_bytes)
    return _PREFIX.pack(b"PSLF", 1, 0, 0) + _LENGTHS.pack(len(text), payload) + text


def unpack(spec, buffers=()):
    return Unpacker([[memoryview(b)] for b in buffers]).unpack(spec)


def nested(depth):
    tree = None
    for _ in range(depth):
        tree = [tree]
    return tree


def of_classes(number):
    table = np.zeros((2, number), dtype=np.int64)
    table[:, 0] = BY_CLASS["class_counts"].sum(axis=1)
    made = REQUESTS["forward"]
    asked = type(made)(
        stage="forward", nodes=made.nodes, orders=orders(class_starts=np.zeros_like(table), class_counts=table)
    )
    frame, _ = encode_request(asked, 9, sent={})
    return decode_request(Frame(json.loads(json.dumps(frame.header)), frame.buffers), WeightStore())


def empty_part(name="p"):
    nothing = {"keys": [], "values": []}
    return {"version": name, "constants-version": name, "parameters": nothing, "constants": nothing}


def left_out(number):
    head = encode_request(REQUESTS["forward"], 9, sent={})[0].header["orders"]
    return request(orders=json.loads(json.dumps({**head, "left-out": {"0": [0] * number}})))


def unasked(number):
    """Decode a header that comes from a client which was not asked, as the server's endpoint does."""
    connection, decoder = Connection("client"), Decoder()
    assert not connection.is_asked
    decoder.max_header = limits.MAX_UNASKED_HEADER
    return decoder.feed(first_chunk(number, 0))


# what has so many of what a limit is of; it decodes it, or raises
TRIALS = {
    "header": lambda n: Decoder().feed(first_chunk(n, 0)),
    "header of what was not asked for": unasked,
    "lists and objects": lambda n: parse_header(b"[" + b"[]," * (n - 2) + b"[]]"),
    "frame": lambda n: Decoder().feed(first_chunk(64, n)),
    "buffers": lambda n: Decoder().feed(next(encode(Frame({}, [[memoryview(b"")]] * n), 0))),
    "tensors": lambda n: unpack([None] * (n - 1)),
    "nesting": lambda n: unpack(nested(n)),
    "dimensions": lambda n: unpack({"dtype": "uint8", "shape": [1] * n}, [b"x"]),
    "elements": lambda n: unpack({"dtype": "uint8", "shape": [0, n]}, [b""]),
    "packed elements": lambda n: unpack({"dtype": "float32", "shape": [n], "packed": "sparse", "entries": 0}),
    "name": lambda n: unpack({"keys": ["x" * n], "values": [None]}),
    "parts": lambda n: request("evaluate", weights={f"p{i}": empty_part() for i in range(n)}),
    "leaves": lambda n: request(inputs={f"x{i}": {"kind": "shared", "tree": None} for i in range(n)}),
    "text": lambda n: request(session="x" * n),
    "model": lambda n: described(model="x" * n),
    "list of integers": left_out,
    "configuration": lambda n: request(config={str(i): i for i in range(n)}),
    "unreadable rows": lambda n: failed(rows={str(i): "" for i in range(n)}, labels={}),
    "waiting": lambda n: request(delays=[n, 0.0]),
    "examples": lambda n: Description(0, n, n).check(label_counts=False),
    "classes": of_classes,
    "names of classes": lambda n: described(classes={"numbers": {str(i): i for i in range(n)}, "sure": True}),
}


def test_every_limit_is_tried():
    assert set(TRIALS) == {limit.of for limit in LIMITS}
    assert len(LIMITS) == len(TRIALS)


@pytest.mark.parametrize("limit", LIMITS, ids=lambda limit: limit.of)
def test_at_most_so_much_is_let_in_and_one_more_is_refused(limit):
    lets_in(limit, limit.most)
    with pytest.raises(ProtocolError):
        TRIALS[limit.of](limit.most + 1)


def lets_in(limit, number):
    said = ""
    try:
        TRIALS[limit.of](number)
    except ProtocolError as error:  # another rule's: the trial is no whole request
        said = str(error)
    assert not said or "than its header describes" in said or "do not make a payload" in said, said


SMALL = [limit for limit in LIMITS if limit.most <= 100_000 or limit.of in ("elements", "examples", "frame")]


@settings(max_examples=60)
@given(st.sampled_from(SMALL), st.floats(0, 1), st.integers(1, 10**4))
def test_the_bound_is_where_it_is_said_to_be(limit, share, beyond):
    """Anything up to it is let in, anything beyond is refused."""
    lets_in(limit, max(2, int(share * limit.most)))
    with pytest.raises(ProtocolError):
        TRIALS[limit.of](limit.most + beyond)


def test_the_documents_table_is_made_of_the_limits():
    text = (Path(__file__).parents[2] / "docs" / "security.md").read_text(encoding="utf-8")
    assert limits.table() in text


def test_a_claim_of_much_takes_no_memory():
    before, decoder = pages(), Decoder()
    assert decoder.feed(first_chunk(64, limits.MAX_FRAME_BYTES)) is None
    assert (pages() - before) * 4096 < 2**26


def pages():
    return int(Path("/proc/self/statm").read_text().split()[1])
