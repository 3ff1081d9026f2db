"""The planner's picture: a row a sampler, with step times, deviation and who works when along the epoch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import ListedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from psl_flower.batch_plan import BatchPlan
from psl_flower.errors import ConfigError
from psl_flower.plan.measure import Epoch
from psl_flower.plan.table import format_seconds
from psl_flower.typing import FloatArray

_MAX_CELLS = (240, 600)  # of a heat map: clients and steps beyond that share cells
_TIME, _DEVIATION, _MEAN = "#3b6ea5", "#b3562f", "#222222"
_COLORS = ListedColormap(colormaps["YlGnBu"](np.linspace(0.2, 1, 256)))  # without the palest: nobody is white


def save_picture(path: Path, epochs: Sequence[tuple[str, Epoch]], reference_time: float = 0.0) -> None:
    """Draw one epoch of each sampler, all on the same clients.

    Parameters
    ----------
    path : Path
        Its suffix decides the format: .png, .pdf, .svg.
    epochs : sequence of (str, Epoch)
        At least one; the heading of each, and what to draw.
    reference_time : float
        Epoch time of UGS, to compare with; 0 if none.

    Raises
    ------
    ConfigError
        If the file cannot be written.
    """
    figure = Figure(figsize=(15, 0.9 + 2.1 * len(epochs)), layout="constrained")
    axes = figure.subplots(len(epochs), 4, squeeze=False, sharex="col", width_ratios=(4, 4, 5, 1))
    heat = [mean_quotas(epoch.plan) for _, epoch in epochs]
    norm = PowerNorm(0.5, vmin=0, vmax=max(float(cells.max()) for cells in heat))
    unit, name = (1e-3, "ms") if max(float(epoch.times.max()) for _, epoch in epochs) < 1 else (1.0, "s")
    for (times, deviations, clients, delays), (heading, epoch), cells in zip(axes, epochs, heat, strict=True):
        _along_epoch(times, epoch.times / unit, _TIME)
        times.set_ylabel(f"step time ({name})")
        total = float(epoch.times.sum())
        relative = f" ({total / reference_time:.2f} x UGS)" if reference_time else ""
        times.set_title(f"{heading}: epoch of {format_seconds(total)}{relative}", loc="left", fontsize=10)
        if epoch.deviation is None:
            deviations.text(0.5, 0.5, "classes not known", ha="center", va="center", transform=deviations.transAxes)
        else:
            _along_epoch(deviations, epoch.deviation, _DEVIATION)
        deviations.set_ylabel("batch deviation (L1)")
        image = _draw_clients(clients, delays, epoch.plan, cells, norm)
    for column, top in (
        (0, max(float(epoch.times.max()) for _, epoch in epochs) / unit),
        (1, _largest_deviation(epochs)),
    ):
        for row in axes[:, column]:
            row.set_ylim(0, 1.08 * top if top else 1)
    longest = max(len(epoch.plan) for _, epoch in epochs)
    for row in axes[:, :3].flat:
        row.set_xlim(0, longest)
        row.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    for bottom, label in zip(
        axes[-1],
        ("step (line: running mean)", "step (line: running mean)", "step", "seconds at\nan even share"),
        strict=True,
    ):
        bottom.set_xlabel(label)
    axes[0, 2].set_title("who works when: examples a step", loc="left", fontsize=10)
    figure.colorbar(image, ax=axes[:, 3], label="examples a step", fraction=0.5, pad=0.1, aspect=14 * len(epochs))
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as exc:
        raise ConfigError(f"the picture {path} cannot be written: {exc}") from exc


def mean_quotas(plan: BatchPlan) -> FloatArray:
    """Return the mean quota of each cell of a grid of clients, fastest first, and steps; cells hold one or several.

    Returns
    -------
    (clients, steps) float64
        At most as many as a picture can show.
    """
    rank = np.empty(len(plan.population), dtype=np.int64)
    rank[np.argsort(_typical_seconds(plan), kind="stable")] = np.arange(len(rank))
    shape = min(_MAX_CELLS[0], len(rank)), min(_MAX_CELLS[1], len(plan))
    rows = rank[plan.rows()] * shape[0] // len(rank)
    columns = plan.steps() * shape[1] // len(plan)
    total = np.bincount(rows * shape[1] + columns, plan.quotas, shape[0] * shape[1]).reshape(shape)
    clients = np.bincount(np.arange(len(rank)) * shape[0] // len(rank), minlength=shape[0])
    steps = np.bincount(np.arange(len(plan)) * shape[1] // len(plan), minlength=shape[1])
    cells: FloatArray = total / np.outer(clients, steps)
    return cells


def _typical_seconds(plan: BatchPlan) -> FloatArray:
    """Return the seconds each client would take for an even share of the largest batch, (K,)."""
    delays = plan.population.delays
    if delays is None:
        return np.zeros(len(plan.population))
    seconds: FloatArray = delays.latency + delays.per_sample * (plan.batch_sizes().max() / len(delays))
    return seconds


def _along_epoch(axes: Any, values: FloatArray, color: str) -> None:
    steps = np.arange(len(values)) + 0.5
    axes.plot(steps, values, ".", ms=2.5, color=color, alpha=0.6, rasterized=True)
    width = max(1, len(values) // 20)
    ones = np.ones(width)
    mean = np.convolve(values, ones, "same") / np.convolve(np.ones(len(values)), ones, "same")
    axes.plot(steps, mean, lw=1.3, color=_MEAN)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_clients(clients: Any, delays: Any, plan: BatchPlan, cells: FloatArray, norm: PowerNorm) -> Any:
    num_clients = len(plan.population)
    image = clients.imshow(
        np.ma.masked_equal(cells, 0),
        aspect="auto",
        origin="lower",
        interpolation="nearest",
        cmap=_COLORS,
        norm=norm,
        extent=(0, len(plan), 0, num_clients),
    )
    clients.set_ylabel("clients, slow on top")
    clients.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    seconds = np.sort(_typical_seconds(plan))
    delays.fill_betweenx(np.arange(num_clients + 1), np.append(seconds, seconds[-1]), step="post", color=_TIME, lw=0)
    delays.set_ylim(0, num_clients)
    delays.set_xlim(0, seconds[-1] * 1.05 if seconds[-1] else 1)
    delays.set_yticks([])
    delays.xaxis.set_major_locator(MaxNLocator(2))
    delays.spines[["top", "right"]].set_visible(False)
    return image


def _largest_deviation(epochs: Sequence[tuple[str, Epoch]]) -> float:
    return max((float(epoch.deviation.max()) for _, epoch in epochs if epoch.deviation is not None), default=0.0)
