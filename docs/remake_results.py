"""Put the tables of finished sweeps into docs/results.md: the second half of ``make results``.

A block of that page belongs to a sweep's folder and to some of its tables::

    <!-- outputs/severe-quick: Accuracy (%), mean of the last 3 epochs -->
    (the table)
    <!-- end -->

Titles are those of `psl_flower.experiments.tables`, separated by ``;``. Columns of a table of all metrics follow its
title, each after a ``|``.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from psl_flower.experiments.findings import Findings
from psl_flower.experiments.tables import Table, make_tables

PAGE = Path(__file__).with_name("results.md")
BLOCK = re.compile(r"(<!-- (\S+): (.*?) -->\n).*?(<!-- end -->)", re.DOTALL)


def remade(text: str, root: Path) -> tuple[str, list[str]]:
    """Return the page with new tables, and the folders that are not there, whose tables stay as they are."""
    missing = []

    def table_of(block: re.Match[str]) -> str:
        begin, folder, wanted, end = block.groups()
        if not (root / folder / "results.csv").exists():
            missing.append(folder)
            return block[0]
        tables = {table.title: table for table in make_tables(Findings(root / folder))}
        shown = [_chosen(tables, words.strip()) for words in wanted.split(";")]
        titles = [f"*{table.title}*\n\n" if len(shown) > 1 else "" for table in shown]
        return begin + "\n".join(f"{t}{table.markdown()}\n" for t, table in zip(titles, shown, strict=True)) + end

    return BLOCK.sub(table_of, text), missing


def _chosen(tables: dict[str, Table], words: str) -> Table:
    title, *columns = (word.strip() for word in words.split("|"))
    if title not in tables:
        raise SystemExit(f"there is no table {title!r} in this sweep, only {', '.join(map(repr, tables))}")
    table = tables[title]
    if not columns:
        return table
    kept = [0, *(table.head.index(column) for column in columns)]
    return replace(table, head=[table.head[i] for i in kept], rows=[[row[i] for i in kept] for row in table.rows])


def main() -> None:
    """Write the page anew, and say which of its tables are."""
    before = PAGE.read_text(encoding="utf-8")
    text, missing = remade(before, PAGE.parents[1])
    PAGE.write_text(text, encoding="utf-8")
    for _, folder, *_ in BLOCK.findall(before):
        print(f"{folder}: {'not there, its tables stay as they were' if folder in missing else 'its tables are new'}")


if __name__ == "__main__":
    main()
