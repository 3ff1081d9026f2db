"""The stream carrier: an exchange takes milliseconds, once every client has opened its stream.

Note [Attaching many]: Flower's simulation goes through all the messages it keeps for each of its nodes, ten times a
second and at some 10 µs each: a thousand invitations to a thousand nodes would take it ten seconds a round. But of its
processes there are as many as cores, and each needs one. So a group of clients is invited, more than there are
processes; these then take over all others, of which they need nothing but the node configuration. That is known in the
simulation: it numbers its nodes in their order. Where those that were invited do not confirm it, all are, by groups.
"""

from __future__ import annotations

import logging
import queue
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import partial

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from psl_flower.errors import ProtocolError
from psl_flower.exchange.base import Carrier
from psl_flower.exchange.codec import cannot_ask, decode_reply, encode_request
from psl_flower.exchange.frames import Frame
from psl_flower.exchange.streams.connection import Connection, Job
from psl_flower.exchange.streams.endpoint import (
    REFUSED,
    Closed,
    Endpoint,
    Event,
    Joined,
    Received,
    Stopped,
    Unsent,
)
from psl_flower.exchange.streams.open_files import make_room
from psl_flower.exchange.streams.options import StreamOptions
from psl_flower.exchange.streams.security import Ticket, Tokens
from psl_flower.exchange.streams.under_way import Exchange, Home, Sent, Wait, connected, gone, refusal
from psl_flower.failures import Failure, Kind
from psl_flower.flower import simulated_nodes
from psl_flower.freed_memory import keep_freed_memory
from psl_flower.protocol import ATTACH, Reply, Request

log = logging.getLogger("flwr.psl_flower")

# How long Flower keeps an attach message: it is answered when the run ends, in a deployment.
_TTL = 30 * 24 * 3600.0
# The reply of an attach message only matters if it fails: looking for it may not slow down what it waits for.
_FIRST_LOOK, _LONGEST_LOOK = 0.01, 0.5  # seconds
_READ_SECONDS = 5.0  # for replies that have been sent already
_GROUP = 64  # clients invited at once in the simulation
# A request that ended this many processes is not tried on another.
_MAX_MOVES = 3


