"""The curves of a run as one picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from psl_flower.extras import extra
from psl_flower.records import RoundRecord, StepRecord


def save_curves(path: Path, steps: Sequence[StepRecord], rounds: Sequence[RoundRecord]) -> None:
    """Draw loss, accuracy and batch deviation against steps.

    Parameters
    ----------
    path : Path
        A PNG file.
    steps, rounds : sequence
        In order; at least one of each.

    Raises
    ------
    ConfigError
        If matplotlib is not installed.
    """
    with extra("simulation", "a picture of the curves"):
        from matplotlib.figure import Figure  # half a second, and of no use to clients

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    loss, accuracy, deviation = figure.subplots(1, 3)
    x = np.arange(1, len(steps) + 1)
    ends = np.cumsum([r.num_steps for r in rounds])

    _noisy(loss, x, [s.loss for s in steps], "training batch")
    loss.set(title="Loss", ylabel="loss")
    if any(s.accuracy is not None for s in steps):
        _noisy(accuracy, x, [s.accuracy for s in steps], "training batch")
    accuracy.set(title="Accuracy", ylabel="accuracy", ylim=(0, 1.02))
    _noisy(deviation, x, [s.deviation for s in steps], "training batch")
    deviation.set(title="Batch deviation", ylabel="0: like all data, 2: nothing alike", ylim=(0, None))
    evaluations: tuple[tuple[str, str, dict[str, Any]], ...] = (
        ("evaluate_clientapp", "clients' test data", {"marker": "o", "ms": 8, "mfc": "none", "color": "#0072B2"}),
        ("evaluate_serverapp", "server's test data", {"marker": "s", "ms": 4, "ls": "--", "color": "#D55E00"}),
    )
    for axes, metric in ((loss, "loss"), (accuracy, "accuracy")):
        for where, label, style in evaluations:
            points = [
                (end, getattr(r, where)[metric])
                for end, r in zip(ends, rounds, strict=True)
                if metric in getattr(r, where)
            ]
            if points:
                axes.plot(*zip(*points, strict=True), **style, label=label)  # both are seen where they are equal
    for axes in (loss, accuracy, deviation):
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False)
    figure.savefig(path, dpi=130)


def _noisy(axes: Any, x: np.ndarray, values: Sequence[float | None], label: str) -> None:
    """Plot values faintly and their running mean clearly."""
    y = np.array([np.nan if v is None else v for v in values], dtype=float)
    if np.isnan(y).all():
        return
    window = max(1, len(y) // 25)
    axes.plot(x, y, color="C7", alpha=0.35, lw=0.8)
    told = ~np.isnan(y)
    sums, counts = (
        np.convolve(np.pad(each, (window - 1, 0), mode="edge"), np.ones(window), mode="valid")
        for each in (np.where(told, y, 0.0), told.astype(float))
    )
    smooth = np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)
    axes.plot(x, smooth, color="C7", lw=1.5, label=f"{label} (mean of {window} steps)" if window > 1 else label)
