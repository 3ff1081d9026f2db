"""What the metrics of steps and rounds are called by every logger: as Flower's ``Result`` calls them."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from psl_flower.records import RoundRecord, StepRecord


def step_metrics(record: StepRecord) -> dict[str, Any]:
    """Return what is known of a step, as ``train_step/NAME``."""
    metrics = {name: value for name, value in asdict(record).items() if name not in ("round", "step")}
    return {f"train_step/{name}": value for name, value in metrics.items() if value is not None}


def round_metrics(record: RoundRecord) -> dict[str, Any]:
    """Return what is known of a round, as ``train_metrics_clientapp/NAME``, ``evaluate_metrics_serverapp/NAME``, ..."""
    groups = {
        "train_metrics_clientapp": record.metrics(),
        "evaluate_metrics_clientapp": record.evaluate_clientapp,
        "evaluate_metrics_serverapp": record.evaluate_serverapp,
    }
    return {f"{group}/{name}": value for group, metrics in groups.items() for name, value in metrics.items()}


def numbers(metrics: dict[str, Any]) -> dict[str, float]:
    """Return those that can be drawn as a curve."""
    return {name: value for name, value in metrics.items() if isinstance(value, int | float)}
