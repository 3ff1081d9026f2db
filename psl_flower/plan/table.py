"""The planner's comparison as an aligned text table."""

from __future__ import annotations

from collections.abc import Sequence

from psl_flower.plan.measure import Summary

_HEADER = (
    ("sampler", ""),
    ("steps", ""),
    ("batch", "min-max"),
    ("epoch", "time"),
    ("vs", "UGS"),
    ("lower", "bound"),
    ("deviation", "mean"),
    ("", "p95"),
    ("", "weighted"),
    ("client", "mix"),
    ("clients", "a step"),
    ("plan", "built in"),
)


def format_table(summaries: Sequence[Summary]) -> str:
    """Return the table, a sampler a line, under two lines of headings."""
    rows = [tuple(column[line] for column in _HEADER) for line in (0, 1)] + [_cells(s) for s in summaries]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER))]
    lines = [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    lines.insert(2, "-" * len(lines[0]))
    return "\n".join(line.rstrip() for line in lines)


def format_seconds(seconds: float) -> str:
    """Return a duration with a unit that suits it: 350 ms, 12.3 s, 5 min 10 s, 2 h 05 min."""
    if seconds < 1:
        return f"{seconds * 1000:.{0 if seconds >= 0.01 or not seconds else 1}f} ms"
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 100:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min"


def _cells(summary: Summary) -> tuple[str, ...]:
    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"

    return (
        summary.label,
        f"{summary.steps:.0f}",
        f"{summary.least_batch}-{summary.largest_batch}",
        format_seconds(summary.epoch_time),
        number(summary.relative_time),
        number(summary.relative_bound),
        number(summary.deviation),
        number(summary.deviation_p95),
        number(summary.deviation_weighted),
        number(summary.client_mix),
        f"{summary.participation:.1f}",
        format_seconds(summary.build_seconds),
    )
