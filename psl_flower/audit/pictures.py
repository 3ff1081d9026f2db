"""The pictures of an audit: originals and what was made of them, and figures over cuts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from psl_flower.audit.finding import Gallery
from psl_flower.audit.frontier import draw_frontier
from psl_flower.audit.result import AuditResult, Case, Line

_DPI = 110
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
    figure = Figure(figsize=(1.0 * columns + 1.6, 1.02 * len(rows) + 0.5), layout="constrained")
    panels = figure.subplots(len(rows), columns, squeeze=False)
    for line, (name, gallery, images) in zip(panels, rows, strict=True):
        low, high = float(gallery.originals.min()), float(gallery.originals.max())
        for panel in line:
            panel.set_axis_off()
        for panel, image in zip(line, images, strict=False):
            _show(panel, image, low, high)
        line[0].text(-0.15, 0.5, name, transform=line[0].transAxes, ha="right", va="center", fontsize=8)
    figure.suptitle(f"Cut {case.cut}, {case.defence}", fontsize=10)
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
    """Draw every measure from 0 to 1 over the cuts, a panel a defence."""
    defences = list(dict.fromkeys(case.defence for case in result.cases))
    figure = Figure(figsize=(4.2 * len(defences) + 3.0, 3.8), layout="constrained")
    panels = figure.subplots(1, len(defences), squeeze=False, sharey=True)[0]
    for panel, defence in zip(panels, defences, strict=True):
        curves: dict[str, dict[str, Line]] = {}
        for line in result.lines():
            if line.defence == defence and line.measure.endswith(_DRAWN):
                curves.setdefault(f"{line.attack}: {line.measure}", {})[line.cut] = line
        for number, (name, found) in enumerate(curves.items()):
            there = [cut for cut in cuts if cut in found]
            x, style = [cuts.index(cut) for cut in there], {"color": f"C{number % 10}", "ms": 4}
            panel.plot(x, [found[cut].value for cut in there], "o-" if number < 10 else "s-", label=name, **style)
            floors = [float(np.mean(found[cut].floors)) for cut in there]
            panel.plot(x, floors, ":", color=style["color"], lw=1, alpha=0.6)
        accuracy = [np.mean([c.accuracy for c in result.cases if (c.cut, c.defence) == (cut, defence)]) for cut in cuts]
        panel.plot(range(len(cuts)), accuracy, "k--", label="accuracy of the model")
        panel.set_xticks(range(len(cuts)), cuts)
        panel.set_ylim(-0.05, 1.05)
        panel.set_title(defence, fontsize=10)
        panel.set_xlabel("cut: first part on the server")
        panel.grid(alpha=0.25)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=8)
    return figure
