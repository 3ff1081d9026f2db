"""Results of several seeds as a table: means and standard deviations to read, every number for a spreadsheet."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

# name: the numbers of each seed, by column
Results = Mapping[str, Sequence[Mapping[str, float]]]


def format_table(results: Results, digits: Mapping[str, int]) -> str:
    """Return a Markdown table, aligned as it stands: a line a name, "mean ± standard deviation" of the seeds.

    Parameters
    ----------
    results : mapping
        At least one name and seed.
    digits : mapping
        What to show: columns, with the digits after the decimal point of each. A NaN makes a cell "-".
    """
    rows = [
        [name, *(_cell([seed[c] for seed in seeds], n) for c, n in digits.items())] for name, seeds in results.items()
    ]
    return markdown_table([["", *digits], *rows])


def markdown_table(lines: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table of a head and rows, aligned as it stands: the first column to the left, others right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    head, *rows = lines
    rule = ["-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    cells = (
        [c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))]
        for line in (head, rule, *rows)
    )
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def save_table(folder: Path, results: Results, digits: Mapping[str, int]) -> None:
    """Write ``table.md``, as `format_table` has it, and ``table.csv``, a line a name and seed with every number."""
    (folder / "table.md").write_text(format_table(results, digits) + "\n", encoding="utf-8")
    columns = list(next(iter(results.values()))[0])
    with (folder / "table.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["name", "seed", *columns])
        for name, seeds in results.items():
            writer.writerows([name, i, *(numbers[c] for c in columns)] for i, numbers in enumerate(seeds))


def _cell(values: Sequence[float], digits: int) -> str:
    numbers = np.array(values, dtype=np.float64)
    if np.isnan(numbers).any():
        return "-"
    spread = f" ± {numbers.std(ddof=1):.{digits}f}" if len(numbers) > 1 else ""
    return f"{numbers.mean():.{digits}f}{spread}"
