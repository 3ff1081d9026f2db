"""What a run leaves behind: metrics of steps and rounds, curves, the model and the configuration."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from safetensors import SafetensorError
from torch import Tensor

from psl_flower.callbacks.base import Callback, CallbackGroup
from psl_flower.callbacks.csv_logger import ROUNDS_FILE, STEPS_FILE, CsvLogger
from psl_flower.callbacks.jsonl import JsonlLogger
from psl_flower.checkpoint import write_state
from psl_flower.checks import writing_to
from psl_flower.errors import ConfigError
from psl_flower.files import written
from psl_flower.records import RoundRecord, StepRecord, read_metrics
from psl_flower.strategy.curves import save_curves

METRICS_FILE = "metrics.jsonl"
CURVES_FILE = "curves.png"
MODEL_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
SUMMARY_FILE = "summary.json"
FILES = (METRICS_FILE, STEPS_FILE, ROUNDS_FILE, CURVES_FILE, MODEL_FILE, CONFIG_FILE, SUMMARY_FILE)

log = logging.getLogger("flwr.psl_flower")


class RunRecorder:
    """Writes what a run leaves behind into a folder; without a folder it only keeps the rounds. A context manager.

    What cannot be written once the run has begun (a full disk, a folder that is gone) is logged as an error, and the
    run goes on: its result is still returned.

    Parameters
    ----------
    folder : path, optional
        Made if it is not there; files of an earlier run in it are replaced.
    config : dict
        The resolved configuration, written at once.
    position : int, optional
        Go on from here in the metrics of the run that this one resumes, a `position` of its recorder.
    callbacks : iterable of Callback
        Told of everything, what came before `position` included.

    Raises
    ------
    ConfigError
        If the folder cannot be written to.
    """

    def __init__(
        self,
        folder: str | Path | None,
        config: Mapping[str, Any],
        position: int | None = None,
        callbacks: Iterable[Callback] = (),
    ) -> None:
        self._folder = None if folder is None else Path(folder)
        self.config = json.loads(json.dumps(dict(config), default=str))
        self.steps: list[StepRecord] = []
        self.rounds: list[RoundRecord] = []
        self._summary: dict[str, Any] = {}
        self._callbacks = CallbackGroup(callbacks)
        self._files: dict[str, Callback] = {}
        self._told: set[str] = set()  # files that could not be written
        self._jsonl: JsonlLogger | None
        self._jsonl, earlier = (None, []) if self._folder is None else self._open(self._folder, position)
        self._callbacks.on_run_start(self.config)
        for record in earlier:
            self._tell(record)
        if self._jsonl is not None:  # only now: it has what came before
            self._files[METRICS_FILE] = self._jsonl

    def _open(self, folder: Path, position: int | None) -> tuple[JsonlLogger, list[StepRecord | RoundRecord]]:
        """Begin all files; return what writes the metrics, and the records before `position`."""
        with writing_to(folder, "output_dir"):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / CONFIG_FILE).write_text(json.dumps(self.config, indent=2) + "\n", encoding="utf-8")
            path = folder / METRICS_FILE
            earlier = [] if position is None else _cut_off(path, position)
            metrics = JsonlLogger(path, append=position is not None)
            metrics.on_run_start(self.config)
            self._files[f"{STEPS_FILE} or {ROUNDS_FILE}"] = table = CsvLogger(folder)
            table.on_run_start(self.config)
        return metrics, earlier

    @contextmanager
    def _writing(self, name: str) -> Iterator[None]:
        """Go on if a file cannot be written, for what was trained is worth more; say so once a file."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            if name not in self._told:
                log.error("%s cannot be written in %s, the run goes on without: %s", name, self._folder, error)
            self._told.add(name)

    def position(self) -> int:
        """Return how long the metrics are, in bytes; they are on the disk then."""
        return 0 if self._jsonl is None else self._jsonl.position()

    def summary(self, summary: Mapping[str, Any]) -> None:
        """Write the summary of faults and time."""
        self._summary = dict(summary)
        if self._folder is not None:
            with self._writing(SUMMARY_FILE), written(self._folder / SUMMARY_FILE) as path:
                path.write_text(json.dumps(self._summary, indent=2) + "\n", encoding="utf-8")

    def step(self, record: StepRecord) -> None:
        """Keep a step's record."""
        self._tell(record)

    def progress(self, record: StepRecord, summary: Mapping[str, Any]) -> None:
        """Let callbacks look on: the last step, and the summary as it is now."""
        self._callbacks.on_progress(record, summary)

    def round(self, record: RoundRecord, state: Mapping[str, Tensor] | None = None) -> None:
        """Keep a round's record; let callbacks have the whole model as it is after it."""
        self._tell(record)
        if state is not None:
            self._callbacks.on_model(record.round, state)

    @property
    def stopped(self) -> str | None:
        """Why a callback wants the run to end; None while none does."""
        return self._callbacks.stopped

    def finish(self, state: Mapping[str, Tensor]) -> None:
        """Write the model and the curves."""
        if self._folder is None:
            return
        with self._writing(MODEL_FILE):
            write_state(self._folder / MODEL_FILE, state)
        if self.rounds:
            try:
                with self._writing(CURVES_FILE):
                    save_curves(self._folder / CURVES_FILE, self.steps, self.rounds)
            except ConfigError as exc:
                log.warning("%s is not drawn: %s", CURVES_FILE, exc)

    def _tell(self, record: StepRecord | RoundRecord) -> None:
        if isinstance(record, StepRecord):
            self.steps.append(record)
            self._write(lambda file: file.on_step(record))
            self._callbacks.on_step(record)
        else:
            self.rounds.append(record)
            self._write(lambda file: file.on_round(record))
            self._callbacks.on_round(record)

    def _write(self, call: Callable[[Callback], None]) -> None:
        for name, file in self._files.items():
            with self._writing(name):
                call(file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        end = {**self._summary, "completed": error is None}
        self._write(lambda file: file.on_run_end(end))
        self._callbacks.on_run_end(end)


def _cut_off(path: Path, position: int) -> list[StepRecord | RoundRecord]:
    """Cut the metrics off behind `position`, and read those before it."""
    if not path.exists() or path.stat().st_size < position:
        log.warning("The metrics before the checkpoint are not in %s: it will hold those from now on.", path)
        path.unlink(missing_ok=True)
        return []
    os.truncate(path, position)
    return read_metrics(path)
