"""What the stream carrier keeps of the clients, of their attaching, and of an exchange under way."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from flwr.app import ConfigRecord, Message

from psl_flower.exchange.streams.connection import Connection
from psl_flower.failures import Failure, Kind
from psl_flower.flower import error_kind
from psl_flower.protocol import Reply, Request

log = logging.getLogger("flwr.psl_flower")

_TOLD_SECONDS = 5.0  # between two words of how many are connected


@dataclass
class Home:
    """Where a client is served, and what another process needs to take it over."""

    connection: Connection
    resident: bool
    node_config: Mapping[str, object]


@dataclass(eq=False)
class Exchange:
    """One exchange under way."""

    request: Request
    timeout: float
    begin: float = field(default_factory=time.monotonic)
    reply: Reply = field(default_factory=Reply)
    moves: Counter[int] = field(default_factory=Counter)
    over: bool = False

    def __post_init__(self) -> None:
        self._position = {node: i for i, node in enumerate(self.request.nodes)}
        self._open = set(self.request.nodes)

    def elapsed(self) -> float:
        """Return the seconds since it began."""
        return time.monotonic() - self.begin

    def add(self, reply: Reply) -> None:
        """Take a reply; nodes that were given up in the meantime have none any more."""
        late = reply.answered() - self._open
        if not late:
            self.reply.add(reply)
            self._open -= reply.answered()

    def fail(self, nodes: Iterable[int], kind: Kind, reason: str) -> None:
        """Give nodes up that have not answered."""
        failed = [node for node in nodes if node in self._open]
        self.reply.failures |= dict.fromkeys(failed, Failure(kind, reason))
        self.reply.seconds |= dict.fromkeys(failed, self.elapsed())
        self._open.difference_update(failed)

    def open_nodes(self) -> list[int]:
        """Return the nodes that have not answered."""
        return [node for node in self.request.nodes if node in self._open] if self._open else []

    def part(self, nodes: Iterable[int]) -> Request:
        """Return the request to some of the nodes."""
        return self.request.take([self._position[node] for node in nodes])


@dataclass(eq=False)
class Sent:
    """A request on its way to a process."""

    connection: Connection
    request: Request
    bytes_sent: int = 0


class Wait:
    """How long clients have been waited for, and how many are there."""

    def __init__(self, timeout: float, clients: int) -> None:
        self.timeout, self.clients, self.connected = timeout, clients, 0
        self._begin = self._told = time.monotonic()

    def left(self) -> float:
        """Return the seconds that are left."""
        return self._begin + self.timeout - time.monotonic()

    def tell(self, more: int) -> None:
        """Say now and then how many are connected: those of earlier groups, and `more`."""
        now = time.monotonic()
        if now - self._told >= _TOLD_SECONDS:
            self._told = now
            done = self.connected + more
            log.info("%d of %d clients connected, %.0f s", done, self.clients, now - self._begin)


def connected(clients: int, streams: int) -> str:
    """Return what is told of clients that have streams."""
    who = "1 client is" if clients == 1 else f"{clients} clients are"
    return f"{who} connected by {streams} stream{'s' * (streams != 1)}"


def gone(reason: str) -> Failure:
    """Return the failure of a client that cannot be reached."""
    return Failure(Kind.UNREACHABLE, reason)


def refusal(message: Message) -> Failure:
    """Return why an attach message did not lead to a stream."""
    if message.has_error():
        return Failure(error_kind(message.error.code), f"error {message.error.code}: {message.error.reason}")
    record = message.content.config_records.get("attach", ConfigRecord())
    return gone(str(record.get("failure") or record.get("ended") or "its reply names no reason"))
