"""Who may open a stream and what may come over it; whatever else knocks is refused, and the run goes on."""

import itertools
import logging
import socket
import threading
import time
from contextlib import contextmanager

import grpc
import pytest
from flwr.app import ConfigRecord
from flwr.clientapp import ClientApp
from support import CUT, load_partition, tiny_resnet

from psl_flower import InProcessGrid, split_client_app
from psl_flower.client import stream
from psl_flower.client.stream import StreamError, _connect
from psl_flower.errors import ConfigError, ProtocolError
from psl_flower.exchange.frames import CHUNK_BYTES, MAX_CHUNK_BYTES, Decoder, Frame, encode
from psl_flower.exchange.messages import MessageCarrier
from psl_flower.exchange.shared_memory import whereabouts
from psl_flower.exchange.streams import StreamCarrier, StreamOptions, endpoint
from psl_flower.exchange.streams.endpoint import METHOD
from psl_flower.exchange.streams.security import Ticket, Tokens, make_identity
from psl_flower.exchange.transport import AutoCarrier, open_carrier
from psl_flower.failures import Kind
from psl_flower.protocol import DESCRIBE, Request

NODES = (2, 3)
ASK = Request(stage=DESCRIBE, nodes=NODES)
STRANGER = 99


@pytest.fixture
def app():
    return split_client_app(tiny_resnet, cut=CUT, data_fn=load_partition)


@pytest.fixture
def carrier(app):
    with StreamCarrier(InProcessGrid(app, num_nodes=2), StreamOptions(max_frame_bytes=2**22)) as carrier:
        works(carrier)
        yield carrier
        works(carrier)  # after whatever the test did


def works(carrier):
    reply = carrier.exchange(ASK, 120)
    assert reply.descriptions.keys() == set(NODES), reply.failures


def ticket(carrier, **changes):
    fields = {
        "address": carrier.address,
        "certificate": carrier._endpoint.certificate,
        "session": carrier._tokens.session,
        "token": "",
    }
    return Ticket(**(fields | changes))


def open_stream(carrier, metadata, chunks=(), num_frames=None, done=None):
    """Open a stream and send chunks; return how it ended, and the frames that came.

    It stays open until the server ends it, so many frames have come, or somebody else has it `done`.
    """
    done, patience = done or threading.Event(), 120

    def requests():
        yield from chunks
        done.wait(patience)

    frames, decoder = [], Decoder()
    with _connect(ticket(carrier)) as channel:
        call = channel.stream_stream(METHOD)(requests(), metadata=metadata, timeout=patience)
        try:
            for chunk in call:
                frames.append(decoder.feed(chunk))
                if len(frames) == num_frames:
                    break
            return grpc.StatusCode.OK, "", frames
        except grpc.RpcError as error:
            return error.code(), error.details(), frames
        finally:
            done.set()


@contextmanager
def opened(carrier, chunks=()):
    """Keep a stranger's stream open, over which chunks are sent."""
    done = threading.Event()
    opener = threading.Thread(target=open_stream, args=(carrier, good_metadata(carrier), chunks, None, done))
    opener.start()
    try:
        yield
    finally:
        done.set()
        opener.join()


def metadata(session, node, token):
    return (("psl-session", session), ("psl-node", str(node)), ("psl-token", token))


def good_metadata(carrier):
    return metadata(carrier._tokens.session, STRANGER, carrier._tokens.issue(STRANGER))


# --- opening ---------------------------------------------------------------------------------------------------------
def test_a_stream_without_the_right_token_is_refused(carrier, caplog):
    session = carrier._tokens.session
    token, other = carrier._tokens.issue(STRANGER), carrier._tokens.issue(STRANGER + 1)
    cases = [
        ((), "showed no token"),
        (metadata(session, STRANGER, "x" * len(token)), "wrong token"),
        (metadata(session, STRANGER, other), "wrong token"),
        (metadata("0123456789abcdef", STRANGER, token), "not this run's"),
        (metadata(session, 12345, token), "no token was given to it"),
        (metadata(session, NODES[0], token), "used before"),
        (metadata(session, "one", token), "not a number"),
    ]
    for sent, why in cases:
        caplog.clear()
        # a chunk that would break the stream if it were read
        code, details, frames = open_stream(carrier, sent, [b"garbage"])
        assert (code, frames) == (grpc.StatusCode.UNAUTHENTICATED, [])
        assert why in details
        assert "Refused a stream from" in caplog.text
        assert why in caplog.text
        assert token not in caplog.text


