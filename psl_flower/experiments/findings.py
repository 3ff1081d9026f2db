"""A sweep's results, arranged for tables and pictures: methods against the values of an axis, seeds together."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np

from psl_flower.callbacks.csv_logger import ROUNDS_FILE, STEPS_FILE
from psl_flower.config import RunConfig
from psl_flower.errors import ConfigError
from psl_flower.experiments.results import RESULTS_FILE, RUNS_FOLDER
from psl_flower.typing import FloatArray, IntArray

SWEEP_FILE, CONFUSION_FILE = "sweep.json", "confusion.csv"
_TRAIN, _TEST = "train_metrics_clientapp", "evaluate_metrics_serverapp"


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One training along its epochs; each array is (epochs,), and `simulated` is None without simulated delays."""

    accuracy: FloatArray
    steps: FloatArray
    simulated: FloatArray | None
    real: FloatArray


@dataclass(frozen=True, kw_only=True)
class Part:
    """Those results of a sweep that one table shows.

    Parameters
    ----------
    title : str
        What they have in common: values on the axes that are neither rows nor columns. "" if there are no such axes.
    axis : str
        The axis of the columns, "" if there is but one column.
    columns : list of str
        Its values.
    cells : dict
        (method, column) to the rows of ``results.csv``, one a seed; missing if nothing is finished there.
    """

    title: str
    axis: str
    columns: Sequence[str]
    cells: Mapping[tuple[str, str], Sequence[Mapping[str, str]]]

    def heading(self, column: str) -> str:
        """Return what a column is called."""
        names = {"num-clients": f"{column} clients", "batch-size": f"batch size {column}", "": ""}
        return names.get(self.axis, f"{self.axis} = {column}")

    def values(self, method: str, column: str, metric: str) -> FloatArray:
        """Return a metric of every seed, (seeds,); empty if it is not known."""
        rows = self.cells.get((method, column), ())
        return np.array([float(row[metric]) for row in rows if row.get(metric)], dtype=np.float64)


class Findings:
    """What is in a sweep's folder.

    Raises
    ------
    ConfigError
        If that is no folder of a sweep, or nothing in it is finished.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.record: dict[str, Any] = json.loads((folder / SWEEP_FILE).read_text(encoding="utf-8"))
            with (folder / RESULTS_FILE).open(newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file))
        except OSError as exc:
            raise ConfigError(f"{folder} has no results of a sweep ({exc}): run one with --output {folder}") from exc
        self.rows = [row for row in rows if self._run(row).is_dir()]  # somebody may have deleted some
        if not self.rows:
            raise ConfigError(f"{folder} holds no training of its {RESULTS_FILE} any more: run the sweep again")
        self.sweep: dict[str, Any] = self.record["sweep"]
        self.methods: list[str] = [m for m in self.sweep["methods"] if any(row["method"] == m for row in self.rows)]
        self.seeds = [str(seed) for seed in self.sweep["axes"]["seed"]]

    def kind(self, method: str) -> str:
        """Return a method's algorithm, or its sampler where that is parallel split learning."""
        keys = {**self.sweep["config"], **self.sweep["methods"][method]}
        algorithm = str(keys.get("algorithm", "psl"))
        return str(keys.get("sampler", RunConfig().sampler)) if algorithm == "psl" else algorithm

    @cached_property
    def parts(self) -> list[Part]:
        """The results, a part for each combination of the axes that are neither rows nor columns."""
        axes = {key: [str(v) for v in values] for key, values in self.sweep["axes"].items() if key != "seed"}
        several = [key for key, values in axes.items() if len(values) > 1]
        axis, others = (several[0], several[1:]) if several else ("", [])
        parts = []
        for values in itertools.product(*(axes[key] for key in others)):
            cells: dict[tuple[str, str], list[Mapping[str, str]]] = {}
            for row in self.rows:
                if all(row[key] == value for key, value in zip(others, values, strict=True)):
                    cells.setdefault((row["method"], row[axis] if axis else ""), []).append(row)
            title = ", ".join(f"{key} = {value}" for key, value in zip(others, values, strict=True))
            parts.append(Part(title=title, axis=axis, columns=axes[axis] if axis else [""], cells=cells))
        return parts

    def curves(self, part: Part, method: str, column: str) -> list[Curve]:
        """Return the curve of every seed."""
        return [_read_curve(self._run(row)) for row in part.cells.get((method, column), ())]

    def deviations(self, part: Part, method: str, column: str) -> FloatArray:
        """Return the batch deviation of every step in the first epoch of the first seed, (steps,)."""
        rows = [row for row in part.cells.get((method, column), ()) if row["seed"] == self.seeds[0]]
        return _read_deviations(self._run(rows[0])) if rows else np.empty(0)

    def confusion(self, part: Part, method: str, column: str) -> IntArray | None:
        """Return the confusion matrix of the final models of all seeds together, (C, C): true classes are rows."""
        paths = [self._run(row) / CONFUSION_FILE for row in part.cells.get((method, column), ())]
        counts = [np.loadtxt(path, dtype=np.int64, delimiter=",", ndmin=2) for path in paths]
        return np.sum(counts, axis=0) if counts else None

    def _run(self, row: Mapping[str, str]) -> Path:
        return self.folder / RUNS_FOLDER / row["run"]


@cache
def _read_curve(folder: Path) -> Curve:
    with (folder / ROUNDS_FILE).open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))

    def column(name: str) -> FloatArray:
        return np.array([float(row.get(name) or "nan") for row in rows])

    simulated = column(f"{_TRAIN}/seconds_simulated").cumsum()
    return Curve(
        accuracy=column(f"{_TEST}/accuracy"),
        steps=column(f"{_TRAIN}/num_steps").cumsum(),
        simulated=None if np.isnan(simulated).any() else simulated,
        real=column(f"{_TRAIN}/seconds_real").cumsum(),
    )


@cache
def _read_deviations(folder: Path) -> FloatArray:
    with (folder / STEPS_FILE).open(newline="", encoding="utf-8") as file:
        first = itertools.takewhile(lambda row: row["round"] == "1", csv.DictReader(file))
        return np.array([float(row["deviation"] or "nan") for row in first])


def spread(values: FloatArray) -> tuple[float, float | None]:
    """Return mean and standard deviation (of a sample) over seeds; no deviation for one seed."""
    return float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else None
