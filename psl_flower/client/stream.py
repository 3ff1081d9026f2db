"""The client's end of a stream: one for each process, for all the clients it serves.

Note [Resident processes]: a deployment starts a process for each message, so the handler of ``train.attach`` stays in
that message until the run ends. In the simulation the process is a Ray actor and goes on after the reply: a thread of
it keeps serving, and the clients whose attach messages come later join the stream that is there. Such a process can
also take over clients of one that died, for all it needs of them is their node configuration.
"""

from __future__ import annotations

import atexit
import logging
import queue
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import closing
from typing import Any

import grpc
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict

from psl_flower.client.client import SplitClient
from psl_flower.client.factory import ClientFactory, make_client, method_of
from psl_flower.client.keeping import keep, restore
from psl_flower.client.process import run_state
from psl_flower.client.runtime import answer
from psl_flower.client.two_ways import frames
from psl_flower.errors import ProtocolError
from psl_flower.exchange.codec import REQUEST, WeightStore, decode_request, encode_reply
from psl_flower.exchange.frames import Decoder, Frame, encode, put
from psl_flower.exchange.shared_memory import SharedMemory, accept, whereabouts
from psl_flower.exchange.streams.endpoint import (
    ACCEPTED,
    CHANNEL_OPTIONS,
    METHOD,
    NODE,
    OFFER,
    SESSION,
    TOKEN,
    WHEREABOUTS,
)
from psl_flower.exchange.streams.security import PROCESS_ID, SERVER_NAME, Ticket
from psl_flower.flower import ERROR_CLIENT_APP, outlives_messages
from psl_flower.freed_memory import keep_freed_memory
from psl_flower.protocol import Config, Reply

log = logging.getLogger("flwr.psl_flower")

CONNECT_SECONDS = 20.0
_JOIN_SECONDS = 30.0
_END_SECONDS = 60.0  # for the stage that is being done when the process ends: a second alone, more on a busy machine

_residents: dict[str, StreamClient] = {}  # by session; see Note [Process state] in process.py for why it is here
_residents_lock = threading.Lock()


def attach_stream(factory: ClientFactory, message: Message, context: Context) -> Message:
    """Answer a ``train.attach`` message: open the process's stream, or join it.

    The reply comes at once from a process that goes on, else when the stream has ended. It names a `failure` if the
    stream could not be opened.
    """
    try:
        ticket = Ticket.decode(message.content.config_records.get("attach"))
    except ProtocolError as error:
        run_state(context.run_id).refusals.add(f"node {context.node_id}", error)
        return Message(Error(ERROR_CLIENT_APP, f"refused: {error}"), reply_to=message)
    # a server in this very process waits for the reply, so the handler must not wait for the server
    resident = ticket.process == PROCESS_ID or outlives_messages()
    state = run_state(context.run_id)
    restore(state, context)
    state.secret(context.node_id)  # made before the process goes on without the context
    keep(state, context)
    reply = ConfigRecord({"resident": resident, "failure": ""})
    try:
        if resident:
            client = _resident(factory, ticket, context)
            try:
                client.join(ticket, context)
            except StreamError:
                if not client.ended:
                    raise
                _resident(factory, ticket, context).join(ticket, context)  # that one was about to end
        else:
            reply["ended"] = StreamClient(factory, ticket, context, resident=False).run()
    except StreamError as error:
        log.warning("No stream to the server: %s", error)
        reply["failure"] = str(error)
    return Message(RecordDict({"attach": reply}), reply_to=message)


def _resident(factory: ClientFactory, ticket: Ticket, context: Context) -> StreamClient:
    with _residents_lock:
        client = _residents.get(ticket.session)
        if client is None or client.ended:
            client = _residents[ticket.session] = StreamClient(factory, ticket, context, resident=True)
            serving = (ticket.session, client)
            client.thread = threading.Thread(target=_serve, args=serving, name="psl-resident", daemon=True)
            client.thread.start()
        return client


def _serve(session: str, client: StreamClient) -> None:
    try:
        log.debug("stream ended: %s", client.run())
    except StreamError as error:
        log.warning("The stream to the server ended: %s", error)
    finally:
        with _residents_lock:
            if _residents.get(session) is client:
                del _residents[session]


