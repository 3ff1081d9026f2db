"""Memory that two processes of one machine share: frames lie there, and a pipe says so.

Note [Shared memory]: between two processes of one machine gRPC encrypts, cuts up and copies what both could simply look
at: 2 MB took 13 ms, and take one here. Each direction has a memory and a pipe of its own. They have no names in any
file system: the server makes them, and the client opens them through the server's ``/proc/PID/fd``, which the system
lets only the same user do, and which it is told of over its stream, where it has shown its token. So no other user can
read or write them, and nothing is left of them when the two processes have ended, however they do. The size of the
memory is sealed: nobody can cut it off under the other's hands. Who reads copies first and checks the copy, which
nobody else can change.

Who writes never waits: where the other has not yet said that it has copied what lies there, or a frame is too long for
the memory, it takes the stream. Frames are numbered, so it does not matter which of the two is looked at first. Systems
other than Linux have no such memory, and always take the stream.
"""

from __future__ import annotations

import mmap
import os
import secrets
import struct
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from psl_flower.errors import ProtocolError

MEMORY_BYTES = 64 * 2**20  # of each direction; the system gives it out as it is written to
_ALIGNMENT = 64
_RING = struct.Struct("<QQ")  # what a pipe says: the number of a frame, and its bytes
_PREFIX = "psl-flower-"


def whereabouts() -> str:
    """Return what processes have in common that may share memory: machine, process ids and user; "" if none may."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')} {os.getuid()}" if hasattr(os, "memfd_create") else ""
    except OSError:  # not Linux, or /proc is hidden
        return ""


class Outgoing:
    """The writer's side of one direction: holds one frame until the reader has copied it.

    Parameters
    ----------
    view : memoryview
        Of the memory.
    bell : int
        The pipe's end to write to.
    """

    def __init__(self, view: memoryview, bell: int) -> None:
        self._view, self._bell = view, bell
        self._written = self._taken = 0
        self.open = False  # whether the other is known to have the memory

    def has_room(self, length: int) -> bool:
        """Return whether a frame of so many bytes can be put."""
        return self.open and self._written == self._taken and length <= len(self._view)

    def put(self, number: int, pieces: Iterable[bytes | memoryview]) -> None:
        """Write a frame that there is room for, and tell the other."""
        end = 0
        for piece in pieces:
            begin, end = end, end + len(piece)
            self._view[begin:end] = piece
        self._written += 1
        with suppress(OSError):  # it has ended, as its stream will tell
            os.write(self._bell, _RING.pack(number, end))

    def acknowledge(self, taken: int) -> None:
        """Note how many frames the other has copied so far."""
        if not self._taken <= taken <= self._written:
            raise ProtocolError(
                f"{taken} frames cannot have been taken out of shared memory, {self._written} lay there"
            )
        self._taken = taken

    def close(self) -> None:
        """Put nothing more."""
        self.open = False
        os.close(self._bell)


class Incoming:
    """The reader's side of one direction.

    Parameters
    ----------
    view : memoryview
        Of the memory.
    bell : int
        The pipe's end to read from.
    """

    def __init__(self, view: memoryview, bell: int) -> None:
        self._view, self.bell = view, bell
        self.taken = 0  # frames copied so far
        self.ended = False  # whether the other has closed the pipe
        self._next: tuple[int, int] | None = None

    def next(self) -> int | None:
        """Return the number of the frame that lies there, if one does."""
        if self._next is None:
            try:
                told = os.read(self.bell, _RING.size)
            except BlockingIOError:
                return None
            if len(told) != _RING.size:
                self.ended = True
                return None
            self._next = _RING.unpack(told)
        return self._next[0]

    def take(self) -> memoryview:
        """Return a copy of the frame that lies there, as `next` has said."""
        assert self._next is not None, "nothing lies there"
        (_, length), self._next = self._next, None
        if length > len(self._view):
            raise ProtocolError(f"a frame of {length} bytes does not lie in a shared memory of {len(self._view)}")
        copy = aligned(length)
        copy[:] = self._view[:length]
        self.taken += 1
        return copy

    def close(self) -> None:
        """Take nothing more."""
        os.close(self.bell)


@dataclass(frozen=True, eq=False)
class SharedMemory:
    """Both directions, as one of the two processes sees them."""

    outgoing: Outgoing
    incoming: Incoming

    def close(self) -> None:
        """Use it no more; the memory is gone with the last tensor that was read from it."""
        self.outgoing.close()
        self.incoming.close()


class Offer:
    """The server's word of memory that it has made for one client process.

    Raises
    ------
    OSError
        If the system gives none.
    """

    def __init__(self) -> None:
        self._name = _PREFIX + secrets.token_hex(16)
        self._files: list[int] = []  # of the client: two memories, and its ends of two pipes
        mine: list[int] = []
        try:
            self._files += [_make(self._name) for _ in range(2)]
            down, up = (memoryview(mmap.mmap(file, MEMORY_BYTES)) for file in self._files)
            for end in (1, 0):  # down, and up
                pipe = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
                mine.append(pipe[end])
                self._files.append(pipe[1 - end])
            self._pipes = [os.fstat(file).st_ino for file in mine]
        except OSError:
            self.close()
            for file in mine:
                os.close(file)
            raise
        self.memory = SharedMemory(Outgoing(down, mine[0]), Incoming(up, mine[1]))

    def header(self) -> dict[str, Any]:
        """Return what the client needs to find it."""
        return {"name": self._name, "process": os.getpid(), "files": list(self._files), "pipes": self._pipes}

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
    name, process, files, pipes = (header.get(key) for key in ("name", "process", "files", "pipes"))
    lists = [each if isinstance(each, list) else [] for each in (files, pipes)]
    numbers = [process, *lists[0], *lists[1]]
    whole = list(map(len, lists)) == [4, 2] and all(type(n) is int and n >= 0 for n in numbers)
    if not whole or not isinstance(name, str) or not name.startswith(_PREFIX):
        raise ProtocolError(f"not an offer of shared memory: {dict(header)!r:.300}")
    down, up, told, tell = (f"/proc/{process}/fd/{file}" for file in lists[0])
    views = [_map(path, f"/memfd:{name} (deleted)") for path in (down, up)]
    bell = _open(told, f"pipe:[{lists[1][0]}]", os.O_RDONLY)
    try:
        outgoing = Outgoing(views[1], _open(tell, f"pipe:[{lists[1][1]}]", os.O_WRONLY))
    except OSError:
        os.close(bell)
        raise
    outgoing.open = True
    return SharedMemory(outgoing, Incoming(views[0], bell))


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


def _map(path: str, what: str) -> memoryview:
    file = _open(path, what, os.O_RDWR)
    try:
        return memoryview(mmap.mmap(file, MEMORY_BYTES))
    finally:
        os.close(file)


def _open(path: str, what: str, how: int) -> int:
    # before it is opened: under this path another machine, or container, may have anything
    if os.readlink(path) != what:
        raise FileNotFoundError(f"{path} is not {what}")
    return os.open(path, how | os.O_CLOEXEC | os.O_NONBLOCK)
