"""What the stream carrier keeps of the clients, and of an exchange under way."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from psl_flower.exchange.streams.endpoint import Connection
from psl_flower.failures import Failure, Kind
from psl_flower.protocol import Reply, Request


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
