"""The tables of a report: mean ± standard deviation over seeds, a row a method, the best in bold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from psl_flower.app.table import markdown
from psl_flower.experiments.findings import Findings, Part, spread


@dataclass(frozen=True, kw_only=True)
class _Metric:
    """How a column of ``results.csv`` is shown; `better` is 1 if more is, -1 if less is, 0 if neither."""

    title: str
    short: str  # as a column's heading
    digits: int
    better: int = 0
    scale: float = 1.0
    an_epoch: bool = False  # whether to divide it by the number of epochs


_ACCURACY = "accuracy_last3"
_METRICS = {
    _ACCURACY: _Metric(
        title="Accuracy (%), mean of the last 3 epochs", short="accuracy %", digits=1, better=1, scale=100
    ),
    "accuracy_best": _Metric(title="Accuracy (%), best epoch", short="best epoch %", digits=1, better=1, scale=100),
    "loss_last": _Metric(title="Loss on the test split, last epoch", short="test loss", digits=2, better=-1),
    "steps": _Metric(title="Steps an epoch", short="steps an epoch", digits=0, an_epoch=True),
    "deviation_mean": _Metric(title="Batch deviation (L1), mean over steps", short="deviation", digits=2, better=-1),
    "deviation_p95": _Metric(
        title="Batch deviation (L1), 95th percentile of steps", short="deviation p95", digits=2, better=-1
    ),
    "seconds_simulated": _Metric(
        title="Simulated seconds an epoch", short="simulated s an epoch", digits=0, better=-1, an_epoch=True
    ),
    "seconds_total": _Metric(
        title="Seconds of the training on this machine, with tests", short="real s, with tests", digits=0
    ),
}
_REFERENCE = "centralised"


@dataclass(frozen=True)
class Cell:
    """A cell's text, and whether it is the best of its column."""

    text: str
    best: bool = False

    def __bool__(self) -> bool:
        return bool(self.text)


@dataclass(frozen=True)
class Table:
    """A table in words."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]

    def markdown(self) -> str:
        """Return it in Markdown, aligned as it stands."""
        lines = [list(self.head), *([f"**{c.text}**" if c.best else c.text for c in row] for row in self.rows)]
        return markdown([[escaped(text) for text in line] for line in lines])


def escaped(text: str) -> str:
    """Return what stands for `text` in a cell of Markdown."""
    return text.replace("|", r"\|")


def make_tables(findings: Findings) -> list[Table]:
    """Return the tables of each part: one a metric, methods against columns; or one of all metrics for one column."""
    tables = []
    for part in findings.parts:
        known = {name: _column_of(findings, part, name, metric) for name, metric in _METRICS.items()}
        known = {name: columns for name, columns in known.items() if any(map(any, columns))}
        if part.axis:
            heads = [part.heading(column) for column in part.columns]
            for name, columns in known.items():
                paper = _paper(findings, part) if name == _ACCURACY else {}
                tables.append(
                    _table(_METRICS[name].title, part, findings, dict(zip(heads, columns, strict=True)) | paper)
                )
        else:
            shown = {_METRICS[name].short: columns[0] for name, columns in known.items()}
            tables.append(_table("All metrics", part, findings, {**shown, **_paper(findings, part)}))
    return tables


def _table(title: str, part: Part, findings: Findings, columns: Mapping[str, Sequence[Cell]]) -> Table:
    rows = [[Cell(method), *(cells[i] for cells in columns.values())] for i, method in enumerate(findings.methods)]
    return Table(f"{title}, {part.title}" if part.title else title, ["", *columns], rows)


def _column_of(findings: Findings, part: Part, name: str, metric: _Metric) -> list[list[Cell]]:
    """Return the cells of a metric, a list a column; texts are empty where nothing is known."""
    cells = []
    for column in part.columns:
        means, texts = dict[str, float](), dict[str, str]()
        for method in findings.methods:
            values = metric.scale * part.values(method, column, name)
            if len(values):
                values = values / part.values(method, column, "epochs") if metric.an_epoch else values
                means[method], std = spread(values)
                texts[method] = _number(means[method], std, metric.digits)
                if 1 < len(findings.seeds) != len(values):  # else it would pass for as sure as the others
                    texts[method] += f" ({len(values)} of {len(findings.seeds)} seeds)"
        # centralised training is what the others are compared with, not one of them
        rivals = {m: metric.better * mean for m, mean in means.items() if findings.kind(m) != _REFERENCE}
        best = max(rivals, key=lambda m: rivals[m]) if metric.better and len(rivals) > 1 else ""
        cells.append([Cell(texts.get(method, ""), method == best) for method in findings.methods])
    return cells


def _paper(findings: Findings, part: Part) -> dict[str, list[Cell]]:
    """Return the paper's own figures as further columns: those of a part's one value, or of all values on its axis."""
    figures = findings.sweep["paper"].get("accuracy", {})
    first = next((key for key in findings.sweep["axes"] if key != "seed"), "")  # what they are by
    if part.axis not in ("", first):
        return {}
    values = list(dict.fromkeys(value for its in figures.values() for value in its))
    if first and not part.axis:
        values = [value for value in values if value == str(findings.sweep["axes"][first][0])]
    return {
        f"paper, {part.heading(value)}*" if part.axis else "paper*": [
            Cell(str(figures.get(method, {}).get(value, ""))) for method in findings.methods
        ]
        for value in values
    }


def _number(mean: float, std: float | None, digits: int) -> str:
    return f"{mean:.{digits}f}" if std is None else f"{mean:.{digits}f} ± {std:.{digits}f}"
