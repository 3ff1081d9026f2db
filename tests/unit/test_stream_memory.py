"""The server's end of a stream with shared memory: what goes wrong ends this stream, once, and is told."""

import asyncio
import math
import os
import queue
import struct
from contextlib import closing
from unittest.mock import Mock

import numpy as np
import pytest
from flwr.app import Context, RecordDict
from support import CUT, load_partition, tiny_resnet

from psl_flower import InProcessGrid, split_client_app
from psl_flower.client import stream
from psl_flower.client.stream import StreamClient, StreamError, _connect
from psl_flower.errors import ProtocolError
from psl_flower.exchange import shared_memory
from psl_flower.exchange.frames import Decoder, Frame, encode, put
from psl_flower.exchange.shared_memory import Offer, accept, whereabouts
from psl_flower.exchange.streams import StreamCarrier, StreamOptions
from psl_flower.exchange.streams.connection import Connection
from psl_flower.exchange.streams.endpoint import METHOD, NODE, SESSION, TOKEN, WHEREABOUTS, Closed, Endpoint, Joined
from psl_flower.exchange.streams.event_loop import run
from psl_flower.exchange.streams.security import Ticket, Tokens
from psl_flower.failures import Kind
from psl_flower.protocol import DESCRIBE, Request

pytestmark = pytest.mark.skipif(not whereabouts(), reason="only Linux has such memory")

PATIENCE = 60
NODE_ID = 5
TOO_LONG = {"kind": "request", "x": "y" * 2**24}


class Client:
    """Speaks the protocol by hand."""

    def __init__(self, ticket):
        self._out, self.number = queue.SimpleQueue(), 0
        self._channel = _connect(ticket)
        metadata = ((SESSION, ticket.session), (NODE, str(NODE_ID)), (TOKEN, ticket.token))
        metadata = (*metadata, (WHEREABOUTS, whereabouts()))
        self._call = self._channel.stream_stream(METHOD)(iter(self._out.get, None), metadata=metadata)
        self.memory = accept(Decoder().feed(next(self._call)).header)
        self.stream(Frame({"kind": "accepted", "accepted": True}))

    def stream(self, frame):
        for chunk in encode(frame, self.number):
            self._out.put(chunk)
        self.number += 1

    def put(self, frame):
        assert put(frame, self.number, self.memory)
        self.number += 1

    def ring(self, number, length):
        os.write(self.memory.outgoing._bell, struct.pack("<QQ", number, length))

    def join(self, ticket, node=NODE_ID):
        header = {"kind": "join", "session": ticket.session, "node": node, "token": ticket.token}
        self.stream(Frame({**header, "node-config": {}}))

    def close(self):
        self._out.put(None)
        self._call.cancel()
        self._channel.close()
        self.memory.close()


@pytest.fixture
def endpoint():
    with closing(Endpoint(StreamOptions(), Tokens())) as endpoint:
        yield endpoint


def ticket(endpoint, node=NODE_ID):
    tokens = endpoint._tokens
    return Ticket(endpoint.address, endpoint.certificate, tokens.session, tokens.issue(node))


@pytest.fixture
def client(endpoint):
    own = ticket(endpoint)
    with closing(Client(own)) as client:
        client.join(own)
        event = endpoint.events.get(timeout=PATIENCE)
        assert isinstance(event, Joined)
        client.connection, client.bell = event.connection, event.connection.memory.incoming.bell
        yield client


def ended(endpoint, client):
    """Return why the connection ended; nothing comes after that, and nothing of its memory is left."""
    event, connection = endpoint.events.get(timeout=PATIENCE), client.connection
    assert isinstance(event, Closed)
    assert (connection.memory, connection.decoder.memory, connection.offer) == (None, None, None)
    assert not run(is_listened_to(client.bell))
    client.ring(client.number, 16)
    client.join(ticket(endpoint, 6), 6)
    with pytest.raises(queue.Empty):
        endpoint.events.get(timeout=0.05)
    assert not connection.send(lambda: Frame({}))
    return event.reason


async def is_listened_to(file):
    return asyncio.get_running_loop().remove_reader(file)


def test_a_lie_in_the_memory_ends_the_stream_once(endpoint, client):
    client.ring(client.number, 2**40)
    assert "refused: a frame of 1099511627776 bytes does not lie in a shared memory" in ended(endpoint, client)


def test_a_lie_ends_the_stream_while_the_client_reads_nothing(endpoint, client):
    """What it is sent waits then, and so does gRPC's end of the stream."""
    client.connection.send(lambda: Frame({}, [[memoryview(np.zeros(2**27, np.uint8).data)]]))
    client.ring(client.number, 2**40)
    assert "refused: a frame of 1099511627776 bytes" in ended(endpoint, client)


