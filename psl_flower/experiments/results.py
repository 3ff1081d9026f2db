"""What is known of trainings that are finished, as numbers and as one table."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from psl_flower.experiments.sweep import Experiment
from psl_flower.files import written
from psl_flower.records import RoundRecord, StepRecord, read_metrics
from psl_flower.strategy.recorder import METRICS_FILE

RESULTS_FILE, RESULT_FILE, RUNS_FOLDER = "results.csv", "result.json", "runs"
_LATE = 3  # epochs averaged over, for an accuracy that does not hang on the last one


def summarise(folder: Path, seconds: float) -> dict[str, float | None]:
    """Return the numbers of one training from its metrics, and write them into its folder.

    Accuracy and loss are those on the test split, as fractions; steps, deviation and seconds are over all epochs.
    `seconds_total` is the training's wall clock with loading and tests, `seconds_real` that of its steps alone.
    """
    records = read_metrics(folder / METRICS_FILE)
    rounds = [r for r in records if isinstance(r, RoundRecord)]
    deviations = [r.deviation for r in records if isinstance(r, StepRecord) and r.deviation is not None]
    accuracy = [float(r.evaluate_serverapp["accuracy"]) for r in rounds]
    simulated = [r.seconds_simulated for r in rounds if r.seconds_simulated is not None]
    result = {
        "accuracy_last": accuracy[-1],
        f"accuracy_last{_LATE}": float(np.mean(accuracy[-_LATE:])),
        "accuracy_best": max(accuracy),
        "loss_last": rounds[-1].evaluate_serverapp["loss"],
        "train_loss_last": rounds[-1].loss,
        "epochs": len(rounds),
        "steps": sum(r.num_steps for r in rounds),
        "examples": sum(r.num_examples for r in rounds),
        "clients_per_step": float(np.mean([r.clients_per_step for r in rounds])),
        "deviation_mean": float(np.mean(deviations)) if deviations else None,
        "deviation_p95": float(np.percentile(deviations, 95)) if deviations else None,
        "seconds_simulated": sum(simulated) if simulated else None,
        "seconds_real": sum(r.seconds_real for r in rounds),
        "seconds_total": seconds,
    }
    (folder / RESULT_FILE).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def read_result(folder: Path) -> dict[str, Any] | None:
    """Return what `summarise` wrote into a training's folder; None if that is missing or damaged."""
    try:
        result: dict[str, Any] = json.loads((folder / RESULT_FILE).read_text(encoding="utf-8"))
        return result
    except (OSError, ValueError):
        return None


def write_results(folder: Path, experiments: Sequence[Experiment]) -> list[dict[str, Any]]:
    """Write ``results.csv``: a row a finished combination, and return its rows.

    A training that several combinations share has a row for each. Without any there is no file: what an earlier sweep
    left in the folder is not this one's.
    """
    rows = []
    for experiment in experiments:
        result = read_result(folder / RUNS_FOLDER / experiment.name)
        if result is not None:
            rows.append({"method": experiment.method, **experiment.values, **result, "run": experiment.name})
    if not rows:
        (folder / RESULTS_FILE).unlink(missing_ok=True)
    else:
        with written(folder / RESULTS_FILE) as path, path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return rows
