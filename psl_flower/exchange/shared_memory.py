"""Memory that two processes of one machine share: payloads lie there, and the stream only says so.

Note [Shared memory]: between two processes of one machine gRPC encrypts, cuts up and copies what both could simply look
at: 2 MB took 13 ms, and take one here. Each direction has a memory of its own. It has no name in any file system: the
server makes it with ``memfd_create``, and the client opens it through the server's ``/proc/PID/fd``, which the system
lets only the same user do, and which it is told of over its stream, where it has shown its token. So no other user can
read or write it, and nothing is left of it when the two processes have ended, however they do. Its size is sealed:
nobody can cut it off under the other's hands. Who reads copies first and checks the copy, which nobody else can change.

Who writes never waits: where the other has not yet said that it has copied what lies there, or a payload is too long
for the memory, it takes the stream. Systems other than Linux have no such memory, and always do that.
"""

from __future__ import annotations

import mmap
import os
import secrets
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from psl_flower.errors import ProtocolError

MEMORY_BYTES = 64 * 2**20  # of each direction; the system gives it out as it is written to
_LEAST_BYTES = 2**14  # less is sent as fast
_ALIGNMENT = 64
_PREFIX = "psl-flower-"


def whereabouts() -> str:
    """Return what processes have in common that may share memory: machine, process ids and user; "" if none may."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')} {os.getuid()}" if hasattr(os, "memfd_create") else ""
    except OSError:  # not Linux, or /proc is hidden
        return ""


class Outgoing:
    """The writer's side of one direction: holds one payload until the reader has copied it.

    Parameters
    ----------
    view : memoryview
        Of the memory.
    """

    def __init__(self, view: memoryview) -> None:
        self._view = view
        self._written = self._taken = 0
        self.open = False  # whether the other is known to have the memory

    def has_room(self, length: int) -> bool:
        """Return whether a payload of so many bytes can be put, and is worth it."""
        return self.open and self._written == self._taken and _LEAST_BYTES <= length <= len(self._view)

    def put(self, pieces: Iterable[memoryview]) -> None:
        """Write a payload that there is room for."""
        begin = 0
        for piece in pieces:
            self._view[begin : begin + len(piece)] = piece
            begin += len(piece)
        self._written += 1

    def acknowledge(self, taken: int) -> None:
        """Note how many payloads the other has copied so far."""
        if not self._taken <= taken <= self._written:
            raise ProtocolError(
                f"{taken} payloads cannot have been taken out of shared memory, {self._written} lay there"
            )
        self._taken = taken


class Incoming:
    """The reader's side of one direction.

    Parameters
    ----------
    view : memoryview
        Of the memory.
    """

    def __init__(self, view: memoryview) -> None:
        self._view = view
        self.taken = 0  # payloads copied so far

    def take(self, length: int) -> memoryview:
        """Return a copy of the payload of so many bytes that lies there."""
        if length > len(self._view):
            raise ProtocolError(f"a payload of {length} bytes does not lie in a shared memory of {len(self._view)}")
        copy = aligned(length)
        copy[:] = self._view[:length]
        self.taken += 1
        return copy


@dataclass(frozen=True, eq=False)
class SharedMemory:
    """Both directions, as one of the two processes sees them."""

    outgoing: Outgoing
    incoming: Incoming


class Offer:
    """The server's word of memory that it has made for one client process.

    Raises
    ------
    OSError
        If the system gives none.
    """

    def __init__(self) -> None:
        self._name = _PREFIX + secrets.token_hex(16)
        self._files: list[int] = []
        try:
            for _ in range(2):
                self._files.append(_make(self._name))
            down, up = (mmap.mmap(file, MEMORY_BYTES) for file in self._files)
        except OSError:
            self.close()
            raise
        self.memory = SharedMemory(Outgoing(memoryview(down)), Incoming(memoryview(up)))

    def header(self) -> dict[str, Any]:
        """Return what the client needs to find it."""
        return {"name": self._name, "process": os.getpid(), "files": list(self._files)}

    def close(self) -> None:
        """Let nobody else open it; who has it keeps it."""
        for file in self._files:
            os.close(file)
        self._files.clear()


def accept(header: Mapping[str, Any]) -> SharedMemory:
    """Return the memory that a server offers.

    Raises
    ------
    OSError
        If it is not to be found here: the server may be in another container.
    ProtocolError
        If this is no offer.
    """
    name, process, files = header.get("name"), header.get("process"), header.get("files")
    numbers = [process, *files] if isinstance(files, list) and len(files) == 2 else [None]
    if not isinstance(name, str) or not name.startswith(_PREFIX) or any(type(n) is not int or n < 0 for n in numbers):
        raise ProtocolError(f"not an offer of shared memory: {dict(header)!r:.200}")
    down, up = (_open(f"/proc/{process}/fd/{file}", name) for file in numbers[1:])
    memory = SharedMemory(Outgoing(memoryview(up)), Incoming(memoryview(down)))
    memory.outgoing.open = True
    return memory


def aligned(length: int) -> memoryview:
    """Return so many bytes of new memory, not zeroed, that begin where tensors of torch's own do.

    Sums over tensors that begin elsewhere round differently on some processors.
    """
    space = np.empty(length + _ALIGNMENT, np.uint8)
    begin = -space.ctypes.data % _ALIGNMENT
    return memoryview(space[begin : begin + length].data)


def _make(name: str) -> int:
    import fcntl  # Windows has none

    file = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with suppress(OSError):  # it is the directory that keeps others out, this says it once more
        os.fchmod(file, 0o600)
    os.ftruncate(file, MEMORY_BYTES)
    fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return file


def _open(path: str, name: str) -> mmap.mmap:
    # before it is opened: under this path another machine, or container, may have anything
    if os.readlink(path) != f"/memfd:{name} (deleted)":
        raise FileNotFoundError(f"{path} is not the memory {name}")
    file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        return mmap.mmap(file, MEMORY_BYTES)
    finally:
        os.close(file)
