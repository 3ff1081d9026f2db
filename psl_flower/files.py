"""Files that whoever looks finds as a whole."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """Yield the path of a file to write, which takes the place of `path` at the end, unless there was an error."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    try:
        yield unfinished
        os.replace(unfinished, path)
    except Exception:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)  # of a disk that is full, most of all
        raise