def test_plain_text_is_refused(carrier):
    with grpc.insecure_channel(carrier.address) as channel:
        call = channel.stream_stream(METHOD)(iter([b"hello"]), metadata=good_metadata(carrier), timeout=5)
        with pytest.raises(grpc.RpcError) as error:
            next(call)
    assert error.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


def test_a_server_without_the_tickets_certificate_is_not_talked_to(carrier, monkeypatch):
    monkeypatch.setattr(stream, "CONNECT_SECONDS", 1.0)
    with pytest.raises(StreamError, match="cannot connect to"):
        _connect(ticket(carrier, certificate=make_identity().certificate))


def test_nobody_there(carrier, monkeypatch):
    monkeypatch.setattr(stream, "CONNECT_SECONDS", 1.0)
    with pytest.raises(StreamError, match="is it reachable"):
        _connect(ticket(carrier, address="127.0.0.1:1"))


def test_refusals_do_not_fill_the_log(carrier, caplog):
    with _connect(ticket(carrier)) as channel:
        for _ in range(60):
            with pytest.raises(grpc.RpcError):
                next(channel.stream_stream(METHOD)(iter(()), timeout=5))
    assert 0 < caplog.text.count("Refused a stream") <= 20


# --- what comes over it ----------------------------------------------------------------------------------------------
GOOD = list(encode(Frame({"kind": "reply", "number": -1}, [[memoryview(bytes(3 * CHUNK_BYTES))]]), 0))


@pytest.mark.parametrize(
    ("chunks", "code", "why"),
    [
        ([b"GET / HTTP/1.1\r\n\r\n"], "INVALID_ARGUMENT", "not a frame"),
        ([b""], "INVALID_ARGUMENT", "at least 16 bytes"),
        ([GOOD[1]], "INVALID_ARGUMENT", "out of order"),
        ([GOOD[0], GOOD[2]], "INVALID_ARGUMENT", "out of order"),
        ([GOOD[0], GOOD[0]], "INVALID_ARGUMENT", "out of order"),
        ([GOOD[0][:-100] + b"x" * 9_000_000], "INVALID_ARGUMENT", "or more"),
        ([bytes(MAX_CHUNK_BYTES + 1)], "RESOURCE_EXHAUSTED", "larger than max"),
        (list(encode(Frame({}, [[memoryview(bytes(2**23))]]), 0)), "INVALID_ARGUMENT", "the most is 4194304"),
        (list(encode(Frame({"kind": "join", "node": "x"}), 0)), "INVALID_ARGUMENT", "a join needs"),
        (list(encode(Frame({"kind": "reply", "x": "y" * 2**17}), 0)), "INVALID_ARGUMENT", "the most is 65536"),
    ],
    ids=["http", "empty", "middle", "gap", "twice", "too much", "long chunk", "long frame", "bad join", "unasked"],
)
def test_what_is_not_a_frame_ends_the_stream(carrier, chunks, code, why, caplog):
    found, details, _ = open_stream(carrier, good_metadata(carrier), chunks)
    assert (found.name, why in details) == (code, True), details
    if code == "INVALID_ARGUMENT":
        assert "Refused a stream" in caplog.text


@pytest.mark.parametrize("header", [{}, {"kind": "request"}, {"kind": ["x"]}, {"kind": "adopt", "clients": [2]}])
def test_frames_that_only_the_server_sends_end_the_stream(carrier, header):
    code, why, _ = open_stream(carrier, good_metadata(carrier), list(encode(Frame(header), 0)))
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert "joins and replies" in why


def test_a_reply_to_anothers_question_is_not_taken(carrier):
    """A client that guesses numbers must not answer for others."""
    replies = [
        list(encode(Frame({"kind": "reply", "number": n, "parts": [], "failures": {}, "seconds": {}}), i))
        for i, n in enumerate(range(1, 50))
    ]
    with opened(carrier, itertools.chain.from_iterable(replies)):
        for _ in range(50):
            works(carrier)


