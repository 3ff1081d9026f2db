"""Metrics as CSV, for spreadsheets: a file of steps and a file of rounds."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from psl_flower.callbacks.base import Callback
from psl_flower.callbacks.names import round_metrics
from psl_flower.files import written
from psl_flower.records import RoundRecord, StepRecord

STEPS_FILE, ROUNDS_FILE = "steps.csv", "rounds.csv"


class CsvLogger(Callback):
    """Writes ``steps.csv`` and ``rounds.csv``; what is not known is an empty cell.

    Parameters
    ----------
    folder : path
        Made if it is not there; such files of an earlier run in it are replaced.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        self._steps: IO[str] | None = None
        self._writer: csv.DictWriter[str] | None = None
        self._rounds: list[dict[str, Any]] = []

    def on_run_start(self, config: Mapping[str, Any]) -> None:
        """Begin both files."""
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / ROUNDS_FILE).unlink(missing_ok=True)
        self._steps = (self._folder / STEPS_FILE).open("w", newline="", encoding="utf-8")

    def on_step(self, record: StepRecord) -> None:
        """Write a step's row."""
        if self._steps is None:
            return
        values = asdict(record)
        if self._writer is None:
            self._writer = csv.DictWriter(self._steps, list(values))
            self._writer.writeheader()
        self._writer.writerow(values)

    def on_round(self, record: RoundRecord) -> None:
        """Write the rounds anew: one may know of metrics that those before did not have."""
        self._rounds.append({"round": record.round, **round_metrics(record)})
        columns = list(dict.fromkeys(name for row in self._rounds for name in row))
        with written(self._folder / ROUNDS_FILE) as path, path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(self._rounds)
        if self._steps is not None:
            self._steps.flush()

    def on_run_end(self, summary: Mapping[str, Any]) -> None:
        """Close the file of steps."""
        if self._steps is not None:
            self._steps.close()
