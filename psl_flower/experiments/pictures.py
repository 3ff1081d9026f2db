"""The pictures of a report: curves in small multiples, a method in one colour everywhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from psl_flower.experiments.findings import Curve, Findings, Part, spread
from psl_flower.typing import FloatArray

_DPI = 110
_PANEL = (3.5, 2.7)  # inches
_MOST_COLUMNS = 4  # of small multiples
_ACCURACY = "accuracy_last3"
_SHIFTED = 0.12  # between the first and the last method at one place of the x axis, whose places are 1 apart

# Okabe and Ito's colours, which differ for colour-blind eyes too; markers and dashes differ as well
_STYLES: dict[str, dict[str, Any]] = {
    "centralised": {"color": "#000000", "marker": "o", "linestyle": (0, (4, 2))},
    "ugs": {"color": "#0072B2", "marker": "s", "linestyle": "-"},
    "fpls": {"color": "#E69F00", "marker": "^", "linestyle": "-"},
    "fls": {"color": "#D55E00", "marker": "v", "linestyle": "-"},
    "lds": {"color": "#009E73", "marker": "D", "linestyle": "-"},
    "lb": {"color": "#CC79A7", "marker": "P", "linestyle": "-"},
    "aligned": {"color": "#56B4E9", "marker": "X", "linestyle": "-"},
    "sl": {"color": "#E69F00", "marker": "^", "linestyle": "-"},
    "splitfed-v1": {"color": "#CC79A7", "marker": "P", "linestyle": "-"},
    "splitfed-v2": {"color": "#D55E00", "marker": "v", "linestyle": "-"},
    "fedavg": {"color": "#009E73", "marker": "D", "linestyle": "-"},
}
_SPARE = [
    {"color": color, "marker": marker, "linestyle": (0, (1, 1))}
    for color, marker in (("#882255", "*"), ("#999933", "h"), ("#44AA99", "<"), ("#332288", ">"), ("#777777", "d"))
]


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture of a report: its file, what it shows, and how to read it."""

    path: Path
    title: str
    caption: str


def draw_pictures(findings: Findings, folder: Path) -> list[Picture]:
    """Draw all that can be drawn of a sweep into PNG files."""
    folder.mkdir(exist_ok=True)
    styles, pictures = _styles(findings), list[Picture]()
    for number, part in enumerate(findings.parts):
        suffix, addition = (f"-{number + 1}", f" ({part.title})") if part.title else ("", "")
        for name, title, caption, draw in _KINDS:
            figure = draw(findings, part, styles)
            if figure is not None:
                path = folder / f"{name}{suffix}.png"
                figure.savefig(path, dpi=_DPI)
                pictures.append(Picture(path=path, title=title + addition, caption=caption))
    return pictures


