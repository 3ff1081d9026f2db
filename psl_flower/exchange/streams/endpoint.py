"""The server's end of the streams: a gRPC server with one bidirectional stream for each client process.

All of it runs in one thread, see event_loop.py; what happens is told to the carrier's through a queue of events, and
`Connection.send` and `close` are what others call.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio

from psl_flower.errors import ConfigError, ProtocolError
from psl_flower.exchange.codec import REPLY
from psl_flower.exchange.frames import MAX_CHUNK_BYTES, Frame
from psl_flower.exchange.shared_memory import Offer, whereabouts
from psl_flower.exchange.streams.connection import Connection
from psl_flower.exchange.streams.event_loop import run
from psl_flower.exchange.streams.open_files import most_connections, most_memories
from psl_flower.exchange.streams.options import StreamOptions
from psl_flower.exchange.streams.security import Tokens, make_identity
from psl_flower.refusals import Refusals

log = logging.getLogger("flwr.psl_flower")

SERVICE = "psl_flower.Streams"
METHOD = f"/{SERVICE}/Open"
# keys of the metadata a stream is opened with
SESSION, NODE, TOKEN, WHEREABOUTS = "psl-session", "psl-node", "psl-token", "psl-whereabouts"

OFFER, ACCEPTED = "offer", "accepted"  # kinds of frames about shared memory
REFUSED = "refused: "  # begins why a stream was closed that carried what it must not

# Both ends look after this time without a word whether the other is still there: a machine that was switched off or a
# process that was stopped does not close its connections.
_KEEPALIVE_MS = 20_000
CHANNEL_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.max_receive_message_length", MAX_CHUNK_BYTES),
    ("grpc.max_send_message_length", MAX_CHUNK_BYTES),
    ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", _KEEPALIVE_MS),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
]
_SERVER_OPTIONS = [
    *CHANNEL_OPTIONS,
    ("grpc.so_reuseport", 0),  # a port in use is an error, not shared
    # whoever knocks without coming in is sent away soon, and cannot take all the files that the process may open
    ("grpc.server_handshake_timeout_ms", 10_000),
    ("grpc.max_connection_idle_ms", 10_000),  # without a stream
    ("grpc.http2.min_ping_interval_without_data_ms", _KEEPALIVE_MS // 2),
    # thousands may come at once, and wait until they are looked at; gRPC would send them away after 30 s
    ("grpc.server_max_unrequested_time_in_server", 600),
    ("grpc.max_concurrent_streams", 8),  # of a connection; ours have one
]
# As many as may be connected; of those that wait to be looked at, gRPC would turn some away from 1,000 on.
_BOUNDS = (
    "grpc.max_allowed_incoming_connections",
    "grpc.server.max_pending_requests",
    "grpc.server.max_pending_requests_hard_limit",
)
_CLOSE_SECONDS = 2.0


# --- what happens on the streams -------------------------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class Joined:
    """A client came in over a stream, with its own token."""

    connection: Connection
    node: int
    resident: bool
    node_config: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Received:
    """A frame arrived."""

    connection: Connection
    frame: Frame


@dataclass(frozen=True, eq=False)
class Unsent:
    """A frame could not be made."""

    number: int
    reason: str


@dataclass(frozen=True, eq=False)
class Closed:
    """A stream ended; nothing more comes from it."""

    connection: Connection
    reason: str


@dataclass(frozen=True, eq=False)
class Stopped:
    """The run is to end: nothing is waited for any more."""


Event = Joined | Received | Unsent | Closed | Stopped


class Endpoint:
    """Listens for client processes; what happens is told through `events`.

    Parameters
    ----------
    options : StreamOptions
    tokens : Tokens
        Who may come in.

    Raises
    ------
    ConfigError
        If it cannot listen there.
    """

    def __init__(self, options: StreamOptions, tokens: Tokens) -> None:
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._options, self._tokens = options, tokens
        self._refusals = Refusals("a stream from {}")
        self._warned = False  # that memory is not shared
        self._sharing: set[Connection] = set()  # those with memory; of the loop's thread alone
        self._connections: set[Connection] = set()
        self._lock = threading.Lock()
        identity = make_identity()
        self.certificate = identity.certificate
        self.address = run(self._start(grpc.ssl_server_credentials([(identity.key, identity.certificate)])))

    async def _start(self, credentials: grpc.ServerCredentials) -> str:
        handler = grpc.stream_stream_rpc_method_handler(self._serve)
        handlers = [grpc.method_handlers_generic_handler(SERVICE, {METHOD.rpartition("/")[2]: handler})]
        options = [*_SERVER_OPTIONS, *((bound, most_connections()) for bound in _BOUNDS)]
        self._server = grpc.aio.server(handlers=handlers, options=options)
        try:
            port = self._server.add_secure_port(self._options.bind, credentials)
        except RuntimeError as exc:
            raise ConfigError(f"streams cannot listen on {self._options.bind}: is the port in use? ({exc})") from exc
        await self._server.start()
        return self._options.address(port)

    def connections(self) -> list[Connection]:
        """Return the streams that are open."""
        with self._lock:
            return list(self._connections)

    def close(self) -> None:
        """Say goodbye to all, and stop listening."""
        for connection in self.connections():
            connection.send(lambda: Frame({"kind": "bye"}))
            connection.close("the run is over")
        run(self._server.stop(_CLOSE_SECONDS))

    # --- one stream --------------------------------------------------------------------------------------------------
    async def _serve(self, requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        peer = context.peer()
        # before anything of the stream is read
        if refusal := self._refusal(context):
            self._refusals.add(peer, refusal)
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, refusal)
        connection = Connection(peer, self._options.max_frame_bytes)
        self._offer(connection, context)
        with self._lock:
            self._connections.add(connection)
        reader = asyncio.create_task(self._read(connection, requests))
        try:
            # cancelled at once when the process is gone, even if nothing is being sent or read
            await connection.write(context.write)
        finally:
            reader.cancel()
            self._ended(connection, connection.closing or "its connection broke")
        if connection.closing and connection.closing.startswith(REFUSED):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, connection.closing)

    def _refusal(self, context: grpc.aio.ServicerContext[bytes, bytes]) -> str | None:
        metadata = _metadata(context)
        session, node, token = (str(metadata.get(key, "")) for key in (SESSION, NODE, TOKEN))
        if not (session and node and token):
            return "it showed no token"
        if not (node.isascii() and node.isdigit() and len(node) <= 20):
            return "its node id is not a number"
        return self._tokens.refusal(session, int(node), token)

    def _offer(self, connection: Connection, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        """Make memory to share with a process that says it is of this machine and user."""
        here, there = whereabouts(), _metadata(context).get(WHEREABOUTS, "")
        if not (self._options.shared_memory and here and there == here):
            return
        if (shared := len(self._sharing)) >= most_memories():
            why = f"{shared} of them have some, for more this process may have too few files open (ulimit -Hn)"
            self._share_no_more(why)
            return
        try:
            connection.offer = offer = Offer()
        except OSError as error:
            self._share_no_more(str(error))
            return
        connection.memory, header = offer.memory, offer.header()
        self._sharing.add(connection)
        connection.send(lambda: Frame({"kind": OFFER, **header}))

    def _share_no_more(self, why: str) -> None:
        if not self._warned:
            self._warned = True
            log.warning(
                "No memory can be shared with a process of this machine, what it is sent takes the stream: %s", why
            )

    def _forget_memory(self, connection: Connection) -> None:
        self._sharing.discard(connection)
        connection.forget_memory()

    def _answered(self, connection: Connection, offer: Offer, *, accepted: bool) -> None:
        """Use memory from now on that a process has accepted."""
        offer.close()
        connection.offer = None
        if not accepted:
            self._forget_memory(connection)
            return
        connection.decoder.memory = offer.memory
        offer.memory.outgoing.open = True
        asyncio.get_running_loop().add_reader(offer.memory.incoming.bell, self._heard, connection)

    async def _read(self, connection: Connection, chunks: AsyncIterator[bytes]) -> None:
        try:
            async for chunk in chunks:
                self._take_waiting(connection)
                if connection.ended:
                    return
                frame = connection.feed(chunk)
                if frame is not None:
                    self._take(connection, frame)
                    self._take_waiting(connection)
            self._take_waiting(connection)  # what it put there before it closed
            self._ended(connection, "it closed its stream")
        except Exception as error:  # gRPC's iterator raises more than it documents; a task that dies would go unseen
            self._broke(connection, error)

    def _heard(self, connection: Connection) -> None:
        """Take what a process says that it has put into shared memory."""
        try:
            self._take_waiting(connection)
        except Exception as error:  # the loop would log it, and go on with a stream that is broken
            self._broke(connection, error)

    def _take_waiting(self, connection: Connection) -> None:
        """Take the frame that lies in shared memory, if it is its turn: one, for others wait, too."""
        if (frame := connection.take()) is not None:
            self._take(connection, frame)

    def _take(self, connection: Connection, frame: Frame) -> None:
        kind = frame.header.get("kind")
        if kind == "join":
            self._join(connection, frame.header)
        elif kind == REPLY:
            connection.replied()
            self.events.put(Received(connection, frame))
        elif kind == ACCEPTED and connection.offer is not None:
            self._answered(connection, connection.offer, accepted=frame.header.get("accepted") is True)
        else:
            raise ProtocolError(f"a client sends joins and replies, got a frame of kind {kind!r:.80}")

    def _broke(self, connection: Connection, error: Exception) -> None:
        if isinstance(error, ProtocolError):
            self._refusals.add(connection.peer, str(error))
            self._ended(connection, f"{REFUSED}{error}")
        else:
            self._ended(connection, f"its connection broke ({error!s:.200})" if str(error) else "its connection broke")

    def _join(self, connection: Connection, header: Mapping[str, Any]) -> None:
        node, token, config = header.get("node"), header.get("token"), header.get("node-config")
        if type(node) is not int or not isinstance(token, str) or not isinstance(config, dict):
            raise ProtocolError("a join needs a node, a token and a node configuration")
        refusal = self._tokens.refusal(str(header.get("session")), node, token, use=True)
        if refusal:
            self._refusals.add(connection.peer, f"node {node}: {refusal}")
            connection.send(lambda: Frame({"kind": "refused", "node": node, "reason": refusal}))
            return
        # the event first: who is told that it joined has joined
        self.events.put(Joined(connection, node, header.get("resident") is True, config))
        connection.send(lambda: Frame({"kind": "joined", "node": node}))

    def _ended(self, connection: Connection, reason: str) -> None:
        if connection.ended:
            return
        connection.ended = True
        connection.close(reason)
        if connection.memory is not None:
            asyncio.get_running_loop().remove_reader(connection.memory.incoming.bell)
        self._forget_memory(connection)
        with self._lock:
            self._connections.discard(connection)
        self.events.put(Closed(connection, connection.closing or reason))


def _metadata(context: grpc.aio.ServicerContext[bytes, bytes]) -> dict[str, str | bytes]:
    return dict(context.invocation_metadata() or ())
