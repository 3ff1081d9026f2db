"""A report of a sweep that people can read: ``report.md``, and ``report.html`` with everything in one file."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping
from pathlib import Path
from string import Template

from psl_flower.config import RunConfig
from psl_flower.experiments.findings import Findings
from psl_flower.experiments.tables import Table, escaped, make_tables
from psl_flower.extras import extra
from psl_flower.strategy.progress import clock

with extra("experiments", "a report of a sweep"):
    from psl_flower.experiments.pictures import Picture, draw_pictures

MARKDOWN_FILE, HTML_FILE, PICTURES_FOLDER = "report.md", "report.html", "pictures"

_FORMS = {
    "quick": "QUICK: a smaller model, a part of the data and fewer epochs than in the paper. It shows how the methods "
    "compare, not what accuracy they can reach.",
}
_BEST = "Bold is the best mean of a column, centralised training aside: it is what the others are measured by."
_CSS = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1180px; margin: 2em auto; padding: 0 1.5em; }
h1 { margin-bottom: .2em; } h2 { margin-top: 2em; border-bottom: 1px solid #ccc; } h3 { margin: 1.4em 0 .3em; }
table { border-collapse: collapse; margin: .4em 0; font-variant-numeric: tabular-nums; }
th, td { padding: .25em .8em; text-align: right; border-bottom: 1px solid #e4e4e4; }
td { white-space: nowrap; } td code { white-space: normal; }
th:first-child, td:first-child { text-align: left; } thead th { border-bottom: 1.5px solid #666; }
.values td { text-align: left; vertical-align: top; }
td.paper, th.paper { color: #777; font-style: italic; }
.form { background: #fff3d6; border-left: 5px solid #e69f00; padding: .6em 1em; }
.failed { background: #fde3dc; border-left: 5px solid #d55e00; padding: .6em 1em; }
.note, figcaption { color: #555; font-size: 13.5px; } figure { margin: 1em 0; } img { max-width: 100%; }
code { background: #f3f3f3; padding: .1em .3em; overflow-wrap: anywhere; }
"""
_PAGE = Template("""\
<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><title>$title</title><style>$css</style></head>
<body>
<h1>$title</h1>
$body
</body>
</html>
""")


def write_report(folder: Path) -> tuple[Path, Path]:
    """Write the report of a sweep's folder, of what is finished so far; return where it is (Markdown, HTML).

    Raises
    ------
    ConfigError
        If that is no folder of a sweep, or nothing in it is finished.
    """
    findings = Findings(folder)
    pictures = draw_pictures(findings, folder / PICTURES_FOLDER)
    tables = make_tables(findings)
    (folder / MARKDOWN_FILE).write_text(_markdown(findings, tables, pictures), encoding="utf-8")
    (folder / HTML_FILE).write_text(_html(findings, tables, pictures), encoding="utf-8")
    return folder / MARKDOWN_FILE, folder / HTML_FILE


# --- what both say ---------------------------------------------------------------------------------------------------
def _title(findings: Findings) -> str:
    form = findings.sweep["form"]
    return f"{findings.sweep['title']} ({form})" if form else str(findings.sweep["title"])


def _failed(findings: Findings) -> str:
    names = list(findings.record["failures"])
    return f"{len(names)} trainings failed: {'; '.join(names)}" if names else ""


def _missing(findings: Findings) -> str:
    sweep, total = findings.sweep, len(findings.sweep["methods"])
    for values in sweep["axes"].values():
        total *= len(values)
    done = len(findings.rows)
    why = "" if findings.record["failures"] else "Not finished yet: "
    return f"{why}{total - done} of {total} combinations are missing here." if done < total else ""


def _paper_note(findings: Findings) -> str:
    paper, config = findings.sweep["paper"], {**RunConfig().as_run_config(), **findings.sweep["config"]}
    if not paper.get("accuracy"):
        return ""
    here = f"{config['dataset']}, {config['model']}, {config['num-server-rounds']} epochs"
    return f"* The paper's own figures ({paper.get('source', '')}): {paper.get('conditions', '')}. Here: {here}."


def _seeds(findings: Findings) -> str:
    seeds = findings.seeds
    several = (
        f"Mean ± standard deviation over the seeds {', '.join(seeds)}. " if len(seeds) > 1 else f"Seed {seeds[0]}. "
    )
    return several + _BEST


def _settings(findings: Findings) -> dict[str, str]:
    sweep = findings.sweep
    methods = {
        label: ", ".join(f"{k} = {v}" for k, v in keys.items()) or "-" for label, keys in sweep["methods"].items()
    }
    return {
        **{k: str(v) for k, v in sweep["config"].items()},
        **{k: ", ".join(map(str, values)) for k, values in sweep["axes"].items()},
        **{f"method {k}": v for k, v in methods.items()},
    }


