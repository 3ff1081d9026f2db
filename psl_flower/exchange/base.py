"""What a carrier is: one exchange of requests and answers with many clients at once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import TracebackType
from typing import Self

from psl_flower.errors import StoppedError
from psl_flower.protocol import Reply, Request


@dataclass(frozen=True, eq=False)
class Answer:
    """What came of one request.

    Parameters
    ----------
    reply : Reply or None
        The decoded reply; its contents are not checked yet. Clients whose parameter gradients were summed on the way
        share one `Gradients` object.
    failure : str or None
        Why there is none; exactly one of the two is set.
    seconds : float
        How long the client worked on it, as far as the carrier can tell; without a reply, how long it was waited for.
    bytes_sent, bytes_received : int
        Bytes of tensors.
    """

    reply: Reply | None
    failure: str | None
    seconds: float
    bytes_sent: int = 0
    bytes_received: int = 0


class Carrier(ABC):
    """Carries requests to nodes and their replies back; a context manager.

    Nodes are Flower's node ids; which client lives on which node is the business of ``exchange.clients``.
    """

    _stopped = False

    @cached_property
    def ignored(self) -> Counter[str]:
        """How many replies came that nobody waited for, by kind: "late" or "duplicate"."""
        return Counter()

    @abstractmethod
    def node_ids(self) -> Iterable[int]:
        """Return the ids of the nodes that are connected now."""

    @abstractmethod
    def exchange(self, requests: Mapping[int, Request], timeout: float) -> dict[int, Answer]:
        """Send a request to each node and wait until all are answered or `timeout` is over.

        Parameters
        ----------
        requests : dict of int to Request
            Keyed by node id.
        timeout : float
            Seconds.

        Returns
        -------
        dict of int to Answer
            One for each request: never fewer, never raises for what a client did.

        Raises
        ------
        StoppedError
            After `stop`.
        """

    def stop(self) -> None:
        """Have the exchange under way, and every later one, raise StoppedError; for other threads to call."""
        self._stopped = True

    def _check_stopped(self) -> None:
        if self._stopped:
            raise StoppedError("the run was stopped from outside")

    def close(self) -> None:  # noqa: B027 - nothing to close by default
        """Release what the carrier holds."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
