"""The planner's picture: a row a sampler, with step times, batch deviation and who works when along the epoch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from psl_flower.batch_plan import BatchPlan
from psl_flower.errors import ConfigError
from psl_flower.extras import extra
from psl_flower.plan.measure import Epoch
from psl_flower.plan.table import format_seconds
from psl_flower.population import Population
from psl_flower.typing import FloatArray, IndexArray

_BINS = 100  # of an epoch: steps beyond that share one
_QUANTILES = (0.5, 0.9)  # of speed: the faster half of the clients, the slowest tenth, and those between
# Okabe and Ito's colours, which differ for colour-blind eyes and in grey: fast, middle, slow
_COLORS = ("#9AD1F5", "#0072B2", "#D55E00")
_DOTS, _MEAN = "#8C8C8C", "#000000"


@dataclass(frozen=True, eq=False)
class SpeedGroups:
    """Clients of about the same speed, fastest first.

    Parameters
    ----------
    group : (K,) int64
        Each client's, by its row in the population.
    labels : list of str
        What each group is, in words.
    """

    group: IndexArray
    labels: list[str]

    @classmethod
    def of(cls, population: Population, batch_size: int) -> SpeedGroups:
        """Divide clients by the seconds that an even share of a batch takes them; those of one speed stay together."""
        delays = population.delays
        seconds = np.zeros(len(population))
        if delays is not None:
            seconds = delays.latency + delays.per_sample * (batch_size / len(population))
        bounds = np.unique(np.quantile(seconds, _QUANTILES, method="inverted_cdf"))
        group = np.unique(np.searchsorted(bounds, seconds), return_inverse=True)[1]
        labels = []
        for number in range(group.max() + 1):
            own = seconds[group == number]
            least, most = format_seconds(own.min()), format_seconds(own.max())
            told = least if least == most else f"{least} to {most}"
            labels.append(f"{len(own)} client{'s' if len(own) > 1 else ''}, {told} a step")
        return cls(group, labels)

    @property
    def colors(self) -> tuple[str, ...]:
        """A colour a group; the slowest of several has the one that stands out."""
        return {1: _COLORS[:1], 2: _COLORS[::2]}.get(len(self.labels), _COLORS)


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
        If the file cannot be written, or matplotlib is not installed.
    """
    with extra("experiments", "a picture of schedules"):
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator, PercentFormatter

    first = epochs[0][1].plan
    groups = SpeedGroups.of(first.population, int(first.batch_sizes().max()))
    times = any(epoch.times.any() for _, epoch in epochs)
    deviations = all(epoch.deviation is not None for _, epoch in epochs)
    # (what it shows, its values of an epoch or None for the shares); no column without anything to see
    columns: list[tuple[str, Any]] = [("share of the batch, by speed of client", None)]
    if deviations:
        columns.insert(0, ("batch deviation: 0 like all data, 2 nothing alike", lambda epoch: epoch.deviation))
    if times:
        columns.insert(0, ("seconds a step takes", lambda epoch: epoch.times))
    figure = Figure(figsize=(4.6 * len(columns), 1.2 + 1.55 * len(epochs)), layout="constrained")
    axes = figure.subplots(len(epochs), len(columns), squeeze=False, sharex="col", sharey="col")
    for row, (heading, epoch) in zip(axes, epochs, strict=True):
        for panel, (_, values) in zip(row, columns, strict=True):
            if values is None:
                _draw_shares(panel, epoch.plan, groups)
            else:
                _draw_steps(panel, values(epoch))
            panel.spines[["top", "right"]].set_visible(False)
            panel.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        total = float(epoch.times.sum())
        relative = f", {total / reference_time:.2f} x UGS" if reference_time else ""
        told = f": epoch of {format_seconds(total)}{relative}" if times else ""
        row[0].set_title(heading + told, loc="left", fontsize=11, fontweight="bold")
    for column, (title, values) in enumerate(columns):
        axes[0, column].annotate(
            title, (0.5, 1), xytext=(0, 26), xycoords="axes fraction", textcoords="offset points", ha="center",
            fontsize=12,
        )  # fmt: skip
        axes[0, column].set_ylim(0, None if values else 1)
        axes[0, column].set_xlim(0, max(len(epoch.plan) for _, epoch in epochs))
        axes[-1, column].set_xlabel("step of the epoch" + " (line: running mean)" * bool(values), fontsize=11)
    axes[0, -1].yaxis.set_major_formatter(PercentFormatter(1.0))
    handles, labels = axes[0, -1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower right", ncols=len(labels), frameon=False, fontsize=11)
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as exc:
        raise ConfigError(f"the picture {path} cannot be written: {exc}") from exc


def speed_shares(plan: BatchPlan, groups: SpeedGroups) -> FloatArray:
    """Return which share of the examples each group gives, along the epoch.

    Returns
    -------
    (G, bins) float64
        Columns sum to 1; a bin is one step, or several of a long epoch.
    """
    bins = min(_BINS, len(plan))
    column = plan.steps() * bins // len(plan)
    cells = groups.group[plan.rows()] * bins + column
    count = len(groups.labels)
    total = np.bincount(cells, plan.quotas, count * bins).reshape(count, bins)
    shares: FloatArray = total / total.sum(axis=0)
    return shares


def _draw_steps(axes: Any, values: FloatArray) -> None:
    """Draw a dot a step, and their running mean."""
    steps = np.arange(len(values)) + 0.5
    axes.plot(steps, values, ".", ms=3, color=_DOTS, alpha=0.6, rasterized=True)
    width = max(1, len(values) // 20)
    ones = np.ones(width)
    mean = np.convolve(values, ones, "same") / np.convolve(np.ones(len(values)), ones, "same")
    axes.plot(steps, mean, lw=1.6, color=_MEAN)
    axes.grid(alpha=0.25)


def _draw_shares(axes: Any, plan: BatchPlan, groups: SpeedGroups) -> None:
    """Draw the groups' shares on top of each other, the slowest at the bottom, where its height can be read."""
    shares = speed_shares(plan, groups)
    edges = np.linspace(0, len(plan), shares.shape[1] + 1)
    lower = np.zeros(len(edges))
    for share, label, color in reversed(list(zip(shares, groups.labels, groups.colors, strict=True))):
        upper = lower + np.append(share, share[-1])
        axes.fill_between(edges, lower, upper, step="post", color=color, label=label, lw=0)
        lower = upper
