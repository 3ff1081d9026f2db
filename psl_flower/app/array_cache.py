"""Decoded datasets kept on disk, so that every process of a simulation maps the same pages instead of decoding anew."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

try:
    import fcntl
except ImportError:  # Windows: two processes may both do the work, and one result is kept
    fcntl = None  # type: ignore[assignment]

Arrays = tuple[NDArray[np.uint8], NDArray[np.int64]]
_FORMAT = "1"  # part of every key: raise it when what is stored changes


def cache_dir() -> Path:
    """Return the user's cache folder for this package (``$XDG_CACHE_HOME/psl_flower``), which may not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "psl_flower"


@contextmanager
def exclusive(name: str) -> Iterator[None]:
    """Hold the lock `name` of the cache folder: of all processes of this user, one at a time is inside."""
    cache_dir().mkdir(parents=True, exist_ok=True)
    with (cache_dir() / f"{name}.lock").open("w") as lock:
        if fcntl is not None:
            fcntl.flock(lock, fcntl.LOCK_EX)  # released when the file is closed, even by a crash
        yield


def cached_arrays(paths: Sequence[Path], build: Callable[[], Arrays]) -> Arrays:
    """Return what `build` makes of the files at `paths`, from the cache if they are the files it was made of.

    Parameters
    ----------
    paths : sequence of Path
        The source files; their paths, sizes and modification times are the key.
    build : callable
        Returns images and labels; called at most once at a time on this machine.

    Returns
    -------
    images, labels
        `images` is memory-mapped and read-only.
    """
    stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    key = hashlib.sha256(repr((_FORMAT, stats)).encode()).hexdigest()[:20]
    folder = cache_dir() / key
    if not folder.is_dir():
        with exclusive(key):
            if not folder.is_dir():  # nobody finished it while this process waited
                _store(folder, build())
    return np.load(folder / "images.npy", mmap_mode="r"), np.load(folder / "labels.npy")


def _store(folder: Path, arrays: Arrays) -> None:
    """Write `arrays` so that `folder` either holds all of them or does not exist."""
    unfinished = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    try:
        np.save(unfinished / "images.npy", arrays[0])
        np.save(unfinished / "labels.npy", arrays[1])
        unfinished.rename(folder)
    except OSError:
        if not folder.is_dir():  # not merely another process that was faster
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
