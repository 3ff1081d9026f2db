"""What a defence costs and what it keeps: accuracy against leaks, and the front that nothing beats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from psl_flower.audit.result import AuditResult, Line

# What is drawn, where it was measured: (attack, measure, what the axis is called).
_LEAKS = (
    ("decoder", "SSIM", "images: SSIM of the decoder"),
    ("labels by trying each", "share that is right", "labels: share solved for"),
    ("labels from gradients", "direction AUC", "labels: AUC from gradients sent back"),
    ("labels", "as they are sent, share that is right", "labels: share right as sent"),
    ("membership", "decoded match AUC", "membership: AUC of a decoded match"),
    ("any", "epsilon, at most", "the model: epsilon"),
)
_SHOWN = 20  # points of accuracy below the best, at most
_MARKERS = "osD^vP*X<>hd"


def draw_frontier(result: AuditResult) -> Figure:
    """Draw accuracy against each leak: a colour a cut, a marker a defence, the Pareto front as a line."""
    lines = _by_attack(result)
    pairs = list(dict.fromkeys((case.cut, case.defence) for case in result.cases))
    cuts, defences = (list(dict.fromkeys(of)) for of in zip(*pairs, strict=True))
    drawn = [leak for leak in _LEAKS if any((*leak[:2], *pair) in lines for pair in pairs)]
    figure = Figure(figsize=(4.0 * max(len(drawn), 1) + 2.6, 4.0), layout="constrained")
    panels = figure.subplots(1, max(len(drawn), 1), squeeze=False)[0]
    for panel, (attack, measure, title) in zip(panels, drawn, strict=False):
        points = []
        for cut, defence in pairs:
            line = lines.get((attack, measure, cut, defence))
            if line is None:
                continue
            accuracy = np.array([c.accuracy for c in result.cases if (c.cut, c.defence) == (cut, defence)])
            x, y = 100 * float(accuracy.mean()), line.value
            spread = [float(np.std(of, ddof=1)) if len(of) > 1 else 0.0 for of in (100 * accuracy, line.values)]
            marker, colour = _MARKERS[defences.index(defence) % len(_MARKERS)], f"C{cuts.index(cut) % 10}"
            panel.errorbar(x, y, xerr=spread[0], yerr=spread[1], color=colour, marker=marker, ms=6, lw=0.8)
            points.append((x, y, float(np.mean(line.floors))))
        front = pareto_front([(x, y) for x, y, _ in points])
        panel.step([x for x, _ in front], [y for _, y in front], where="post", color="0.3", lw=1.2, zorder=0)
        panel.axhline(np.mean([floor for _, _, floor in points]), color="0.6", lw=1, ls=":")
        best = max(x for x, _, _ in points)
        panel.set_xlim(max(min(x for x, _, _ in points), best - _SHOWN) - 1, best + 1)
        panel.set_xlabel("accuracy (%)")
        panel.set_ylabel(title)
        panel.grid(alpha=0.25)
    for cut in cuts:
        panels[-1].plot([], [], "o", color=f"C{cuts.index(cut) % 10}", label=f"cut {cut}")
    for defence in defences:
        panels[-1].plot([], [], _MARKERS[defences.index(defence) % len(_MARKERS)], color="0.3", label=defence)
    panels[-1].plot([], [], color="0.3", label="Pareto front")
    panels[-1].plot([], [], ":", color="0.6", label="where nothing leaks")
    figure.legend(*panels[-1].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8)
    return figure


def _by_attack(result: AuditResult) -> dict[tuple[str, str, str, str], Line]:
    """Return figures by attack, measure, cut and defence; of an attack at several places, where it finds most."""
    found: dict[tuple[str, str, str, str], Line] = {}
    for line in sorted(result.lines(), key=lambda line: line.value):
        found[line.attack.partition(" (")[0], line.measure, line.cut, line.defence] = line
    return found


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points (accuracy, leak) that no other beats in both, by falling accuracy."""
    front: list[tuple[float, float]] = []
    for accuracy, leak in sorted(set(points), key=lambda point: (-point[0], point[1])):
        if not front or leak < front[-1][1]:
            front.append((accuracy, leak))
    return front