def _made(findings: Findings) -> dict[str, str]:
    """Return how the results were made, for the last section."""
    made = findings.record["provenance"]
    runs = {row["run"]: float(row["seconds_total"]) for row in findings.rows}
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    return {
        "command": made["command"],
        "engine": findings.sweep["engine"],
        "machine": f"{made['cores']} cores of {made['processor'] or made['system']}"
        + (f", {made['gpu']}" if made["gpu"] else ", no GPU"),
        "processes at once": str(made["workers"]),
        "versions": f"Python {made['python']}, {versions}",
        "trainings": f"{len(runs)}, together {clock(sum(runs.values()))}",
        "wall clock": " + ".join(clock(seconds) for seconds in findings.record["seconds"]),
    }


# --- Markdown --------------------------------------------------------------------------------------------------------
def _markdown(findings: Findings, tables: list[Table], pictures: list[Picture]) -> str:
    lines = [f"# {_title(findings)}", ""]
    for text in (_FORMS.get(findings.sweep["form"], ""), _failed(findings), _missing(findings)):
        lines += [f"> **{text}**", ""] if text else []
    lines += [findings.sweep["description"], "", "## Tables", "", _seeds(findings), ""]
    for table in tables:
        lines += [f"### {table.title}", "", table.markdown(), ""]
    lines += [_paper_note(findings).replace("* The", "\\* The"), "", "## Pictures", ""]
    for picture in pictures:
        path = f"{PICTURES_FOLDER}/{picture.path.name}"
        lines += [f"### {picture.title}", "", f"![{picture.title}]({path})", "", picture.caption, ""]
    for title, values in (("Settings", _settings(findings)), ("How it was made", _made(findings))):
        cells = (f"| {escaped(k)} | `{escaped(v)}` |" for k, v in values.items())
        lines += [f"## {title}", "", "| | |", "|---|---|", *cells, ""]
    return "\n".join(lines)


# --- HTML ------------------------------------------------------------------------------------------------------------
def _html(findings: Findings, tables: list[Table], pictures: list[Picture]) -> str:
    parts = []
    for kind, text in (("form", _FORMS.get(findings.sweep["form"], "")), ("failed", _failed(findings))):
        parts += [f'<p class="{kind}">{html.escape(text)}</p>'] if text else []
    parts += [f"<p>{html.escape(text)}</p>" for text in (_missing(findings), findings.sweep["description"]) if text]
    first, rest = pictures[:1], pictures[1:]
    parts += ["<h2>Results</h2>", f'<p class="note">{html.escape(_seeds(findings))}</p>']
    parts += [_html_table(tables[0]), f'<p class="note">{html.escape(_paper_note(findings))}</p>']
    parts += [_html_picture(picture) for picture in first]
    parts += ["<h2>Pictures</h2>", *map(_html_picture, rest)]
    parts += ["<h2>More tables</h2>", *map(_html_table, tables[1:])]
    for title, values in (("Settings", _settings(findings)), ("How it was made", _made(findings))):
        parts += [f"<h2>{title}</h2>", _html_values(values)]
    return _PAGE.substitute(title=html.escape(_title(findings)), css=_CSS, body="\n".join(parts))


def _html_table(table: Table) -> str:
    kinds = [' class="paper"' if name.startswith("paper") else "" for name in table.head]
    head = "".join(f"<th{kind}>{html.escape(name)}</th>" for kind, name in zip(kinds, table.head, strict=True))
    body = ""
    for row in table.rows:
        texts = (f"<b>{html.escape(c.text)}</b>" if c.best else html.escape(c.text) for c in row)
        body += "<tr>" + "".join(f"<td{kind}>{text}</td>" for kind, text in zip(kinds, texts, strict=True)) + "</tr>\n"
    return f"<h3>{html.escape(table.title)}</h3>\n<table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table>"


def _html_picture(picture: Picture) -> str:
    data = base64.b64encode(picture.path.read_bytes()).decode()
    title, caption = html.escape(picture.title), html.escape(picture.caption)
    image = f'<img alt="{title}" src="data:image/png;base64,{data}">'
    return f"<h3>{title}</h3>\n<figure>{image}<figcaption>{caption}</figcaption></figure>"


def _html_values(values: Mapping[str, str]) -> str:
    rows = (f"<tr><td>{html.escape(k)}</td><td><code>{html.escape(v)}</code></td></tr>" for k, v in values.items())
    return '<table class="values">' + "".join(rows) + "</table>"
