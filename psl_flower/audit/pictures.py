"""The pictures of an audit: originals and what was made of them, and figures over cuts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from psl_flower.audit.finding import Gallery
from psl_flower.audit.frontier import draw_frontier
from psl_flower.audit.result import AuditResult, Case, Line

_DPI = 110
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")  # Okabe and Ito's, for colour-blind eyes
_DRAWN = ("SSIM", "AUC", "dCor", "share that is right")  # measures from 0 to 1, whose curves are drawn


def draw(result: AuditResult, folder: Path) -> list[Path]:
    """Draw what there is to see into PNG files; return their paths."""
    drawn = list[Path]()
    seeds = {case.seed for case in result.cases}
    for case in result.cases:
        if case.galleries and case.seed == min(seeds):
            drawn.append(_save(_gallery(case), folder, f"images-{case.cut}-{case.defence}"))
    cuts = list(dict.fromkeys(case.cut for case in result.cases))
    if len(cuts) > 1:
        drawn.append(_save(_over_cuts(result, cuts), folder, "cuts"))
    if len({case.defence for case in result.cases}) > 1:
        drawn.append(_save(draw_frontier(result), folder, "frontier"))
    return drawn


def _save(figure: Figure, folder: Path, name: str) -> Path:
    path = folder / f"{re.sub(r'[^A-Za-z0-9.]+', '-', name).strip('-')}.png"
    figure.savefig(path, dpi=_DPI)
    return path


# --- images ----------------------------------------------------------------------------------------------------------
def _gallery(case: Case) -> Figure:
    rows = [(f"{g.attack}:\n{what}", g, images) for g in case.galleries for what, images in _three(g)]
    columns = max(len(images) for _, _, images in rows)
    figure = Figure(figsize=(1.0 * columns + 1.9, 1.02 * len(rows) + 0.5), layout="constrained")
    panels = figure.subplots(len(rows), columns, squeeze=False)
    for line, (name, gallery, images) in zip(panels, rows, strict=True):
        low, high = float(gallery.originals.min()), float(gallery.originals.max())
        for panel in line:
            panel.set_axis_off()
        for panel, image in zip(line, images, strict=False):
            _show(panel, image, low, high)
        line[0].text(-0.15, 0.5, name, transform=line[0].transAxes, ha="right", va="center", fontsize=11)
    figure.suptitle(f"Images that the server found, cut {case.cut}, defence {case.defence}")
    return figure


def _three(gallery: Gallery) -> list[tuple[str, Tensor]]:
    return [("originals", gallery.originals), ("found", gallery.reconstructions), ("floor", gallery.floor)]


def _show(panel: Any, image: Tensor, low: float, high: float) -> None:
    scaled = ((image.float() - low) / max(high - low, 1e-12)).clamp(0, 1).numpy()
    channels = scaled.shape[0]
    pixels = np.moveaxis(scaled, 0, -1) if channels == 3 else scaled.mean(axis=0)
    panel.imshow(pixels, cmap="gray", vmin=0, vmax=1, interpolation="nearest")


# --- figures ---------------------------------------------------------------------------------------------------------
def _over_cuts(result: AuditResult, cuts: Sequence[str]) -> Figure:
    """Draw every measure from 0 to 1 over the cuts, a panel for each attack on each defence."""
    defences = list(dict.fromkeys(case.defence for case in result.cases))
    panels: dict[str, dict[str, dict[str, Line]]] = {}
    accuracy = dict[str, list[float]]()
    for defence in defences:
        own = [[c.accuracy for c in result.cases if (c.cut, c.defence) == (cut, defence)] for cut in cuts]
        for line in result.lines():
            if line.defence == defence and line.measure.endswith(_DRAWN):
                title = f"{line.attack}, {defence}" if len(defences) > 1 else line.attack
                panels.setdefault(title, {}).setdefault(line.measure, {})[line.cut] = line
                accuracy[title] = [float(np.mean(values)) for values in own]
    columns = min(4, max(1, len(panels)))
    rows = max(1, -(-len(panels) // columns))
    figure = Figure(figsize=(3.4 * columns, 3.6 * rows + 0.6), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True).flat
    for (title, measures), axes in zip(panels.items(), grid, strict=False):
        for (measure, found), color in zip(measures.items(), cycle(_COLORS)):
            there = [cut for cut in cuts if cut in found]
            x = [cuts.index(cut) for cut in there]
            axes.plot(x, [found[cut].value for cut in there], "o-", color=color, label=measure)
            axes.plot(x, [np.mean(found[cut].floors) for cut in there], ":", color=color)
        axes.plot(range(len(cuts)), accuracy[title], "k--", lw=1)
        axes.set_xticks(range(len(cuts)), cuts)
        axes.set_ylim(-0.05, 1.05)
        axes.set_title(title)
        axes.grid(alpha=0.25)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), frameon=False)
    for axes in grid:  # those that are left
        axes.set_axis_off()
    figure.suptitle(
        "What leaks at each cut (first part on the server). Dotted: by guessing; dashed: the model's accuracy"
    )
    return figure
