"""Room for many connections: each is an open file, and four more where it has shared memory."""

from __future__ import annotations

import logging
from contextlib import suppress

try:
    import resource

    _HAS_LIMIT = True
except ImportError:  # Windows has none
    _HAS_LIMIT = False

log = logging.getLogger("flwr.psl_flower")

_OTHERS = 256  # files that a process has open besides
_MOST_FILES = 2**16  # that are asked for without need
_FEWEST = 64  # connections that are let in, however few files there may be
_MOST_MEMORIES = 256  # that are shared, however many files there may be
_OF_MEMORY = 4  # two pipes and the memory, which until the process has opened it is two


def most_connections() -> int:
    """Return how many connections may be open at once, so that strangers cannot take all the files of this process.

    Its limit is raised first, as far as the system lets it.
    """
    files = _most_files()
    return max(_FEWEST, files - _OTHERS - _OF_MEMORY * _memories(files))


def most_memories() -> int:
    """Return with how many processes memory may be shared beside so many connections."""
    return _memories(_most_files())


def _memories(files: int) -> int:
    return min(_MOST_MEMORIES, max(0, files - _OTHERS) // 32)


def _most_files() -> int:
    if not _HAS_LIMIT:
        return _MOST_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return _MOST_FILES
    allowed = _MOST_FILES if hard == resource.RLIM_INFINITY else min(_MOST_FILES, hard)
    if soft < allowed:
        with suppress(OSError, ValueError):  # some systems allow fewer than they say
            resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
            soft = allowed
    return int(soft)


def make_room(connections: int) -> None:
    """Raise this process's limit of open files as far as the system lets it, if so many connections need it."""
    if not _HAS_LIMIT:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for_memories = min(_OF_MEMORY * _MOST_MEMORIES, -(-connections // 7))  # an eighth of what is not for others
    wanted = connections + _OTHERS + for_memories
    if soft == resource.RLIM_INFINITY or wanted <= soft:
        return
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed < wanted:
        log.warning(
            "%d clients connect, but this process may have only %d files open, one a connection and four more "
            "where memory is shared: raise the limit "
            "(ulimit -Hn, or LimitNOFILE of the service) to %d",
            *(connections, allowed, wanted),
        )
