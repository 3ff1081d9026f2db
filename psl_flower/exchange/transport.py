"""Which carrier a run uses."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import replace

from flwr.serverapp import Grid

from psl_flower.checks import check_choice
from psl_flower.errors import ConfigError
from psl_flower.exchange.base import Carrier
from psl_flower.exchange.messages import MessageCarrier
from psl_flower.exchange.streams import StreamCarrier, StreamOptions
from psl_flower.flower import cluster_host, is_simulation
from psl_flower.grid import InProcessGrid
from psl_flower.protocol import Reply, Request
from psl_flower.temporary_folder import check_temporary_folder
from psl_flower.threads import warn_of_spinning

log = logging.getLogger("flwr.psl_flower")

TRANSPORTS = ("auto", "messages", "streams")


def open_carrier(grid: Grid, transport: str = "auto", options: StreamOptions | None = None) -> Carrier:
    """Open the carrier of a run.

    Parameters
    ----------
    grid : Grid
    transport : str
        "streams": a step takes milliseconds, but clients must reach the ServerApp's address. "messages": works wherever
        Flower does, at 0.1 s an exchange in the simulation and 5 s in a deployment. "auto": streams, and messages if a
        client cannot open its stream.
    options : StreamOptions, optional
        Of streams.

    Raises
    ------
    ConfigError
        If `grid` is none, or an option is out of range.
    """
    check_choice(transport, "transport", TRANSPORTS)
    if not callable(getattr(grid, "push_messages", None)):  # one that wraps another need not be of its class
        raise ConfigError(f"grid must be the Grid that Flower gives main, or an InProcessGrid, got {grid!r:.80}")
    if is_simulation(grid):
        check_temporary_folder()  # else Ray fails in it, in two hundred lines
        warn_of_spinning()
    if transport == "auto" and isinstance(grid, InProcessGrid):
        log.info("Transport: messages within one process.")
        transport = "messages"
    if transport == "messages":
        return MessageCarrier(grid)
    options = options or StreamOptions()
    if (options.bind, options.advertise) == (StreamOptions.bind, "") and (host := cluster_host(grid)):
        log.info("Ray has several machines: clients connect to this one's address in it, %s", host)
        options = replace(options, bind=f"{host}:0")
    return StreamCarrier(grid, options) if transport == "streams" else AutoCarrier(grid, options)


class AutoCarrier(Carrier):
    """Streams; messages from the moment a client cannot open its stream.

    The whole run changes over if one of the clients that are there first cannot: a step takes as long as its slowest
    client, so one that needs messages makes all wait for Flower's messages anyway. Clients that come later and cannot
    are not let in, the others keep their streams. One whose stream breaks is another matter, and the stream carrier's.

    Parameters
    ----------
    grid : Grid
    options : StreamOptions, optional
    """

    def __init__(self, grid: Grid, options: StreamOptions | None = None) -> None:
        self._grid = grid
        self._options = options or StreamOptions()
        self._streams: StreamCarrier | None = None
        self._carrier: Carrier
        self._streaming = False  # whether the clients that were there first have opened theirs
        try:
            self._carrier = self._streams = StreamCarrier(grid, self._options)
        except ConfigError as error:
            self._fall_back(str(error))

    def node_ids(self) -> Iterable[int]:
        """Return the ids of the nodes that are connected now."""
        return self._carrier.node_ids()

    def exchange(self, request: Request, timeout: float) -> Reply:
        """Ask all nodes of a request and wait until all have answered or `timeout` is over."""
        self._check_stopped()
        if self._streams is not None and not self._streaming and request.nodes:
            failures = self._streams.attach_new(request.nodes, timeout)
            self._streaming = not failures
            if failures:
                node, reason = next(iter(failures.items()))
                more = f" ({len(failures)} of {len(request.nodes)} clients failed so)" if len(failures) > 1 else ""
                self._fall_back(f"node {node}: {reason}{more}")
        return self._carrier.exchange(request, timeout)

    def refuse(self, node: int, reason: str) -> None:
        """Tell a node, where that is possible, that it is not let in."""
        self._carrier.refuse(node, reason)

    def stop(self) -> None:
        """Have the exchange under way, and every later one, raise StoppedError; for other threads to call."""
        super().stop()
        self._carrier.stop()

    def close(self) -> None:
        """Release what the carriers hold."""
        self._carrier.close()

    def _fall_back(self, reason: str) -> None:
        log.warning("Transport: messages instead of streams, which will be slow: %s", reason)
        if self._streams is not None:
            self._streams.close()
            self._streams = None
        self._carrier = MessageCarrier(self._grid)
