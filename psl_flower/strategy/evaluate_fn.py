"""The server's own evaluation, after every round: a function of the user's."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, MetricRecord
from flwr.serverapp.strategy import Result

from psl_flower.checks import why_not_called
from psl_flower.errors import ConfigError, StopTraining
from psl_flower.strategy.summary import RunSummary

log = logging.getLogger("flwr.psl_flower")

EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]


def check_evaluate_fn(evaluate_fn: Any) -> None:
    """Raise ConfigError unless it is None or a function of (round, arrays); say so before the first round.

    Raises
    ------
    ConfigError
        If it cannot be called so, as one of Flower's older strategies, of (round, parameters, config).
    """
    rule = "evaluate_fn must be a function of (server_round, arrays), as FedAvg's in flwr.serverapp.strategy"
    if evaluate_fn is None:
        return
    if not callable(evaluate_fn):
        raise ConfigError(f"{rule}, got {evaluate_fn!r:.80}")
    if why := why_not_called(evaluate_fn, 2):
        raise ConfigError(f"{rule}, got one of {why}")


def evaluate_on_server(
    evaluate_fn: EvaluateFn | None, server_round: int, arrays: ArrayRecord, result: Result, summary: RunSummary
) -> tuple[dict[str, Any], str | None]:
    """Return the metrics of the server's own evaluation, and why it wants the run to end, if it does.

    The function may do what it likes with the arrays it is given, also empty them (``keep_input=False``).

    Raises
    ------
    ConfigError
        If the function returns something else than metrics.
    """
    try:
        with summary.spending("evaluation"):
            metrics = None if evaluate_fn is None else evaluate_fn(server_round, ArrayRecord({**arrays}))
    except StopTraining as reason:
        return {}, f"evaluate_fn: {reason}"
    if metrics is None:
        return {}, None
    if not isinstance(metrics, Mapping):
        raise ConfigError(
            f"evaluate_fn must return a MetricRecord, or None, got {metrics!r:.80}: "
            "return MetricRecord({'loss': loss, 'accuracy': accuracy})"
        )
    metrics = metrics if isinstance(metrics, MetricRecord) else as_metrics(metrics)
    result.evaluate_metrics_serverapp[server_round] = metrics
    log.info("round %d  server's test data: %s", server_round, shown(metrics))
    return dict(metrics), None


def as_metrics(metrics: Mapping[str, Any]) -> MetricRecord:
    """Return metrics as people compute them (Python's, numpy's or torch's numbers, lists of them) as Flower has them.

    Raises
    ------
    ConfigError
        If one is no number.
    """
    numbers = {name: _numbers(value) for name, value in metrics.items()}
    for item in numbers.items():
        try:
            MetricRecord(dict([item]))
        except (TypeError, ValueError):
            raise ConfigError(
                f"evaluate_fn must return numbers or lists of numbers by name, got {item!r:.80}: leave out what is none"
            ) from None
    return MetricRecord(numbers)


def _numbers(value: Any) -> Any:
    if isinstance(value, torch.Tensor | np.ndarray | np.generic):
        value = value.tolist()  # a number, where it is a single one
    if isinstance(value, list | tuple):
        return [_numbers(v) for v in value]
    return int(value) if isinstance(value, bool) else value


def shown(metrics: MetricRecord) -> str:
    """Return metrics as one line of the log."""
    return ", ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in metrics.items())
