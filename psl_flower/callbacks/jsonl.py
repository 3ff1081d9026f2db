"""Metrics as JSON, a line a step and a line a round."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from psl_flower.callbacks.base import Callback
from psl_flower.records import RoundRecord, StepRecord


class JsonlLogger(Callback):
    """Writes a line as soon as there is one.

    Parameters
    ----------
    path : path
        Of the file.
    append : bool
        Whether to go on behind what is in it, instead of replacing it.
    """

    def __init__(self, path: str | Path, *, append: bool = False) -> None:
        self._path, self._mode = Path(path), "a" if append else "w"
        self._file: IO[str] | None = None

    def on_run_start(self, config: Mapping[str, Any]) -> None:
        """Open the file."""
        self._file = self._path.open(self._mode, encoding="utf-8")

    def on_step(self, record: StepRecord) -> None:
        """Write a step's line."""
        self._write("step", asdict(record))

    def on_round(self, record: RoundRecord) -> None:
        """Write a round's line."""
        self._write("round", asdict(record))

    def on_run_end(self, summary: Mapping[str, Any]) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    def position(self) -> int:
        """Return how long the file is, in bytes; all of it is on the disk then."""
        if self._file is None:
            return 0
        self._file.flush()
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    def _write(self, kind: str, values: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps({"kind": kind, **_finite(values)}, allow_nan=False) + "\n")
            self._file.flush()


def _finite(value: Any) -> Any:
    """Return `value` with None in place of NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