def test_a_silent_stream_stalls_nothing(carrier):
    with opened(carrier):
        for _ in range(20):
            works(carrier)


def test_joining_needs_a_token_of_ones_own_and_only_once(carrier):
    issue, session = carrier._tokens.issue, carrier._tokens.session
    mine, others = issue(STRANGER), issue(STRANGER + 1)
    sent = [(STRANGER + 1, mine), (STRANGER, mine), (STRANGER, mine), (STRANGER + 1, others)]
    chunks = [
        next(encode(Frame({"kind": "join", "session": session, "node": n, "token": t, "node-config": {}}), i))
        for i, (n, t) in enumerate(sent)
    ]
    _, _, frames = open_stream(carrier, metadata(session, STRANGER, mine), chunks, num_frames=4)
    found = [(frame.header["kind"], frame.header["node"]) for frame in frames]
    assert found == [("refused", STRANGER + 1), ("joined", STRANGER), ("refused", STRANGER), ("joined", STRANGER + 1)]


def test_tokens_of_a_new_ticket_replace_the_old_ones():
    tokens = Tokens()
    old, new = tokens.issue(1), tokens.issue(1)
    assert old != new
    assert "wrong token" in tokens.refusal(tokens.session, 1, old)
    assert tokens.refusal(tokens.session, 1, new) is None
    assert tokens.refusal(tokens.session, 1, new, use=True) is None
    assert "used before" in tokens.refusal(tokens.session, 1, new)
    assert Tokens().session != tokens.session


def test_tickets_travel_in_records_and_do_not_show_their_token():
    sent = Ticket("host:1", b"PEM", "session", "secret-token")
    assert Ticket.decode(sent.encode()) == sent
    assert "secret-token" not in repr(sent)
    for broken in (ConfigRecord(), ConfigRecord({**sent.encode(), "token": 5})):
        with pytest.raises(ProtocolError, match="an attach message needs"):
            Ticket.decode(broken)


# --- what members may not do -----------------------------------------------------------------------------------------
def test_replies_that_nobody_asked_for_close_the_stream(carrier):
    reply = Frame({"kind": "reply", "number": 10**9, "parts": [], "failures": {}, "descriptions": {}, "seconds": None})
    chunks = (next(encode(reply, number)) for number in range(1000))
    code, details, _ = open_stream(carrier, good_metadata(carrier), chunks)
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert "replies that nobody asked for" in details


def test_a_deployments_client_does_not_answer_for_others():
    """Only processes of the simulation take clients over, all of them of one user."""
    client = object.__new__(stream.StreamClient)
    client._resident = False
    with pytest.raises(ProtocolError, match="clients are taken over in Flower's simulation only"):
        client._handle(Frame({"kind": "adopt", "clients": [[5, {"partition-id": 0}]]}))


def test_connections_without_a_stream_neither_use_up_the_files_nor_stay(carrier):
    host, port = carrier.address.rsplit(":", 1)
    knocking = [socket.create_connection((host, int(port))) for _ in range(300)]
    try:
        works(carrier)
        for each in knocking:  # closed by the server, after the time for a handshake
            each.settimeout(60)
            assert each.recv(1) == b""
    finally:
        for each in knocking:
            each.close()


# --- choosing a carrier ----------------------------------------------------------------------------------------------
def test_a_port_in_use_is_a_configuration_error(carrier, app):
    with pytest.raises(ConfigError, match="streams cannot listen on"):
        StreamCarrier(InProcessGrid(app), StreamOptions(bind=carrier.address))


def test_auto_uses_streams(app, caplog):
    with AutoCarrier(InProcessGrid(app, num_nodes=2)) as carrier, caplog.at_level(logging.INFO):
        works(carrier)
    assert "2 clients are connected by 1 stream to" in caplog.text


