"""The server's own evaluation, after every round: a function of the user's."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from flwr.app import ArrayRecord, MetricRecord
from flwr.serverapp.strategy import Result

from psl_flower.errors import ConfigError, StopTraining
from psl_flower.strategy.summary import RunSummary

log = logging.getLogger("flwr.psl_flower")

EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]


def evaluate_on_server(
    evaluate_fn: EvaluateFn | None, server_round: int, arrays: ArrayRecord, result: Result, summary: RunSummary
) -> tuple[dict[str, Any], str | None]:
    """Return the metrics of the server's own evaluation, and why it wants the run to end, if it does.

    Raises
    ------
    ConfigError
        If the function returns something else than metrics.
    """
    try:
        with summary.spending("evaluation"):
            metrics = evaluate_fn(server_round, arrays) if evaluate_fn else None
    except StopTraining as reason:
        return {}, f"evaluate_fn: {reason}"
    if metrics is None:
        return {}, None
    if not isinstance(metrics, Mapping):
        raise ConfigError(
            f"evaluate_fn must return a MetricRecord, or None, got {metrics!r:.80}: "
            "return MetricRecord({'loss': loss, 'accuracy': accuracy})"
        )
    metrics = metrics if isinstance(metrics, MetricRecord) else _record(metrics)
    result.evaluate_metrics_serverapp[server_round] = metrics
    log.info("round %d  server's test data: %s", server_round, shown(metrics))
    return dict(metrics), None


def _record(metrics: Mapping[str, Any]) -> MetricRecord:
    """Return a dict of metrics as Flower's; tensors and arrays of one number are that number."""
    numbers = {key: value.item() if getattr(value, "ndim", 1) == 0 else value for key, value in metrics.items()}
    try:
        return MetricRecord(numbers)
    except TypeError as exc:
        kinds = ", ".join(f"{key!r} is a {type(value).__name__}" for key, value in numbers.items())
        raise ConfigError(f"metrics that evaluate_fn returns must be numbers, or lists of them: {kinds:.200}") from exc


def shown(metrics: MetricRecord) -> str:
    """Return metrics as one line of the log."""
    return ", ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in metrics.items())
