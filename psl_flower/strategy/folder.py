"""The folder that a run writes to: no other run's at the same time, and what an earlier one has left is kept."""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Iterable
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Self

from psl_flower.checkpoint import new_folder
from psl_flower.checks import writing_to
from psl_flower.errors import ConfigError

try:
    import fcntl

    _HAS_FLOCK = True
except ImportError:  # not a POSIX system
    _HAS_FLOCK = False

log = logging.getLogger("flwr.psl_flower")

LOCK_FILE = ".lock"


class FolderLock:
    """Keeps other runs from writing to a folder as long as it is entered; a context manager.

    The system holds the lock (``flock``) and drops it when the process ends, however it does: what a dead run has left
    is taken over. Where the system has no ``flock`` (Windows), or not for this file system, runs are not kept apart,
    which is logged; on a network file system it depends on the server whether other machines see it.

    Parameters
    ----------
    folder : path, optional
        Made if it is not there; None: nothing is written, so nothing is locked.
    option : str
        What sets it, for errors.

    Raises
    ------
    ConfigError
        On entering, if another run has the folder, or it cannot be written to.
    """

    def __init__(self, folder: str | Path | None, option: str = "output_dir") -> None:
        self._option = option
        self._path = None if folder is None else Path(folder) / LOCK_FILE
        self._descriptor: int | None = None

    def __enter__(self) -> Self:
        if self._path is None:
            return self
        if not _HAS_FLOCK:
            log.info("This system has no flock: nothing keeps another run from writing to %s.", self._path.parent)
            return self
        with writing_to(self._path.parent, self._option):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            while self._descriptor is None:
                self._descriptor = _locked(self._path, self._option)
        if left := os.read(self._descriptor, 1000):
            log.warning("A run that wrote to %s did not end in order: %s", self._path.parent, _owner(left))
        since = datetime.now().astimezone().isoformat(timespec="seconds")
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": since}
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, json.dumps(owner).encode(), 0)
        return self

    def __exit__(self, *_: object) -> None:
        if self._descriptor is not None and self._path is not None:
            with suppress(OSError):  # the folder is gone
                self._path.unlink()  # while it is locked, so that it is nobody else's
            os.close(self._descriptor)
            self._descriptor = None


def _locked(path: Path, option: str) -> int | None:
    """Return the descriptor of a lock file that is locked now, None if another took the file away meanwhile.

    Raises
    ------
    ConfigError
        If another run has it.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = _owner(os.read(descriptor, 1000))
        os.close(descriptor)
        raise ConfigError(
            f"{option}: another run writes to {path.parent}: {owner}: wait for it, end it, or give this run another "
            "folder"
        ) from None
    except OSError as error:
        log.warning("%s cannot be locked (%s): nothing keeps another run from writing there.", path.parent, error)
    with suppress(FileNotFoundError):
        if os.path.samestat(os.fstat(descriptor), path.stat()):
            return descriptor
    os.close(descriptor)  # its owner has unlinked it after it was opened here
    return None


def _owner(text: bytes) -> str:
    try:
        owner = json.loads(text)
        return f"process {owner['pid']} on {owner['host']}, since {owner['since']}"
    except (ValueError, TypeError, KeyError):
        return "a process that has not said its name"


def set_aside(folder: str | Path, names: Iterable[str]) -> None:
    """Move what an earlier run has left in a folder to one of its own there, ``earlier-<time it ended>``.

    Parameters
    ----------
    folder : path
    names : iterable of str
        Of the files and folders that runs leave; all others stay.
    """
    found = [path for path in map(Path(folder).joinpath, names) if path.exists()]
    if not found:
        return
    ended = datetime.fromtimestamp(max(path.stat().st_mtime for path in found))
    aside = new_folder(Path(folder) / f"earlier-{ended:%Y%m%d-%H%M%S}")
    for path in found:
        os.replace(path, aside / path.name)
    log.warning("What an earlier run has left in %s is now in %s", folder, aside.name)
