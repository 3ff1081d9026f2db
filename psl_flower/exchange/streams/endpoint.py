"""The server's end of the streams: a gRPC server with one bidirectional stream for each client process.

All of it runs in one thread, see event_loop.py; what happens is told to the carrier's through a queue of events, and
`Connection.send` and `close` are what others call.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

import grpc
import grpc.aio

from psl_flower.errors import ConfigError, ProtocolError
from psl_flower.exchange.codec import REPLY, Sent
from psl_flower.exchange.frames import MAX_CHUNK_BYTES, Decoder, Frame, encode, put
from psl_flower.exchange.limits import MAX_FRAME_BYTES, MAX_HEADER_BYTES, MAX_UNASKED_HEADER
from psl_flower.exchange.shared_memory import Offer, SharedMemory, whereabouts
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
_MAX_WAITING = 16  # frames on their way to one process
_MAX_UNASKED = 16  # replies of one process that nobody asked for
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

# Makes a frame when its turn has come; None if it is not wanted any more.
Job = Callable[[], Frame | None]


class Connection:
    """One client process, as the server sees it. Safe for threads.

    Parameters
    ----------
    peer : str
        Its address, for the log.
    max_frame_bytes : int
        Of the largest frame let in.
    """

    _ids = count()

    def __init__(self, peer: str, max_frame_bytes: int = MAX_FRAME_BYTES) -> None:
        self.peer = peer
        self.id = next(Connection._ids)
        self.decoder = Decoder(max_frame_bytes)
        self.sent_weights: Sent = {}  # read and written by the jobs, which run one after the other
        self.offer: Offer | None = None  # of memory, until it is answered
        self.memory: SharedMemory | None = None  # with a process of this machine
        self._jobs: deque[Job] = deque()
        self._lock = threading.Lock()
        self._number = 0  # frames so far
        self._idle = True  # whether no job is being done by `write`
        self._closing: str | None = None
        self._unanswered = 0  # requests sent less replies received; below zero, replies that nobody asked for
        self._wake: Callable[[], object] = lambda: None

    def replied(self) -> None:
        """Take note of a reply.

        Raises
        ------
        ProtocolError
            If far more came than were asked for: they would fill the memory.
        """
        with self._lock:
            self._unanswered -= 1
            if self._unanswered < -_MAX_UNASKED:
                raise ProtocolError(f"it sent {_MAX_UNASKED} replies that nobody asked for")

    @property
    def is_asked(self) -> bool:
        """Whether a reply is to come."""
        return self._unanswered > 0

    def send(self, job: Job, *, asks: bool = False) -> bool:
        """Have a frame sent after those before; False if the stream is closing, or the process does not read.

        Parameters
        ----------
        job : callable
        asks : bool
            Whether it is to be replied to.
        """
        with self._lock:
            if self._closing is not None or len(self._jobs) >= _MAX_WAITING:
                return False
            self._unanswered += asks
            if self.memory is not None and self.memory.outgoing.has_room(0) and self._idle and not self._jobs:
                # here and now: to have another thread do it costs more than the doing
                frame = job()
                if frame is None or self._put(frame, self.memory):
                    return True
                job = partial(_same, frame)
            self._jobs.append(job)
        self._wake()
        return True

    def _put(self, frame: Frame, memory: SharedMemory) -> bool:
        done = put(frame, self._number, memory)
        self._number += done
        return done

    def feed(self, chunk: bytes) -> Frame | None:
        """Return the frame that a chunk completes, if it does."""
        self.decoder.max_header = MAX_HEADER_BYTES if self.is_asked else MAX_UNASKED_HEADER
        return self.decoder.feed(chunk)

    def take(self) -> Frame | None:
        """Return the next frame, if it lies in shared memory."""
        self.decoder.max_header = MAX_HEADER_BYTES if self.is_asked else MAX_UNASKED_HEADER
        return self.decoder.take()

    def close(self, reason: str) -> None:
        """End the stream once what waits is sent."""
        with self._lock:
            if self._closing is None:
                self._closing = reason
        self._wake()

    @property
    def closing(self) -> str | None:
        """Why the stream is closing; None while it is open."""
        return self._closing

    async def write(self, write: Callable[[bytes], Awaitable[None]]) -> None:
        """Write what is to be sent, as it comes, until the stream closes."""
        loop, changed = asyncio.get_running_loop(), asyncio.Event()
        self._wake = lambda: loop.call_soon_threadsafe(changed.set)
        while True:
            changed.clear()
            with self._lock:
                job = self._jobs.popleft() if self._jobs else None
                self._idle = job is None
            if job is not None:
                frame = job()
                if frame is None or (self.memory is not None and self._put(frame, self.memory)):
                    continue
                taken = None if self.memory is None else self.memory.incoming.taken
                number, self._number = self._number, self._number + 1
                for chunk in encode(frame, number, taken):
                    await write(chunk)
            elif self._closing is not None:
                return
            else:
                await changed.wait()

    def forget_memory(self) -> None:
        """Use no shared memory any more."""
        with self._lock:
            if self.memory is not None:
                self.memory.close()
                self.memory = None


def _same(frame: Frame) -> Frame:
    return frame


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
            self._forget_memory(connection)
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
        if sum(other.memory is not None for other in self.connections()) >= most_memories():
            return
        try:
            connection.offer = offer = Offer()
        except OSError as error:
            log.warning("No memory can be shared with processes of this machine, all goes by stream: %s", error)
            return
        connection.memory, header = offer.memory, offer.header()
        connection.send(lambda: Frame({"kind": OFFER, **header}))

    def _answered(self, connection: Connection, offer: Offer, *, accepted: bool) -> None:
        """Use memory from now on that a process has accepted."""
        offer.close()
        connection.offer = None
        if not accepted:
            connection.forget_memory()
            return
        connection.decoder.memory = offer.memory
        offer.memory.outgoing.open = True
        asyncio.get_running_loop().add_reader(offer.memory.incoming.bell, self._heard, connection)

    def _forget_memory(self, connection: Connection) -> None:
        if connection.offer is not None:
            connection.offer.close()
        if connection.memory is not None:
            asyncio.get_running_loop().remove_reader(connection.memory.incoming.bell)
            connection.forget_memory()

    async def _read(self, connection: Connection, chunks: AsyncIterator[bytes]) -> None:
        reason = "it closed its stream"
        try:
            async for chunk in chunks:
                self._take_waiting(connection)
                frame = connection.feed(chunk)
                if frame is not None:
                    self._take(connection, frame)
                    self._take_waiting(connection)
        except ProtocolError as error:
            self._refuse(connection, error)
            return
        except Exception as exc:  # gRPC's iterator raises more than it documents; a task that dies would go unseen
            reason = f"its connection broke ({exc!s:.200})" if str(exc) else "its connection broke"
        self._ended(connection, reason)

    def _heard(self, connection: Connection) -> None:
        """Take what a process says that it has put into shared memory."""
        try:
            self._take_waiting(connection)
        except ProtocolError as error:
            self._refuse(connection, error)

    def _take_waiting(self, connection: Connection) -> None:
        """Take what lies in shared memory, if it is its turn."""
        while (frame := connection.take()) is not None:
            self._take(connection, frame)
        memory = connection.decoder.memory
        if memory is not None and memory.incoming.ended:
            asyncio.get_running_loop().remove_reader(memory.incoming.bell)

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

    def _refuse(self, connection: Connection, error: ProtocolError) -> None:
        self._refusals.add(connection.peer, str(error))
        self._ended(connection, f"{REFUSED}{error}")

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
        connection.close(reason)
        with self._lock:
            if connection not in self._connections:
                return
            self._connections.remove(connection)
        self.events.put(Closed(connection, connection.closing or reason))


def _metadata(context: grpc.aio.ServicerContext[bytes, bytes]) -> dict[str, str | bytes]:
    return dict(context.invocation_metadata() or ())