def test_what_breaks_while_a_frame_is_taken_ends_the_stream(endpoint, client, monkeypatch):
    def fail(length):
        monkeypatch.undo()
        raise MemoryError("no memory for a frame")

    monkeypatch.setattr(shared_memory, "aligned", fail)
    client.put(Frame({"kind": "reply", "number": 1}))
    assert ended(endpoint, client) == "its connection broke (no memory for a frame)"


def test_one_frame_is_taken_at_a_time_for_others_wait():
    offer = Offer()
    client, connection, endpoint = accept(offer.header()), Connection("here"), Mock(spec=Endpoint)
    offer.close()
    connection.memory = connection.decoder.memory = offer.memory
    (chunk,) = encode(Frame({}), 0)
    client.outgoing.put(0, [chunk[16:]])
    client.outgoing.put(1, [chunk[16:]])
    for taken in (1, 2):
        Endpoint._take_waiting(endpoint, connection)
        assert endpoint._take.call_count == taken
    client.close()
    connection.forget_memory()


# --- what cannot be encoded ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shared", [True, False])
def test_a_request_that_cannot_be_encoded_ends_its_connection_and_raises_nothing(shared):
    connection, offer, written = Connection("here"), Offer(), []
    connection.memory, offer.memory.outgoing.open = offer.memory, shared

    async def write(chunk):
        written.append(chunk)

    sent = connection.send(lambda: Frame(TOO_LONG), asks=True)
    assert sent is not shared  # else it is made later
    asyncio.run(connection.write(write))
    assert not written
    assert connection.closing.startswith("what it was to be asked cannot be sent: a header of 16777")
    assert connection.is_asked is not shared
    assert not connection.send(lambda: Frame({}))
    assert connection._number == 0
    connection.forget_memory()


def test_a_request_that_is_not_wanted_any_more_asks_for_no_reply():
    connection, offer = Connection("here"), Offer()
    connection.memory, offer.memory.outgoing.open = offer.memory, True
    assert connection.send(lambda: None, asks=True)
    assert not connection.is_asked
    connection.forget_memory()


def test_who_comes_while_the_stream_of_its_process_ends_opens_another(monkeypatch):
    class Ending:
        ended = True

        def join(self, ticket, context):
            raise StreamError("the server ended the stream")

    resident, ending = stream._resident, [Ending()]
    monkeypatch.setattr(stream, "_resident", lambda *args: ending.pop() if ending else resident(*args))
    app = split_client_app(tiny_resnet, cut=CUT, data_fn=load_partition)
    with StreamCarrier(InProcessGrid(app, num_nodes=1)) as carrier:
        assert not carrier.exchange(Request(stage=DESCRIBE, nodes=(2,)), PATIENCE).failures
    assert not ending


def context(node, **config):
    return Context(run_id=1, node_id=node, node_config=config, state=RecordDict(), run_config={})


@pytest.mark.parametrize("shared", [True, False])
def test_a_node_whose_configuration_cannot_be_sent_does_not_stop_the_others(endpoint, monkeypatch, shared):
    if not shared:
        monkeypatch.setattr(stream, "whereabouts", lambda: "elsewhere")
    first = ticket(endpoint)
    client = stream._resident(None, first, context(NODE_ID))
    client.join(first, context(NODE_ID))
    with pytest.raises(StreamError, match="the node's configuration cannot be sent: a header must be what JSON"):
        client.join(ticket(endpoint, 6), context(6, rate=math.nan))
    client.join(ticket(endpoint, 7), context(7, rate=0.5))
    assert [endpoint.events.get(timeout=PATIENCE).node for _ in range(2)] == [NODE_ID, 7]
    client.stop()
    client.thread.join(PATIENCE)


def test_a_reply_that_cannot_be_encoded_is_a_failure_of_its_nodes(monkeypatch):
    app = split_client_app(tiny_resnet, cut=CUT, data_fn=load_partition)
    ask = Request(stage=DESCRIBE, nodes=(2, 3))

    def encode_once(number, *args):
        monkeypatch.undo()
        return Frame({"kind": "reply", "number": number, "x": math.nan})

    with StreamCarrier(InProcessGrid(app, num_nodes=2)) as carrier:
        assert not carrier.exchange(ask, PATIENCE).failures
        monkeypatch.setattr(stream, "encode_reply", encode_once)
        failures = carrier.exchange(ask, PATIENCE).failures
        assert {node: failure.kind for node, failure in failures.items()} == dict.fromkeys((2, 3), Kind.MALFORMED)
        assert "a header must be what JSON can say" in failures[2].detail
        assert not carrier.exchange(ask, PATIENCE).failures


def test_memory_is_offered_once():
    offer = Offer()
    client = object.__new__(StreamClient)
    client._memory = offer.memory
    with pytest.raises(ProtocolError, match="memory is offered once"):
        client._share(offer.header())
    offer.close()
    offer.memory.close()
