"""How streams are configured."""

from __future__ import annotations

import re
from dataclasses import dataclass

from psl_flower.checks import check_choice, check_float, check_int
from psl_flower.errors import ConfigError
from psl_flower.exchange.limits import MAX_FRAME_BYTES

WIRE_DTYPES = ("float32", "float16", "bfloat16", "int8")


@dataclass(frozen=True, kw_only=True)
class StreamOptions:
    """Where the endpoint listens and how tensors travel.

    Parameters
    ----------
    bind : str
        ``host:port`` that the ServerApp listens on; port 0 takes a free one. The default is reached from this machine
        only, as a simulation on one machine needs; on a Ray cluster of several, the default is a free port of this
        machine's address in it. ``0.0.0.0:9095`` is reached from anywhere.
    advertise : str
        ``host`` or ``host:port`` that clients connect to, if it is not `bind`: the server's public name, or a proxy's.
    wire_dtype : str
        How floating-point activations and their gradients travel: "float32" sends them as they are, exactly; "float16"
        and "bfloat16" halve the bytes, "int8" quarters them. Weights and parameter gradients are always exact.
    sum_gradients : bool
        Whether a process sends one sum of its clients' parameter gradients. False: one by one, where each client's
        share must be seen.
    shared_memory : bool
        Whether tensors go through shared memory where a client's process is on the ServerApp's machine and of the same
        user. False: all goes by stream.
    attach_timeout : float
        Seconds for all clients to open their streams, at the start and after a loss.
    max_frame_bytes : int
        The largest frame let in from a client.
    """

    bind: str = "127.0.0.1:0"
    advertise: str = ""
    wire_dtype: str = "float32"
    sum_gradients: bool = True
    shared_memory: bool = True
    attach_timeout: float = 120.0
    max_frame_bytes: int = MAX_FRAME_BYTES

    def __post_init__(self) -> None:
        check_choice(self.wire_dtype, "wire_dtype", WIRE_DTYPES)
        check_float(self.attach_timeout, "attach_timeout", above=0.0)
        check_int(self.max_frame_bytes, "max_frame_bytes", least=2**16)
        split_address(self.bind, "bind")
        if self.advertise:
            split_address(self.advertise, "advertise", port_needed=False)

    def address(self, port: int) -> str:
        """Return ``host:port`` for clients, given the port the endpoint listens on."""
        host, named = split_address(self.advertise or self.bind, "advertise", port_needed=False)
        return f"{host}:{named or port}"


def split_address(address: str, name: str, *, port_needed: bool = True) -> tuple[str, int]:
    """Return host and port of ``host:port``; port 0 if there is none. IPv6 hosts stand in brackets.

    Raises
    ------
    ConfigError
        If it is not of that form.
    """
    found = _ADDRESS.fullmatch(address)
    if found is None or (port_needed and not found[2]) or int(found[2] or 0) >= 2**16:
        form = "host:port" if port_needed else "host or host:port"
        raise ConfigError(f"{name} must be {form}, such as 0.0.0.0:9095 or [::]:9095, got {address!r}")
    return found[1], int(found[2] or 0)


_ADDRESS = re.compile(r"(\[[0-9a-fA-F:.%]+\]|[^\s:\[\]]+)(?::([0-9]{1,5}))?")