class StreamCarrier(Carrier):
    """Asks clients over streams they opened to this process; Flower's messages only carry the invitation.

    Parameters
    ----------
    grid : Grid
        Flower's.
    options : StreamOptions, optional
    group_id : str
        Marks the messages of a run.

    Raises
    ------
    ConfigError
        If it cannot listen where the options say.
    """

    def __init__(self, grid: Grid, options: StreamOptions | None = None, group_id: str = "psl_flower") -> None:
        keep_freed_memory()
        self.options = options or StreamOptions()
        self._grid, self._group_id = grid, group_id
        self._tokens = Tokens()
        self._endpoint = Endpoint(self.options, self._tokens)
        self._homes: dict[int, Home] = {}
        self._homeless: dict[int, str] = {}  # clients whose process ended, and why no other has them yet
        self._attaching: dict[int, str] = {}  # attach messages not known to have failed, by node
        self._refused: dict[int, Failure] = {}  # what came of those that have
        self._awaited: set[int] = set()  # clients that are being attached, and are neither in nor refused
        self._unread: set[str] = set()  # attach messages of clients that are in, whose replies are still to come
        self._number = 0
        self._sent: dict[int, Sent] = {}
        self._exchange: Exchange | None = None

    @property
    def address(self) -> str:
        """What clients connect to, ``host:port``."""
        return self._endpoint.address

    def node_ids(self) -> Iterable[int]:
        """Return the ids of the nodes that are connected now."""
        self._check_stopped()
        return self._grid.get_node_ids()

    def refuse(self, node: int, reason: str) -> None:
        """Tell a node that it is not let in; its stream ends, if it is its own."""
        if node in self._homes:
            home = self._homes[node]
            home.connection.send(partial(_same, Frame({"kind": "refused", "node": node, "reason": reason})))
            if not home.resident:
                home.connection.close(reason)

    def stop(self) -> None:
        """Have the exchange under way, and every later one, raise StoppedError; for other threads to call."""
        super().stop()
        self._endpoint.events.put(Stopped())

    def close(self) -> None:
        """End all streams and stop listening."""
        self._endpoint.close()

    # --- attaching ---------------------------------------------------------------------------------------------------
    def attach(self, nodes: Iterable[int], timeout: float) -> dict[int, Failure]:
        """Have clients open their streams, those that have none; return why the others did not.

        Parameters
        ----------
        nodes : iterable of int
        timeout : float
            Seconds.
        """
        self._handle_waiting()
        new = [node for node in dict.fromkeys(nodes) if node not in self._homes]
        if not new:
            return {}
        simulated = simulated_nodes(self._grid)
        at_once, left = len(new) if simulated is None else _GROUP, new
        if simulated is None:
            make_room(len(self._homes) + len(new))
        wait = Wait(timeout, len(new))
        while left:
            group, left = left[:at_once], left[at_once:]
            self._attach_group(group, wait)
            if left and simulated and all(self._is_as_told(node, simulated) for node in group):
                self._spread(left, simulated)
                left = [node for node in left if node not in self._homes]
        self._balance({node for node in new if node in self._homes})
        processes = len({home.connection for home in self._homes.values()})
        log.info("%s to %s.", connected(len(self._homes), processes), self.address)
        return {node: self._refused.pop(node) for node in new if node in self._refused}

    def _attach_group(self, group: list[int], wait: Wait) -> None:
        """Invite clients, and wait for all of them."""
        self._invite([node for node in group if node not in self._attaching])
        look = _FIRST_LOOK
        waiting = self._awaited = {node for node in group if node not in self._homes and node not in self._refused}
        while waiting:
            wait.tell(len(group) - len(waiting))
            if wait.left() <= 0:
                reason = f"it opened no stream within {wait.timeout:g} s: see whether its node still runs"
                self._refused |= dict.fromkeys(waiting, gone(reason))
                break
            if self._next_event(min(look, wait.left())):
                self._handle_waiting()
            else:
                self._look_for_refusals()
                look = min(1.5 * look, _LONGEST_LOOK)
        wait.connected += len(group)
        for node in group:
            message_id = self._attaching.pop(node, None)
            if message_id is not None and node in self._homes and self._homes[node].resident:
                self._unread.add(message_id)
        self._read_replies()

    def _is_as_told(self, node: int, simulated: Mapping[int, Mapping[str, int]]) -> bool:
        home = self._homes.get(node)
        return home is not None and home.resident and dict(home.node_config) == simulated.get(node)

    def _spread(self, nodes: Iterable[int], simulated: Mapping[int, Mapping[str, int]]) -> None:
        """Have the processes that are there serve clients that were not invited; see Note [Attaching many]."""
        processes = self._resident_connections()
        known = [node for node in nodes if node in simulated]
        self._adopt({node: processes[i % len(processes)] for i, node in enumerate(known)}, simulated)

    def _read_replies(self) -> None:
        """Pull the replies to the attach messages of clients that are in: they tell nothing new.

        As long as a reply is not pulled, Flower keeps the message, and its simulation looks at every message it keeps
        for each of its nodes, ten times a second: that took longer than the training.
        """
        end, wait = time.monotonic() + _READ_SECONDS, _FIRST_LOOK
        while self._unread and time.monotonic() < end:
            for message in self._grid.pull_messages(list(self._unread)):
                self._unread.discard(message.metadata.reply_to_message_id)
            if self._unread:
                time.sleep(wait)
                wait = min(2 * wait, _LONGEST_LOOK)

    def attach_new(self, nodes: Iterable[int], timeout: float) -> dict[int, Failure]:
        """Have those clients open their streams that never had one; who lost it is invited again by `exchange`."""
        strangers = [node for node in nodes if node not in self._homes and node not in self._homeless]
        return self.attach(strangers, min(timeout, self.options.attach_timeout)) if strangers else {}

    def _invite(self, nodes: Iterable[int]) -> None:
        """Send attach messages."""
        messages = {}
        for node in nodes:
            token = self._tokens.issue(node)
            ticket = Ticket(self.address, self._endpoint.certificate, self._tokens.session, token)
            content = RecordDict({"attach": ticket.encode()})
            messages[node] = Message(content, node, ATTACH, ttl=_TTL, group_id=self._group_id)
            self._refused.pop(node, None)
        if not messages:
            return
        ids = list(self._grid.push_messages(messages.values()) or ())
        if len(ids) != len(messages):
            known = {message.metadata.message_id: node for node, message in messages.items()}
            self._attaching |= {known[i]: str(i) for i in ids if i in known}
        else:
            self._attaching |= {node: str(i) for node, i in zip(messages, ids, strict=True) if i}
        for node in messages.keys() - self._attaching.keys():
            self._refused[node] = gone("Flower did not accept a message to it: the node has left")

    def _look_for_refusals(self) -> None:
        """Read the replies to attach messages: in the simulation they come at once, in a deployment only to fail."""
        node_of = {message_id: node for node, message_id in self._attaching.items()}
        for message in self._grid.pull_messages(list(node_of)) if node_of else ():
            node = node_of.get(message.metadata.reply_to_message_id)
            if node is None:
                continue
            del self._attaching[node]
            self._handle_waiting()  # a client that says it joined has joined
            if node not in self._homes:
                self._refused[node] = refusal(message)
                self._awaited.discard(node)

    def _balance(self, nodes: Iterable[int]) -> None:
        """Spread clients evenly over the resident processes; whichever was free took their attach messages."""
        loads = Counter(dict.fromkeys(self._resident_connections(), 0))
        loads.update(home.connection for home in self._homes.values() if home.connection in loads)
        moves = {}
        for node in sorted(nodes):
            home = self._homes[node]
            if not loads or home.connection not in loads:
                continue
            least = min(loads, key=lambda c: (loads[c], c.id))
            if loads[home.connection] > loads[least] + 1:
                moves[node] = least
                loads[least] += 1
                loads[home.connection] -= 1
        self._adopt(moves)

    def _resident_connections(self) -> list[Connection]:
        found = {home.connection for home in self._homes.values() if home.resident and home.connection.closing is None}
        return sorted(found, key=lambda c: c.id)

    def _adopt(
        self, moves: Mapping[int, Connection], configs: Mapping[int, Mapping[str, object]] | None = None
    ) -> None:
        """Have other processes serve clients from now on, unless they read nothing any more.

        It takes one frame a process, however many clients move: a frame each would fill the line to it. `configs` are
        those of the nodes, where the clients are nowhere yet.
        """
        for connection in sorted(set(moves.values()), key=lambda c: c.id):
            nodes = [node for node, to in moves.items() if to is connection]
            moved = {node: self._homes[node].node_config if configs is None else configs[node] for node in nodes}
            frame = Frame({"kind": "adopt", "clients": [[node, dict(config)] for node, config in moved.items()]})
            if connection.send(partial(_same, frame)):
                self._homes |= {node: Home(connection, True, config) for node, config in moved.items()}

    # --- exchanging --------------------------------------------------------------------------------------------------
    def exchange(self, request: Request, timeout: float) -> Reply:
        """Ask all nodes of a request and wait until all have answered or `timeout` is over."""
        self._check_stopped()
        current = Exchange(request, timeout)
        for node, failure in self.attach_new(request.nodes, timeout).items():
            current.fail([node], failure.kind, failure.detail)
        self._exchange = current
        try:
            self._handle_waiting()
            self._send(current.open_nodes())
            self._wait(current)
        finally:
            current.over = True
            self._exchange = None
        return current.reply

    def _wait(self, current: Exchange) -> None:
        look = _FIRST_LOOK
        while current.open_nodes():
            left = current.timeout - current.elapsed()
            if left <= 0:
                self._give_up(current)
                return
            # Events are all there is to wait for, unless a client was invited anew. But Flower may raise a signal in a
            # thread of its own: that wakes no thread, and this one, if it is the main one, is to handle it.
            invited = any(node in self._homeless for node in current.open_nodes())
            if self._next_event(min(look if invited else _LONGEST_LOOK, left)) or not invited:
                continue
            look = min(1.5 * look, _LONGEST_LOOK)
            self._look_for_refusals()
            if current.elapsed() > self.options.attach_timeout:
                self._refused |= {n: gone(f"{why}; it did not come back") for n, why in self._homeless.items()}
            for node in [n for n in current.open_nodes() if n in self._homeless and n in self._refused]:
                refused = self._refused.pop(node)
                current.fail([node], refused.kind, refused.detail)
                self._attaching.pop(node, None)

    def _give_up(self, current: Exchange) -> None:
        """Answer for those that did not."""
        reason = f"no reply within {current.timeout:g} s: raise step-timeout, or see whether the client still runs"
        current.fail(current.open_nodes(), Kind.TIMEOUT, reason)
        # a process that is stuck while others work would hold up every step: the others take over its clients
        stuck = {s.connection for s in self._sent.values() if s.connection.closing is None}
        others = set(self._resident_connections()) - stuck
        self._sent.clear()
        for connection in stuck if others else ():
            if any(home.resident and home.connection is connection for home in self._homes.values()):
                connection.close(f"it did not reply within {current.timeout:g} s")
                self._lost(connection, connection.closing or "")

    def _send(self, nodes: Iterable[int]) -> None:
        """Send what the current exchange asks of `nodes` to where they are; invite those that are nowhere."""
        current = self._exchange
        if current is None:
            return
        by_connection: dict[Connection, list[int]] = {}
        invited = []
        for node in nodes:
            if node in self._homes:
                by_connection.setdefault(self._homes[node].connection, []).append(node)
            elif node in self._homeless and node not in self._attaching:
                invited.append(node)
        self._invite(invited)
        for connection, some in by_connection.items():
            self._number += 1
            self._sent[self._number] = sent = Sent(connection, current.part(some))
            if not connection.send(self._job(self._number, sent, current), asks=True) and connection.closing is None:
                del self._sent[self._number]
                current.fail(some, Kind.UNREACHABLE, "its process reads nothing any more")

    def _job(self, number: int, sent: Sent, current: Exchange) -> Job:
        """Return what makes the frame, in the thread that sends it, when those before it are out."""

        def make() -> Frame | None:
            if current.over:
                return None
            known, wire_dtype = {**sent.connection.sent_weights}, self.options.wire_dtype
            try:
                frame, sent.bytes_sent = encode_request(sent.request, number, sent=known, wire_dtype=wire_dtype)
                frame.text  # noqa: B018 - it may be too long
            except ProtocolError as error:
                self._endpoint.events.put(Unsent(number, str(error)))
                return None
            sent.connection.sent_weights = known
            return frame

        return make

    # --- what happens ------------------------------------------------------------------------------------------------
    def _next_event(self, timeout: float) -> bool:
        """Handle the next event; False if none comes in time."""
        try:
            event = self._endpoint.events.get(timeout=max(timeout, 0.0))
        except queue.Empty:
            return False
        self._handle(event)
        return True

    def _handle_waiting(self) -> None:
        while not self._endpoint.events.empty():
            self._handle(self._endpoint.events.get())

    def _handle(self, event: Event) -> None:
        if isinstance(event, Received):
            self._received(event.connection, event.frame)
        elif isinstance(event, Joined):
            self._joined(event)
        elif isinstance(event, Closed):
            self._lost(event.connection, event.reason)
        elif isinstance(event, Stopped):
            self._check_stopped()
        else:
            sent = self._sent.pop(event.number, None)
            if sent is not None and self._exchange is not None:
                raise cannot_ask(sent.request.stage, event.reason)

    def _joined(self, event: Joined) -> None:
        node = event.node
        self._awaited.discard(node)
        self._homes[node] = Home(event.connection, event.resident, event.node_config)
        self._homeless.pop(node, None)
        self._refused.pop(node, None)
        if self._exchange is not None and node in self._exchange.open_nodes():
            self._send([node])

    def _received(self, connection: Connection, frame: Frame) -> None:
        number = frame.header.get("number")
        sent = self._sent.get(number) if type(number) is int else None
        if type(number) is not int or sent is None or sent.connection is not connection or self._exchange is None:
            self.ignored["late"] += 1  # its exchange is over; or nobody asked this process
            return
        del self._sent[number]
        current = self._exchange
        try:
            reply = decode_reply(frame, sent.request)
        except ProtocolError as error:
            current.fail(sent.request.nodes, error.kind, f"bad reply: {error}")
            return
        elapsed = current.elapsed()
        reply.seconds = {node: min(seconds, elapsed) for node, seconds in reply.seconds.items()}
        reply.busy, reply.bytes_sent = min(reply.busy, elapsed), sent.bytes_sent
        current.add(reply)

    def _lost(self, connection: Connection, reason: str) -> None:
        """Find other homes for the clients of a process that is gone, and ask again what it was asked."""
        lost = {node: home for node, home in self._homes.items() if home.connection is connection}
        self._sent = {n: s for n, s in self._sent.items() if s.connection is not connection}
        if not lost:
            return
        survivors = [c for c in self._resident_connections() if c is not connection]
        log.warning(
            "The process of %d clients is gone (%s)%s.",
            *(len(lost), reason, ": the others take them over" if survivors else ""),
        )
        residents = [node for node in sorted(lost) if lost[node].resident] if survivors else []
        self._adopt({node: survivors[i % len(survivors)] for i, node in enumerate(residents)})
        for node in lost:
            if self._homes[node].connection is connection:
                del self._homes[node]
                self._homeless[node] = f"its process is gone ({reason})"
        current = self._exchange
        if current is None:
            return
        again = [node for node in current.open_nodes() if node in lost]
        current.moves.update(again)
        more = f"its process is gone ({reason}), for the {_MAX_MOVES + 1}th time in this exchange"
        current.fail([node for node in again if current.moves[node] > _MAX_MOVES], Kind.UNREACHABLE, more)
        again = [node for node in again if node in self._homeless]
        if reason.startswith(REFUSED):  # it would do so again: no outage, a mistake
            current.fail(again, Kind.MALFORMED, f"its stream was {reason}")
        none = f"its process is gone ({reason}), and no other is left to take it over"
        current.fail([node for node in again if lost[node].resident], Kind.UNREACHABLE, none)
        self._send([node for node in current.open_nodes() if node in lost])


def _same(frame: Frame) -> Frame:
    return frame
