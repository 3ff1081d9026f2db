"""Memory that two processes of one machine share: frames lie there, and a pipe says so.

Note [Shared memory]: between two processes of one machine gRPC encrypts, cuts up and copies what both could simply look
at: 2 MB took 13 ms, and take one here. There is one memory, half of it for each direction, and a pipe for each. They
have no names in any file system: the server makes them, and the client opens them through the server's
``/proc/PID/fd``, which the system lets only the same user do, and which it is told of over its stream, where it has
shown its token. So no other user can read or write them, and nothing is left of them when the two processes have ended,
however they do. The size of the memory is sealed: nobody can cut it off under the other's hands. Who reads copies first
and checks the copy, which nobody else can change.

Who writes never waits: where the other has not yet said that it has copied what lies there, or a frame is too long for
the memory, it takes the stream. Frames are numbered, so it does not matter which of the two is looked at first. Systems
other than Linux have no such memory, and always take the stream.

Both processes have both ends of the pipes. So a write to one raises no signal where the other process is gone, and a
pipe never tells of an end, which a forked process would hide: the stream does.
"""

from __future__ import annotations

import mmap
import os
import secrets
import struct
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, suppress
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
        Of its half of the memory.
    bell : int
        The pipe.
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
        with suppress(BlockingIOError):  # full: the other says that it has read what it has not, and is not helped
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
        self._view.release()
        os.close(self._bell)


class Incoming:
    """The reader's side of one direction.

    Parameters
    ----------
    view : memoryview
        Of its half of the memory.
    bell : int
        The pipe.
    """

    def __init__(self, view: memoryview, bell: int) -> None:
        self._view, self.bell = view, bell
        self.taken = 0  # frames copied so far
        self._next: tuple[int, int] | None = None

    def look(self) -> int | None:
        """Return the number of the frame that lies there, if one does; what the pipe says is off the pipe then."""
        try:
            told = os.read(self.bell, _RING.size)
        except BlockingIOError:
            return None if self._next is None else self._next[0]
        if self._next is not None or len(told) != _RING.size:
            raise ProtocolError("a pipe tells of one frame in shared memory at a time, in 16 bytes")
        self._next = _RING.unpack(told)
        return self._next[0]

    def take(self) -> memoryview:
        """Return a copy of the frame that lies there, as `look` has said."""
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
        self._view.release()
        os.close(self.bell)
        self.bell = -1


class SharedMemory:
    """Both directions, as one of the two processes sees them.

    Parameters
    ----------
    file : int
        Of the memory; it may be closed after this.
    length : int
        Bytes of each direction.
    outgoing, incoming : int
        The pipe of each; they are closed with this.
    halves : tuple of int
        Which half of the memory is for what goes out, and which for what comes in.
    """

    def __init__(self, file: int, length: int, outgoing: int, incoming: int, halves: tuple[int, int]) -> None:
        self._map = mmap.mmap(file, 2 * length)
        with memoryview(self._map) as whole:
            out, into = (whole[half * length : (half + 1) * length] for half in halves)
        self.outgoing, self.incoming = Outgoing(out, outgoing), Incoming(into, incoming)

    def close(self) -> None:
        """Use it no more: its files are closed, and its memory is given back, once."""
        if self._map.closed:
            return
        self.outgoing.close()
        self.incoming.close()
        self._map.close()


class Offer:
    """The server's word of memory that it has made for one client process.

    Raises
    ------
    OSError
        If the system gives none.
    """

    def __init__(self) -> None:
        self._name = _PREFIX + secrets.token_hex(16)
        with ExitStack() as made:
            self._file: int | None = _kept(made, _make_memory(self._name))
            self._pipes = [_kept(made, _make_pipe()) for _ in range(2)]
            down, up = self._pipes
            self.memory = SharedMemory(self._file, MEMORY_BYTES, down, up, halves=(0, 1))
            made.pop_all()

    def header(self) -> dict[str, Any]:
        """Return what the client needs to find it."""
        pipes = [os.fstat(pipe).st_ino for pipe in self._pipes]
        files = [self._file, *self._pipes]
        return {"name": self._name, "bytes": MEMORY_BYTES, "process": os.getpid(), "files": files, "pipes": pipes}

    def close(self) -> None:
        """Let nobody else open the memory; who has it keeps it."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


def accept(header: Mapping[str, Any]) -> SharedMemory:
    """Return the memory that a server offers.

    Raises
    ------
    OSError
        If it is not to be found here: the server may be in another container.
    ProtocolError
        If this is no offer.
    """
    fields: list[Any] = [header.get(key) for key in ("name", "process", "bytes", "files", "pipes")]
    name, process, length, files, pipes = fields
    lists = [each if isinstance(each, list) else [] for each in (files, pipes)]
    numbers = [process, length, *lists[0], *lists[1]]
    whole = list(map(len, lists)) == [3, 2] and all(type(n) is int and n >= 0 for n in numbers) and length
    if not whole or not isinstance(name, str) or not name.startswith(_PREFIX):
        raise ProtocolError(f"not an offer of shared memory: {dict(header)!r:.300}")
    what = [f"/memfd:{name} (deleted)", *(f"pipe:[{pipe}]" for pipe in lists[1])]
    with ExitStack() as opened:
        paths = (f"/proc/{process}/fd/{file}" for file in lists[0])
        file, down, up = (_kept(opened, _open(*each)) for each in zip(paths, what, strict=True))
        if (found := os.fstat(file).st_size) != 2 * length:
            raise FileNotFoundError(f"a memory of {found} bytes is not one of 2 times {length}")
        memory = SharedMemory(file, length, up, down, halves=(1, 0))
        opened.pop_all()
    os.close(file)
    memory.outgoing.open = True
    return memory


def aligned(length: int) -> memoryview:
    """Return so many bytes of new memory, not zeroed, that begin where tensors of torch's own do.

    Sums over tensors that begin elsewhere round differently on some processors.
    """
    space = np.empty(length + _ALIGNMENT, np.uint8)
    begin = -space.ctypes.data % _ALIGNMENT
    return memoryview(space[begin : begin + length].data)


def _make_memory(name: str) -> int:
    import fcntl  # Windows has none

    with ExitStack() as made:
        file = _kept(made, os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
        with suppress(OSError):  # it is the directory that keeps others out, this says it once more
            os.fchmod(file, 0o600)
        os.ftruncate(file, 2 * MEMORY_BYTES)
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        made.pop_all()
    return file


def _make_pipe() -> int:
    with ExitStack() as ends:
        end, _ = (_kept(ends, each) for each in os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK))
        return _open(f"/proc/self/fd/{end}", f"pipe:[{os.fstat(end).st_ino}]")


def _open(path: str, what: str) -> int:
    """Open what is there, for reading and writing, if it is that."""
    # before it is opened: another machine, or container, may have anything there; and after: it may have changed
    _check(path, what)
    file = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        _check(f"/proc/self/fd/{file}", what)
    except OSError:
        os.close(file)
        raise
    return file


def _check(path: str, what: str) -> None:
    if os.readlink(path) != what:
        raise FileNotFoundError(f"{path} is not {what}")


def _kept(files: ExitStack, file: int) -> int:
    """Have a file closed with others."""
    files.callback(os.close, file)
    return file
