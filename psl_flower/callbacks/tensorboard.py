"""Metrics for TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from psl_flower.callbacks.base import Callback
from psl_flower.callbacks.names import numbers, round_metrics, step_metrics
from psl_flower.extras import extra
from psl_flower.records import RoundRecord, StepRecord

_FLUSH_SECONDS = 5  # TensorBoard's own is two minutes: too long for who looks on
_TOLD_SECONDS = 0.05  # less is 0.0 in the table
_MOST_CLIENTS = 8  # with a curve of their failures
# The page "custom scalars", for looking on: what it is called there, and the curves in one picture
_LAYOUT = {
    "How it goes": {
        "loss of a step, every few seconds": ["now/loss"],
        "accuracy of a step, every few seconds": ["now/accuracy"],
        "accuracy of the model after each round": ["evaluate_.*/accuracy"],
        "batch deviation": ["train_step/deviation"],
        "bytes of a step": ["train_step/bytes_.*"],
    },
    "Time and faults (whose curve is which: open Matches, or see TEXT above)": {
        "where the time went (seconds)": ["time/.*"],
        "slowest clients (ms an example)": ["slowest/.*"],
        "failures by kind": ["failures/.*"],
        "failures by client": ["failing/.*"],
    },
}


class TensorBoardLogger(Callback):
    """Writes an event file; all curves are against the number of steps made.

    Parameters
    ----------
    folder : path
        What ``tensorboard --logdir`` is given. Curves of an earlier run in it are hidden by this one's.

    Raises
    ------
    ConfigError
        If TensorBoard is not installed.
    """

    def __init__(self, folder: str | Path) -> None:
        with extra("tensorboard", "the logger 'tensorboard'"):
            from torch.utils.tensorboard import SummaryWriter
        self._make, self._folder = SummaryWriter, Path(folder)
        self._writer: Any = None
        self._step = 0

    def on_run_start(self, config: Mapping[str, Any]) -> None:
        """Open the event file."""
        # 0: hide what an earlier run has left
        self._writer = self._make(str(self._folder), purge_step=0, flush_secs=_FLUSH_SECONDS)
        # a block: in a table, one long value leaves the keys no room
        self._writer.add_text("settings", "\n".join(f"    {key} = {value!r}" for key, value in config.items()), 0)
        self._writer.add_custom_scalars(
            {page: {name: ["Multiline", tags] for name, tags in charts.items()} for page, charts in _LAYOUT.items()}
        )

    def on_step(self, record: StepRecord) -> None:
        """Write a step's scalars."""
        self._step += 1
        self._write(step_metrics(record), self._step)

    def on_progress(self, record: StepRecord, summary: Mapping[str, Any]) -> None:
        """Write where the time goes, who is slow and who fails; loss and accuracy, too, which `on_step` may have later.

        The same is written as tables, on the page "text".
        """
        seconds, refused, excluded = summary["seconds"], summary["refused"], summary["excluded"]
        slowest = {k: 1000 * s for k, s in summary["slowest_clients_seconds_per_example"].items()}
        failing = dict(sorted(summary["failures"].items(), key=lambda item: -item[1])[:_MOST_CLIENTS])
        now = {
            "now/loss": record.loss,
            "now/accuracy": record.accuracy,
            **{f"time/{what}": s for what, s in seconds.items()},
            **{f"slowest/client {client}": ms for client, ms in slowest.items()},
            **{f"failures/{kind}": count for kind, count in refused.items()},
            **{f"failing/client {client}": count for client, count in failing.items()},
        }
        step = summary["steps_committed"]
        self._write(now, step)
        tables = [
            _table("left out for good", "why", excluded),
            _table("whose requests failed", "times", failing),
            _table("what failed", "times", refused),
            _table("slowest clients", "ms an example", {k: f"{ms:.2f}" for k, ms in slowest.items()}),
            _table("where the time went", "seconds", {k: f"{s:.1f}" for k, s in seconds.items() if s >= _TOLD_SECONDS}),
        ]
        # TensorBoard sorts by name: this one is above the settings
        self._writer.add_text("faults and time", "\n\n".join(filter(None, tables)), step)

    def on_round(self, record: RoundRecord) -> None:
        """Write a round's scalars."""
        self._write({**round_metrics(record), "round": record.round}, self._step)
        self._writer.flush()

    def on_run_end(self, summary: Mapping[str, Any]) -> None:
        """Close the event file."""
        self._writer.close()

    def _write(self, metrics: dict[str, Any], step: int) -> None:
        for name, value in numbers(metrics).items():
            self._writer.add_scalar(name, value, step)


def _table(what: str, how_much: str, rows: Mapping[Any, Any]) -> str:
    """Return a table in Markdown, "" without rows."""
    lines = [f"| {what} | {how_much} |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())]
    return "\n".join(lines) if rows else ""
