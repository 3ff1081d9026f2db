"""What a carrier is: one exchange of a request and its replies with many clients at once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable
from functools import cached_property
from typing import Self

from psl_flower.errors import StoppedError
from psl_flower.protocol import Reply, Request


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
    def exchange(self, request: Request, timeout: float) -> Reply:
        """Ask all nodes of a request and wait until all have answered or `timeout` is over.

        Parameters
        ----------
        request : Request
        timeout : float
            Seconds.

        Returns
        -------
        Reply
            It says something of each node; what a client did wrong is a failure in it, never raised. Its contents are
            not checked against the stage yet.

        Raises
        ------
        StoppedError
            After `stop`.
        ProtocolError
            If the request can be sent to no client.
        """

    def refuse(self, node: int, reason: str) -> None:  # noqa: B027 - a carrier may have no way to say so
        """Tell a node, where that is possible, that it is not let in."""

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

    def __exit__(self, *_: object) -> None:
        self.close()
