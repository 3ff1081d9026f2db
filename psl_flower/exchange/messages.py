"""The message carrier: one Flower message per client and exchange. Works wherever Flower works."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterable, Mapping

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from psl_flower.errors import ProtocolError
from psl_flower.exchange.base import Carrier
from psl_flower.exchange.codec import CONSTANTS, KEEP, Sent, cannot_ask, decode_reply, encode_request
from psl_flower.exchange.frames import Frame
from psl_flower.exchange.limits import MAX_KEPT
from psl_flower.exchange.records import content_to_frame, frame_to_content
from psl_flower.failures import Failure, Kind
from psl_flower.flower import error_kind, is_deployment
from psl_flower.protocol import REFUSED, Reply, Request
from psl_flower.tree import num_bytes

# Note [Pulling]: an exchange takes 0.1 s in the simulation and 5 s in a deployment, so no fixed interval suits both.
# Waiting a fixed share of the time already spent bounds both the overhead (that share) and the number of pulls.
_FIRST_WAIT = 0.001  # seconds
_LONGEST_WAIT = 0.25  # seconds
_WAIT_SHARE = 0.05
# Messages without a reply in time that are still asked for, to be counted.
_MOST_LATE = 256
_MOST_FORGOTTEN = 2  # times that a node need not have what it was sent, before it is sent everything every time
_REFUSAL_SECONDS = 600.0  # that Flower keeps what tells a node it is not let in
_LONGEST_REASON = 4000  # characters of a client's error that are kept


class MessageCarrier(Carrier):
    """Pushes Flower messages and pulls their replies with a short, adaptive wait.

    Every message holds all that its request needs, trainable weights included. What stays as it is, frozen weights and
    buffers, is sent to a node once, and named after that: a process that does not have it says so, and is sent it with
    the same request. In a deployment each message is answered in a new process, so there the node keeps it; more
    than `MAX_KEPT` is sent every time.

    Parameters
    ----------
    grid : Grid
        Flower's.
    group_id : str
        Marks the messages of a run.
    """

    def __init__(self, grid: Grid, group_id: str = "psl_flower") -> None:
        self._grid = grid
        self._group_id = group_id
        self._keep = is_deployment(grid)
        self._sent: dict[int, Sent] = {}  # by node, constants only
        self._named: set[int] = set()  # nodes whose last message named some, which they must have
        self._forgot: Counter[int] = Counter()  # by node, how often it did not have what it was sent
        self._late: deque[str] = deque(maxlen=_MOST_LATE)  # messages whose replies are not waited for any more

    def node_ids(self) -> Iterable[int]:
        """Return the ids of the nodes that are connected now."""
        self._check_stopped()
        return self._grid.get_node_ids()

    def exchange(self, request: Request, timeout: float) -> Reply:
        """Ask all nodes of a request and wait until all have answered or `timeout` is over."""
        reply = Reply()
        if not request.nodes:
            return reply
        begin = time.monotonic()
        single = {node: request.take([i]) for i, node in enumerate(request.nodes)}
        waiting = self._send(single.values(), timeout, reply)
        while waiting:
            self._check_stopped()
            forgot: list[Request] = []
            for message in self._grid.pull_messages([*waiting, *self._late]):
                message_id = message.metadata.reply_to_message_id
                if message_id not in waiting:
                    self._ignore(message)
                else:
                    request_to = single[waiting.pop(message_id)]
                    found = _reply(request_to, message, time.monotonic() - begin)
                    if self._has_forgotten(request_to, found):
                        forgot.append(request_to)
                    else:
                        reply.add(found)
            waiting |= self._send(forgot, timeout, reply)
            elapsed = time.monotonic() - begin
            if elapsed >= timeout:
                break
            if waiting:
                time.sleep(min(max(_FIRST_WAIT, _WAIT_SHARE * elapsed), _LONGEST_WAIT, timeout - elapsed))
        for node in waiting.values():
            reason = f"no reply within {timeout:g} s: raise step-timeout, or see whether the client still runs"
            reply.failures[node] = Failure(Kind.TIMEOUT, reason)
        self._late.extend(waiting)
        return reply

    def _send(self, requests: Iterable[Request], timeout: float, reply: Reply) -> dict[str, int]:
        """Send requests, a node each; return the nodes waited for by message id. What is not sent fails in `reply`."""
        messages = {}
        for each in requests:
            (node,) = each.nodes
            needed = {(part, CONSTANTS): w.constants_version for part, w in each.weights.items() if w.constants}
            # a node that forgets again and again, or cannot keep so much, is sent everything at once
            large = self._keep and sum(num_bytes(dict(w.constants)) for w in each.weights.values()) > MAX_KEPT
            every_time = large or self._forgot[node] > _MOST_FORGOTTEN
            known = {} if every_time else self._sent.get(node, {})
            (self._named.add if needed.items() & known.items() else self._named.discard)(node)
            keep = self._keep and not every_time and bool(needed.items() - known.items())
            try:
                frame, size = encode_request(each, 0, sent=dict(known))
                content = frame_to_content(Frame({**frame.header, KEEP: keep}, frame.buffers))
            except ProtocolError as error:
                raise cannot_ask(each.stage, error) from error
            self._sent[node] = {**known, **needed}
            ttl = max(timeout, 1.0)  # a reply later than `timeout` is of no use: let Flower drop it
            messages[node] = Message(content, node, each.message_type, ttl=ttl, group_id=self._group_id)
            reply.bytes_sent += size
        if not messages:
            return {}
        waiting, refused = self._push(messages)
        accepted = set(waiting.values())
        reply.failures |= {n: Failure(Kind.UNREACHABLE, refused) for n in messages if n not in accepted}
        return waiting

    def _has_forgotten(self, request: Request, reply: Reply) -> bool:
        """Return whether a node was to have weights that its process does not have; they are sent with its next."""
        (node,) = request.nodes
        failure = reply.failures.get(node)
        if failure is None or failure.kind is not Kind.FORGOTTEN or node not in self._named:
            return False
        self._sent.pop(node, None)
        self._forgot[node] += 1
        return True

    def refuse(self, node: int, reason: str) -> None:
        """Tell a node that it is not let in; whether it hears that, nobody waits for."""
        content = RecordDict({REFUSED: ConfigRecord({"reason": reason})})
        message = Message(content, node, f"query.{REFUSED}", ttl=_REFUSAL_SECONDS, group_id=self._group_id)
        self._grid.push_messages([message])

    def _ignore(self, message: Message) -> None:
        """Count a reply nobody waits for."""
        message_id = message.metadata.reply_to_message_id
        if message_id not in self._late:
            self.ignored["duplicate"] += 1
            return
        self._late.remove(message_id)
        if not message.has_error():  # else: Flower says that it has dropped the message
            self.ignored["late"] += 1

    def _push(self, messages: Mapping[int, Message]) -> tuple[dict[str, int], str]:
        """Return the nodes waited for by message id, and why the others are not."""
        refused = "Flower did not accept a message to it: the node has left, or the message is too large (see the log)"
        pushed = list(self._grid.push_messages(messages.values()) or ())
        ids = [str(i) for i in pushed if i]
        if len(pushed) == len(messages):
            # a grid may also mark the place of a refused message with an empty id or None
            return {str(i): node for i, node in zip(pushed, messages, strict=True) if i}, refused
        # fewer ids than messages: grids that number the message itself still tell which
        known = {message.metadata.message_id: node for node, message in messages.items()}
        if all(i in known for i in ids):
            return {i: known[i] for i in ids}, refused
        return {}, f"Flower accepted {len(ids)} of {len(messages)} messages and does not say which"


def _reply(request: Request, message: Message, elapsed: float) -> Reply:
    (node,) = request.nodes
    if message.has_error():
        reason = f"error {message.error.code}: {message.error.reason}"[:_LONGEST_REASON]
        return Reply(failures={node: Failure(error_kind(message.error.code), reason)}, seconds={node: elapsed})
    try:
        reply = decode_reply(content_to_frame(message.content), request)
    except ProtocolError as error:
        return Reply(failures={node: Failure(error.kind, f"bad reply: {error}")}, seconds={node: elapsed})
    # Time in Flower's queues says nothing of the client, so it is asked; it cannot claim more than has passed.
    reply.seconds, reply.busy = {node: min(reply.seconds[node], elapsed)}, min(reply.busy, elapsed)
    return reply