def test_auto_falls_back_to_messages_and_says_why_where_clients_cannot_attach(app, caplog):
    old = ClientApp()  # of an earlier release, without the handler

    @old.query("describe")
    def describe(message, context):
        return app(message, context)

    with AutoCarrier(InProcessGrid(old, num_nodes=2)) as carrier:
        works(carrier)
        works(carrier)
    assert caplog.text.count("messages instead of streams") == 1
    assert "2 of 2 clients failed so" in caplog.text
    assert "train.attach" in caplog.text or "attach" in caplog.text


def test_auto_keeps_the_streams_of_the_others_where_one_comes_later_and_cannot_attach(app, caplog):
    class Late(InProcessGrid):
        def push_messages(self, messages):
            return super().push_messages(
                [m for m in messages if (m.metadata.message_type, m.metadata.dst_node_id) != LATE]
            )

    grid = Late(app, num_nodes=3)
    LATE = ("train.attach", 4)
    with AutoCarrier(grid) as carrier:
        works(carrier)
        reply = carrier.exchange(Request(stage=DESCRIBE, nodes=(*NODES, 4)), 20)
        assert reply.descriptions.keys() == set(NODES)
        assert reply.failures[4].kind is Kind.UNREACHABLE
        assert isinstance(carrier._carrier, StreamCarrier)
    assert "messages instead of streams" not in caplog.text


def test_auto_falls_back_where_the_address_leads_nowhere(app, caplog, monkeypatch):
    monkeypatch.setattr(stream, "CONNECT_SECONDS", 0.5)
    with AutoCarrier(InProcessGrid(app, num_nodes=2), StreamOptions(advertise="127.0.0.1:1")) as carrier:
        works(carrier)
    assert "cannot connect to 127.0.0.1:1" in caplog.text


def test_auto_falls_back_where_it_cannot_listen(carrier, app, caplog):
    with AutoCarrier(InProcessGrid(app, num_nodes=2), StreamOptions(bind=carrier.address)) as other:
        works(other)
    assert "streams cannot listen on" in caplog.text


def test_within_one_process_auto_means_messages(app):
    grid = InProcessGrid(app)
    assert isinstance(open_carrier(grid), MessageCarrier)
    assert isinstance(open_carrier(grid, "messages"), MessageCarrier)
    with open_carrier(grid, "streams") as carrier:
        assert isinstance(carrier, StreamCarrier)
    with pytest.raises(ConfigError, match="did you mean 'streams'"):
        open_carrier(grid, "stream")


def test_closing_ends_the_clients_threads(app):
    def residents():
        return [t for t in threading.enumerate() if t.name.startswith("psl-")]

    before = len(residents())
    with StreamCarrier(InProcessGrid(app, num_nodes=2)) as carrier:
        works(carrier)
        assert any(t.name == "psl-resident" for t in residents())
    end = time.monotonic() + 120
    while len(residents()) > before and time.monotonic() < end:
        time.sleep(0.01)
    assert len(residents()) <= before


@pytest.mark.skipif(not whereabouts(), reason="only Linux has such memory")
@pytest.mark.parametrize("most", [0, 1])
def test_memory_is_shared_with_no_more_processes_than_there_are_files_for(app, monkeypatch, most):
    monkeypatch.setattr(endpoint, "most_memories", lambda: most)
    with StreamCarrier(InProcessGrid(app, num_nodes=2)) as carrier:
        works(carrier)
        assert sum(each.memory is not None for each in carrier._endpoint.connections()) == most


def test_who_breaks_the_protocol_while_it_is_asked_has_made_a_mistake(app, monkeypatch):
    """Not an outage: it would do so again, and be invited for it every time."""

    class Breaking(stream.StreamClient):
        def _handle(self, frame):
            if frame.header.get("kind") == "request":
                self._send(Frame({"kind": "nonsense"}))
                return True
            return super()._handle(frame)

    monkeypatch.setattr(stream, "StreamClient", Breaking)
    with StreamCarrier(InProcessGrid(app, num_nodes=2)) as carrier:
        reply = carrier.exchange(ASK, 60)
    assert {failure.kind for failure in reply.failures.values()} == {Kind.MALFORMED}
    assert "its stream was refused: a client sends joins and replies, got" in str(reply.failures[NODES[0]])
