"""Room for many connections: each is an open file."""

from __future__ import annotations

import logging

log = logging.getLogger("flwr.psl_flower")

_OTHERS = 256  # files that a process has open besides


def make_room(connections: int) -> None:
    """Raise this process's limit of open files as far as the system lets it, if so many connections need it."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + _OTHERS
    if soft == resource.RLIM_INFINITY or wanted <= soft:
        return
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed < wanted:
        log.warning(
            "%d clients connect, but this process may have only %d files open, one a connection: raise the limit "
            "(ulimit -Hn, or LimitNOFILE of the service) to %d",
            *(connections, allowed, wanted),
        )