@atexit.register
def _end() -> None:
    """End the threads before the interpreter, which ends them wherever they are: in torch's code that is an abort."""
    clients = list(_residents.values())
    for client in clients:
        client.stop()
    for client in clients:
        if client.thread is not None:
            client.thread.join(_END_SECONDS)


class StreamError(Exception):
    """A stream could not be opened, or broke."""


class StreamClient:
    """One stream to the server, and the clients this process serves over it.

    Parameters
    ----------
    factory : ClientFactory
        How clients are built.
    ticket : Ticket
        That of the client which opens the stream.
    context : Context
        Of that client.
    resident : bool
        Whether the process outlives messages.

    Raises
    ------
    StreamError
        If the server cannot be reached.
    """

    def __init__(self, factory: ClientFactory, ticket: Ticket, context: Context, *, resident: bool) -> None:
        keep_freed_memory()
        self._factory, self._ticket, self._resident = factory, ticket, resident
        self._first = context
        self._contexts = {context.node_id: context}
        self._outgoing: queue.SimpleQueue[Iterator[bytes] | None] = queue.SimpleQueue()  # frames by the stream
        self._sending = threading.Lock()
        self._number = 0  # frames sent so far
        self._joining: dict[int, Future[None]] = {}
        self._weights = WeightStore()
        self._memory: SharedMemory | None = None  # with a server of this machine
        self.thread: threading.Thread | None = None  # that of `run`, of a resident process
        self.ended = self._stopped = False
        self._channel = _connect(ticket)

    # --- joining -----------------------------------------------------------------------------------------------------
    def join(self, ticket: Ticket, context: Context) -> None:
        """Join a client to the stream, and wait until the server has let it in; `run` runs in another thread.

        Raises
        ------
        StreamError
            If the server refuses it, or does not answer.
        """
        self._contexts[context.node_id] = context
        answer = self._joining[context.node_id] = Future()
        if self.ended:
            raise StreamError("the stream has ended")
        self._send_join(ticket, context)
        try:
            answer.result(_JOIN_SECONDS)
        except TimeoutError as exc:
            raise StreamError(f"the server did not answer within {_JOIN_SECONDS:g} s") from exc

    def _send_join(self, ticket: Ticket, context: Context) -> None:
        # a node's configuration stays with it, unless other processes are to take it over
        config = dict(context.node_config) if self._resident else {}
        header = {"kind": "join", "session": ticket.session, "node": context.node_id, "token": ticket.token}
        try:
            self._send(Frame({**header, "resident": self._resident, "node-config": config}))
        except ProtocolError as error:
            self._joining.pop(context.node_id, None)
            raise StreamError(f"the node's configuration cannot be sent: {error}") from error

    # --- serving -----------------------------------------------------------------------------------------------------
    def run(self) -> str:
        """Serve until the stream ends, and return why it did.

        Raises
        ------
        StreamError
            If it ended otherwise than by the server's goodbye.
        """
        ticket, node = self._ticket, str(self._first.node_id)
        if not self._resident:
            self._send_join(ticket, self._first)
        metadata = ((SESSION, ticket.session), (NODE, node), (TOKEN, ticket.token), (WHEREABOUTS, whereabouts()))
        call = self._channel.stream_stream(METHOD)(self._chunks(), metadata=metadata)
        decoder, why = Decoder(), StreamError("the server ended the stream")
        try:
            for chunk in call:
                frame = decoder.feed(chunk)
                if frame is not None and not self._handle(frame):
                    return "the run is over"
                if self._memory is not None:
                    decoder.memory = self._memory
                    with closing(frames(call, decoder, self._memory)) as both:
                        if not all(map(self._handle, both)):
                            return "the run is over"
        except ProtocolError as error:
            why = StreamError(f"the server sent something wrong: {error}")
        except grpc.RpcError as error:
            if self._stopped:
                return "the process ends"
            why = StreamError(f"{error.code().name}: {error.details()}")
        finally:
            self.ended = True
            with self._sending:
                self._outgoing.put(None)
                if self._memory is not None:
                    self._memory.close()
                    self._memory = None
            for answer in list(self._joining.values()):
                if not answer.done():
                    answer.set_exception(why)
            call.cancel()
            self._channel.close()
        raise why

    def stop(self) -> None:
        """Have `run` return, from another thread, when it has done the stage that it is at."""
        self._stopped = True
        self._channel.close()

    def _send(self, frame: Frame) -> None:
        with self._sending:
            number, memory = self._number, self._memory
            if memory is None or not put(frame, number, memory):
                self._outgoing.put(encode(frame, number, None if memory is None else memory.incoming.taken))
            self._number += 1  # what cannot be encoded was not sent

    def _chunks(self) -> Iterator[bytes]:
        while (chunks := self._outgoing.get()) is not None:
            yield from chunks

    def _handle(self, frame: Frame) -> bool:
        """Do what a frame asks for; return whether the stream goes on."""
        kind, node = frame.header.get("kind"), frame.header.get("node")
        if kind == REQUEST:
            number, wire_dtype, request = decode_request(frame, self._weights)
            state = run_state(self._first.run_id)
            method = method_of(self._factory, state, self._first)
            reply = answer(method, state, self._client, request)
            try:
                self._send(encode_reply(number, reply, request, wire_dtype))
            except ProtocolError as error:  # the server waits for a reply
                failed = Reply(failures=dict.fromkeys(request.nodes, error.failure()))
                self._send(encode_reply(number, failed, request, wire_dtype))
        elif kind == "joined":
            self._settle(node, None)
        elif kind == "refused":
            reason = StreamError(f"refused: {frame.header.get('reason')}")
            self._settle(node, reason)
            if not self._resident:
                raise reason
        elif kind == "adopt":
            self._adopt(frame.header)
        elif kind == OFFER:
            self._share(frame.header)
        elif kind != "bye":
            raise ProtocolError(f"a frame of unknown kind {kind!r:.80}")
        return bool(kind != "bye")

    def _settle(self, node: Any, error: StreamError | None) -> None:
        answer = self._joining.pop(node, None)
        if answer is None or answer.done():
            return
        if error is None:
            answer.set_result(None)
        else:
            answer.set_exception(error)

    def _adopt(self, header: Any) -> None:
        if not self._resident:
            raise ProtocolError("clients are taken over in Flower's simulation only, this process serves its own node")
        clients, first = header.get("clients"), self._first
        if not isinstance(clients, list) or not all(map(_is_client, clients)):
            raise ProtocolError("to adopt clients takes the node id and the node configuration of each")
        for node, config in clients:
            self._contexts[node] = Context(first.run_id, node, config, RecordDict(), first.run_config)

    def _share(self, offer: Any) -> None:
        if self._memory is not None:
            raise ProtocolError("memory is offered once")
        memory = None
        try:
            memory = accept(offer)
        except OSError as error:
            log.debug("no memory is shared with the server: %s", error)
        self._send(Frame({"kind": ACCEPTED, "accepted": memory is not None}))
        with self._sending:
            self._memory = memory

    def _client(self, node: int, config: Config) -> SplitClient:
        context = self._contexts.get(node)
        if context is None:
            raise ProtocolError(f"node {node} is not served by this process")
        return make_client(self._factory, run_state(context.run_id), context, config)


def _is_client(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and type(value[0]) is int and isinstance(value[1], dict)


def _connect(ticket: Ticket) -> grpc.Channel:
    """Return a channel that is connected, over TLS, to the holder of the ticket's certificate."""
    options = [*CHANNEL_OPTIONS, ("grpc.ssl_target_name_override", SERVER_NAME), ("grpc.enable_retries", 0)]
    options.append(("grpc.use_local_subchannel_pool", 1))  # another run's connection has another certificate
    channel = grpc.secure_channel(ticket.address, grpc.ssl_channel_credentials(ticket.certificate), options)
    ready = threading.Event()  # grpc's own future looks at the wall clock, which may be set meanwhile

    def changed(state: grpc.ChannelConnectivity) -> None:
        if state is grpc.ChannelConnectivity.READY:
            ready.set()

    channel.subscribe(changed, try_to_connect=True)
    connected = ready.wait(CONNECT_SECONDS)
    channel.unsubscribe(changed)
    if not connected:
        channel.close()
        raise StreamError(
            f"cannot connect to {ticket.address} within {CONNECT_SECONDS:g} s: is it reachable from this machine? "
            "(a firewall, or the server advertises an address of its own network)"
        )
    return channel