def _styles(findings: Findings) -> dict[str, dict[str, Any]]:
    """Return each method's style; the first of a kind has the kind's, the next of it a spare one."""
    styles: dict[str, dict[str, Any]] = {}
    spare = 0
    for method in findings.sweep["methods"]:  # all of them: colours stay when more results come in
        style = _STYLES.get(findings.kind(method), _SPARE[0])
        if any(style["color"] == other["color"] for other in styles.values()):
            # once they are used up, each colour comes with the next one's marker
            marker = _SPARE[(spare + spare // len(_SPARE)) % len(_SPARE)]["marker"]
            style, spare = {**_SPARE[spare % len(_SPARE)], "marker": marker}, spare + 1
        styles[method] = style
    return styles


# --- small multiples -------------------------------------------------------------------------------------------------
def _panels(count: int, *, sharex: bool, height: float = _PANEL[1]) -> tuple[Figure, list[Any]]:
    columns = min(count, _MOST_COLUMNS)
    rows = -(-count // columns)
    width = _PANEL[0] * columns if columns > 1 else 8.0
    figure = Figure(figsize=(width, height * rows + 0.5), layout="constrained")
    grid = figure.subplots(rows, columns, sharey=True, sharex=sharex, squeeze=False)
    axes = list(grid.flat)
    for extra in axes[count:]:
        extra.set_visible(False)
    return figure, axes[:count]


def _finish(figure: Figure, axes: Sequence[Any], part: Part, x: str, y: str) -> Figure:
    for panel, column in zip(axes, part.columns, strict=True):
        panel.set_title(part.heading(column), fontsize=10)
        panel.set_xlabel(x)
        _tidy(panel)
    for panel in axes[::_MOST_COLUMNS]:
        panel.set_ylabel(y)
    _legend(figure, axes)
    return figure


def _tidy(panel: Any) -> None:
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)


def _legend(figure: Figure, axes: Sequence[Any]) -> None:
    """Put one legend outside, where it covers nothing: above several panels, beside one."""
    handles = {
        label: handle for panel in axes for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    if len(axes) == 1:
        figure.legend(handles.values(), handles.keys(), loc="outside right upper", frameon=False)
    else:
        inches = 0.7 + 0.08 * max(map(len, handles), default=0)  # of a handle and the longest label
        columns = max(1, min(len(handles), int(figure.get_figwidth() / inches)))
        figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=columns, frameon=False)


# --- accuracy --------------------------------------------------------------------------------------------------------
def _accuracy(x_of: Callable[[Curve], FloatArray | None], label: str, *, seconds: bool = False) -> Any:
    def draw(findings: Findings, part: Part, styles: dict[str, dict[str, Any]]) -> Figure | None:
        lines: list[tuple[int, str, FloatArray, FloatArray]] = []
        for number, column in enumerate(part.columns):
            for method in findings.methods:
                curves = findings.curves(part, method, column)
                along = [x for x in map(x_of, curves) if x is not None]
                if curves and len(along) == len(curves):
                    lines.append((number, method, np.mean(along, axis=0), np.array([c.accuracy for c in curves])))
        if not lines:
            return None
        unit, name = _unit(max(x[-1] for _, _, x, _ in lines)) if seconds else (1.0, "")
        figure, axes = _panels(len(part.columns), sharex=True)
        for number, method, x, accuracy in lines:
            mean, style = 100 * accuracy.mean(axis=0), styles[method]
            axes[number].plot(x / unit, mean, label=method, ms=4, lw=1.6, markevery=max(1, len(x) // 10), **style)
            if len(accuracy) > 1:
                std = 100 * accuracy.std(axis=0, ddof=1)
                axes[number].fill_between(x / unit, mean - std, mean + std, color=style["color"], alpha=0.15, lw=0)
        for panel in axes:
            panel.set_xlim(0, None)  # after all are drawn: it also fixes the other end
            panel.xaxis.set_major_locator(MaxNLocator(5, integer=not seconds))
        return _finish(figure, axes, part, label + (f" ({name})" if seconds else ""), "test accuracy (%)")

    return draw


def _unit(seconds: float) -> tuple[float, str]:
    return next((u, name) for u, name in ((3600.0, "h"), (60.0, "min"), (1.0, "s")) if seconds >= 4 * u or u == 1.0)


def _final(findings: Findings, part: Part, styles: dict[str, dict[str, Any]]) -> Figure | None:
    """Draw the accuracy in the end against the columns; or, where there is one column, a line a method."""
    if len(part.columns) == 1:
        return _final_of_methods(findings, part, styles)
    figure = Figure(figsize=(8.0, 3.8), layout="constrained")
    axes = figure.subplots()
    for number, method in enumerate(findings.methods):
        known = [(i, part.values(method, column, _ACCURACY)) for i, column in enumerate(part.columns)]
        # hardly beside its place: only so far that equal ones are seen beside one another
        shift = _SHIFTED * ((number + 0.5) / len(findings.methods) - 0.5)
        x = [i + shift for i, values in known if len(values)]
        both = [spread(100 * values) for _, values in known if len(values)]
        mean, std = [m for m, _ in both], [s or 0.0 for _, s in both]
        axes.errorbar(x, mean, std, label=method, ms=6, lw=1.4, capsize=3, elinewidth=1.2, **styles[method])
        for i, values in known:
            axes.plot(np.full(len(values), i + shift), 100 * values, ".", color=styles[method]["color"], ms=6)
    axes.set_xticks(range(len(part.columns)), part.columns)
    axes.set_xlim(-0.3, len(part.columns) - 0.7)
    axes.set_xlabel({"num-clients": "clients", "batch-size": "batch size (examples)"}.get(part.axis, part.axis))
    axes.set_ylabel("test accuracy (%)")
    _tidy(axes)
    _legend(figure, [axes])
    return figure


def _final_of_methods(findings: Findings, part: Part, styles: dict[str, dict[str, Any]]) -> Figure:
    times = any(len(part.values(m, part.columns[0], "seconds_simulated")) for m in findings.methods)
    figure = Figure(figsize=(9.0 if times else 6.5, 0.9 + 0.38 * len(findings.methods)), layout="constrained")
    axes = list(figure.subplots(1, 1 + times, squeeze=False, sharey=True)[0])
    titles = [(_ACCURACY, 100.0, "test accuracy (%)"), ("seconds_simulated", 1.0, "simulated time of all epochs (s)")]
    for panel, (metric, scale, title) in zip(axes, titles, strict=False):
        for y, method in enumerate(findings.methods):
            values, style = scale * part.values(method, part.columns[0], metric), styles[method]
            if len(values):
                mean, std = spread(values)
                panel.errorbar(mean, y, xerr=std, color=style["color"], marker=style["marker"], ms=7, capsize=4)
                panel.plot(values, np.full(len(values), y + 0.25), ".", color=style["color"], ms=4)
        panel.set_xlabel(title)
        panel.set_yticks(range(len(findings.methods)), findings.methods)
        _tidy(panel)
    axes[0].set_ylim(len(findings.methods) - 0.5, -0.5)
    if times:
        axes[1].set_xlim(0, None)
    return figure


# --- batches and classes ---------------------------------------------------------------------------------------------
def _deviation(findings: Findings, part: Part, styles: dict[str, dict[str, Any]]) -> Figure | None:
    figure, axes = _panels(len(part.columns), sharex=True)
    drawn = False
    for panel, column in zip(axes, part.columns, strict=True):
        for method in findings.methods:
            y, style = findings.deviations(part, method, column), styles[method]
            if len(y) and not np.isnan(y).all():
                x, window = np.arange(1, len(y) + 1), max(1, len(y) // 20)
                panel.plot(x, y, ".", ms=2, color=style["color"], alpha=0.3, rasterized=True)
                smooth = np.convolve(np.pad(y, (window - 1, 0), mode="edge"), np.ones(window) / window, mode="valid")
                panel.plot(x, smooth, color=style["color"], linestyle=style["linestyle"], lw=1.6, label=method)
                drawn = True
    axes[0].set_xlim(0, None)  # of all of them, and only now: it also fixes the other end
    axes[0].set_ylim(0, None)
    return _finish(figure, axes, part, "step of the first epoch", "batch deviation (L1)") if drawn else None


def _confusion(findings: Findings, part: Part, styles: dict[str, dict[str, Any]]) -> Figure | None:
    column = part.columns[-1]
    found = [(m, findings.confusion(part, m, column)) for m in findings.methods]
    matrices = [(method, counts) for method, counts in found if counts is not None]
    if not matrices:
        return None
    columns = min(len(matrices), _MOST_COLUMNS)
    rows = -(-len(matrices) // columns)
    figure = Figure(figsize=(3.0 * columns + 0.8, 3.0 * rows + 0.4), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    image: Any = None
    for number, (panel, (method, counts)) in enumerate(zip(panels, matrices, strict=False)):
        share = 100 * counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
        image = panel.imshow(share, cmap="Blues", vmin=0, vmax=100)
        panel.set_title(fill(method, 36), fontsize=10)
        if number + columns >= len(matrices):  # nothing below it
            panel.set_xlabel("predicted class")
        if number % columns == 0:
            panel.set_ylabel("true class")
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_locator(MaxNLocator(10, integer=True))
    for extra in panels[len(matrices) :]:
        extra.set_visible(False)
    figure.colorbar(image, ax=panels, label="share of the true class (%)", shrink=0.9)
    if part.axis:
        figure.suptitle(part.heading(column), fontsize=10)
    return figure


_BAND = "Lines are means over the seeds, bands one standard deviation; accuracy is on the test split, after each epoch."
_KINDS: list[tuple[str, str, str, Callable[[Findings, Part, dict[str, dict[str, Any]]], Figure | None]]] = [
    (
        "final",
        "Accuracy in the end",
        "Mean of the last 3 epochs on the test split; bars are one standard deviation over the seeds, dots the seeds.",
        _final,
    ),
    (
        "accuracy-epochs",
        "Accuracy against epochs",
        f"An epoch uses every example of every client once. {_BAND}",
        _accuracy(lambda curve: np.arange(1.0, len(curve.steps) + 1), "epoch"),
    ),
    (
        "accuracy-steps",
        "Accuracy against steps",
        f"A step is one update of the model; some methods need more of them an epoch. {_BAND}",
        _accuracy(lambda curve: curve.steps, "steps"),
    ),
    (
        "accuracy-simulated",
        "Accuracy against simulated time",
        f"The clients' simulated delays on the virtual clock: a step waits for its slowest client. {_BAND}",
        _accuracy(lambda curve: curve.simulated, "simulated time", seconds=True),
    ),
    (
        "accuracy-real",
        "Accuracy against real time",
        f"What the training steps took on the machine that ran the sweep, without tests. {_BAND}",
        _accuracy(lambda curve: curve.real, "time of the steps", seconds=True),
    ),
    (
        "deviation",
        "Batch deviation over steps",
        "L1 distance of each batch's class shares from those of all data (0: the same, 2: nothing in common), in the "
        "first epoch of the first seed. Dots are steps, lines running means.",
        _deviation,
    ),
    (
        "confusion",
        "Confusion of the final models",
        "Which class each true class is taken for, over the whole test split, all seeds together.",
        _confusion,
    ),
]
