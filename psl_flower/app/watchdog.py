"""Nothing of a run outlives the process that started it, however that one ends.

Signals can be caught, SIGKILL cannot: so a process of its own, which whoever kills the launcher's group does not reach,
waits for the end of a pipe that only the launcher holds open. The system closes it with the launcher, and the watchdog
then stops what the launcher had started, with all descendants, which it finds in ``/proc``, or with ``ps`` on systems
without (macOS, BSD). Windows has neither, nor the groups and signals that the launchers use: there they run in WSL.

This file is also the watchdog's program. It is started by its path, without torch, Flower or the rest of psl_flower.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

GRACE = 8.0  # seconds to end orderly: Ray and SuperLink take 2 to 4
_INTERVAL = 0.2


class Watchdog:
    """Stops processes when this one ends; a context manager, at whose end it does the same.

    A process that this one forks without exec, as multiprocessing's "fork" does, inherits the pipe and counts as it.
    """

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", str(Path(__file__).resolve())],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # out of reach of who kills the launcher's group, or closes its terminal
        )

    def watch(self, process: subprocess.Popen[bytes] | subprocess.Popen[str]) -> None:
        """Stop this process, too, and its descendants."""
        self._tell(f"watch {process.pid}")

    def forget(self, process: subprocess.Popen[bytes] | subprocess.Popen[str]) -> None:
        """Do not stop this process: it has ended, and its id may be given to another."""
        self._tell(f"forget {process.pid}")

    def remove(self, folder: str | Path) -> None:
        """Delete this folder after that."""
        self._tell(f"remove {folder}")

    def _tell(self, line: str) -> None:
        pipe: Any = self._process.stdin
        with suppress(OSError):  # the watchdog was killed: nothing to be done about it
            pipe.write(os.fsencode(f"{line}\n"))
            pipe.flush()

    def close(self) -> None:
        """Let it stop what is watched and not forgotten, and wait for that."""
        self._tell("end")  # the pipe may be open in a fork
        self._process.communicate()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def stop_trees(roots: Iterable[int], grace: float = GRACE) -> None:
    """Stop processes, their groups and all descendants: SIGTERM to them, SIGKILL after `grace` to all that live.

    Parameters
    ----------
    roots : iterable of int
        Ids of processes that lead a group each; they may have ended.
    grace : float
        Seconds to end orderly.
    """
    roots = set(roots)
    doomed = _trees(roots, {})
    for pid in roots & doomed.keys():
        _send(pid, signal.SIGTERM)
    end = time.monotonic() + grace
    while doomed and time.monotonic() < end:
        time.sleep(_INTERVAL)
        doomed = _trees(roots, doomed)
    while doomed:
        for pid in doomed:
            _send(pid, signal.SIGKILL)
        time.sleep(_INTERVAL)
        doomed = _trees(set(), doomed)


def _trees(roots: set[int], known: dict[int, str]) -> dict[int, str]:
    """Return what lives of `roots`, of their groups, of those `known`, and of all their descendants: when each began.

    What was known stays so when its parent has ended; what has the id of a known one, but began later, is another.
    """
    parents, begins, found = dict[int, int](), dict[int, str](), set[int]()
    for pid, parent, group, state, begin in _processes():
        if state.startswith("Z"):  # it has ended, whether or not somebody ever looks after it
            continue
        parents[pid], begins[pid] = parent, begin
        if known.get(pid) == begin or (group in roots and pid not in known):
            found.add(pid)
    grown = True
    while grown:
        children = {pid for pid, parent in parents.items() if parent in found} - found
        found |= children
        grown = bool(children)
    return {pid: begins[pid] for pid in found}


def _processes() -> Iterator[tuple[int, int, int, str, str]]:
    """Yield every process: its id, those of its parent and of its group, its state, and when it began."""
    if Path("/proc/self/stat").exists():
        for file in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):  # it has ended meanwhile
                words = file.read_text(errors="replace").rpartition(")")[2].split()  # after the name: fields 3 and on
                yield int(file.parent.name), int(words[1]), int(words[2]), words[0], words[19]
        return
    command = ["ps", "-A", "-o", "pid=,ppid=,pgid=,stat=,lstart="]
    for line in subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines():
        pid, parent, group, state, begin = line.split(None, 4)
        yield int(pid), int(parent), int(group), state, begin


def _send(pid: int, number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):  # it has ended, and perhaps another has its id
        os.kill(pid, number)


def main() -> None:
    """Heed the launcher until it ends."""
    watched, folders = set[int](), list[str]()
    for line in sys.stdin.buffer:
        word, _, what = os.fsdecode(line.rstrip(b"\n")).partition(" ")
        if word == "watch":
            watched.add(int(what))
        elif word == "forget":
            watched.discard(int(what))
        elif word == "remove":
            folders.append(what)
        else:
            break
    stop_trees(watched)
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
