"""The report says what the results are, marks what is best, quick or the paper's, and is one file."""

import csv
import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from psl_flower.errors import ConfigError
from psl_flower.experiments import report
from psl_flower.experiments.findings import Findings
from psl_flower.experiments.pictures import _legend, _styles
from psl_flower.experiments.report import write_report
from psl_flower.experiments.tables import Cell, Table, make_tables
from psl_flower.presets import preset_names

DOCS = Path(__file__).parents[2] / "docs"
METHODS = {
    "UGS": {"sampler": "ugs"},
    "FLS": {"sampler": "fls"},
    "Aligned": {"sampler": "aligned"},
    "Aligned, tilt 0.1": {"sampler": "aligned", "sampler-tilt": 0.1},
    "centralised": {"algorithm": "centralised"},
}
ACCURACY = {"UGS": 0.8, "FLS": 0.5, "Aligned": 0.7, "Aligned, tilt 0.1": 0.6, "centralised": 0.9}


def a_sweep(folder, *, axes=None, missing=(), simulated=True, form="quick", paper=None):
    """Write what the runner leaves: two seeds, 2 points apart, and 10 points less accuracy in the second column."""
    axes = {"num-clients": [16, 128]} if axes is None else axes
    key = next(iter(axes), None)
    rows = []
    for method in METHODS:
        for number, value in enumerate(axes[key] if key else [None]):
            for seed in (0, 1):
                if (method, value) not in missing:
                    rows.append(a_run(folder, method, {key: value} if key else {}, number, seed, simulated))
    with (folder / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    sweep = {"title": "T <1>", "description": "What it is about", "engine": "vectorised", "form": form}
    sweep |= {
        "config": {"dataset": "digits"},
        "axes": {**axes, "seed": [0, 1]},
        "methods": METHODS,
        "paper": paper or {},
    }
    made = {"command": "psl-flower experiments run x", "workers": 2, "processor": "P", "cores": 2, "gpu": ""}
    made |= {"python": "3.11", "system": "Linux", "versions": {"torch": "2.13"}}
    record = {"sweep": sweep, "provenance": made, "failures": {}, "seconds": [61.0, 5.0]}
    (folder / "sweep.json").write_text(json.dumps(record))
    return folder


def a_run(folder, method, values, number, seed, simulated):
    name = f"{method}-{number}-{seed}"
    run = folder / "runs" / name
    run.mkdir(parents=True)
    accuracy = ACCURACY[method] - 0.1 * number + 0.02 * seed
    with (run / "rounds.csv").open("w", newline="") as file:
        train, test = "train_metrics_clientapp", "evaluate_metrics_serverapp"
        writer = csv.writer(file)
        writer.writerow(
            ["round", f"{train}/num_steps", f"{train}/seconds_real", f"{train}/seconds_simulated", f"{test}/accuracy"]
        )
        for epoch in (1, 2):
            writer.writerow([epoch, 10, 1.5, 100.0 if simulated else "", accuracy * epoch / 2])
    with (run / "steps.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["round", "step", "deviation"])
        writer.writerows([epoch, step, 0.1 * epoch] for epoch in (1, 2) for step in range(10))
    np.savetxt(run / "confusion.csv", np.eye(3, dtype=int) * 5, fmt="%d", delimiter=",")
    return {
        "method": method,
        **values,
        "seed": seed,
        "accuracy_last3": accuracy,
        "epochs": 2,
        "steps": 20,
        "seconds_simulated": 200.0 if simulated else "",
        "seconds_total": 30.0,
        "run": name,
    }


def texts(table):
    return {row[0].text: [cell.text for cell in row[1:]] for row in table.rows}


def test_tables_hold_mean_and_deviation_of_the_seeds_and_mark_the_best_but_not_the_reference(tmp_path):
    accuracy, steps, simulated, real = make_tables(Findings(a_sweep(tmp_path)))
    assert accuracy.head == ["", "16 clients", "128 clients"]
    assert texts(accuracy)["UGS"] == ["81.0 ± 1.4", "71.0 ± 1.4"]  # 80 and 82; 70 and 72
    assert texts(accuracy)["centralised"] == ["91.0 ± 1.4", "81.0 ± 1.4"]
    assert [row[0].text for row in accuracy.rows if row[1].best] == ["UGS"]
    assert texts(steps)["FLS"] == ["10 ± 0", "10 ± 0"]  # an epoch
    assert texts(simulated)["FLS"] == ["100 ± 0", "100 ± 0"]
    assert not any(cell.best for row in [*steps.rows, *real.rows] for cell in row)
    assert "| UGS               | **81.0 ± 1.4** | **71.0 ± 1.4** |" in accuracy.markdown()


def test_one_column_makes_one_table_of_all_metrics(tmp_path):
    (table,) = make_tables(Findings(a_sweep(tmp_path, axes={}, simulated=False)))
    assert table.head == ["", "accuracy %", "steps an epoch", "real s, with tests"]
    assert texts(table)["FLS"] == ["51.0 ± 1.4", "10 ± 0", "30 ± 0"]


def test_the_papers_figures_stand_beside_ours_marked_as_the_papers(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "draw_pictures", lambda *_: [])  # which take seconds
    paper = {"source": "arXiv 1", "conditions": "CIFAR-10", "accuracy": {"UGS": {"128": "84.31"}}}
    folder = a_sweep(tmp_path, paper=paper)
    accuracy = make_tables(Findings(folder))[0]
    assert accuracy.head[-1] == "paper, 128 clients*"
    assert texts(accuracy)["UGS"][-1] == "84.31"
    assert texts(accuracy)["FLS"][-1] == ""
    write_report(folder)
    note = "The paper's own figures (arXiv 1): CIFAR-10. Here: digits, cnn, 5 epochs."
    assert note in (folder / "report.md").read_text()
    page = (folder / "report.html").read_text()
    assert '<td class="paper">84.31</td>' in page
    assert page.count('class="paper"') == 1 + len(METHODS)


@pytest.mark.parametrize(
    ("axes", "columns"),
    [
        ({"num-clients": [128]}, {"paper*": "84.31"}),
        ({"num-clients": [16]}, {}),
        ({"num-clients": [16], "batch-size": [64, 128]}, {}),
        ({"num-clients": [16, 32]}, {"paper, 32 clients*": "70", "paper, 128 clients*": "84.31"}),
    ],
)
def test_the_papers_figures_stand_beside_no_others_than_their_own(tmp_path, axes, columns):
    folder = a_sweep(tmp_path, paper={"accuracy": {"UGS": {"32": "70", "128": "84.31"}}})
    record = json.loads((folder / "sweep.json").read_text())
    record["sweep"]["axes"] = {**axes, "seed": [0, 1]}
    (folder / "sweep.json").write_text(json.dumps(record))
    rows = list(csv.DictReader((folder / "results.csv").read_text().splitlines()))
    for row in rows:
        row["batch-size"] = 64
    with (folder / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    table = make_tables(Findings(folder))[0]
    found = {head: cell for head, cell in zip(table.head[1:], texts(table)["UGS"], strict=True) if "paper" in head}
    assert found == columns


def test_a_mean_of_fewer_seeds_says_so_and_a_label_may_hold_what_markdown_uses(tmp_path):
    folder = a_sweep(tmp_path)
    text = (folder / "results.csv").read_text().splitlines()
    (folder / "results.csv").write_text("\n".join([text[0], *text[2:]]) + "\n")  # without UGS, 16 clients, seed 0
    table = make_tables(Findings(folder))[0]
    assert texts(table)["UGS"] == ["82.0 (1 of 2 seeds)", "71.0 ± 1.4"]
    assert "UGS" not in Table("", ["", "a|b"], [[Cell("U|GS"), Cell("1")]]).markdown()
    assert r"| U\|GS |" in Table("", ["", "a|b"], [[Cell("U|GS"), Cell("1")]]).markdown()


def test_the_page_is_one_file_that_says_all(tmp_path):
    markdown, page = (path.read_text() for path in write_report(a_sweep(tmp_path)))
    assert "<title>T &lt;1&gt; (quick)</title>" in page
    for text in ("QUICK: a smaller model", "What it is about", "psl-flower experiments run x", "1:01 + 0:05"):
        assert text in page
        assert text in markdown
    for title in ("epochs", "steps", "simulated time", "real time"):
        assert f"Accuracy against {title}" in page
    assert "20, together 10:00" in page  # trainings of 30 s
    assert len(re.findall(r'src="data:image/png;base64,', page)) == 7
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    for path in re.findall(r"!\[.*?\]\((.*?)\)", markdown):
        assert (tmp_path / path).read_bytes().startswith(b"\x89PNG")


def test_what_is_missing_is_said_and_what_is_not_known_is_not_drawn(tmp_path):
    folder = a_sweep(tmp_path, missing=[("FLS", 128)], simulated=False, form="")
    _, page = (path.read_text() for path in write_report(folder))
    assert "Not finished yet: 2 of 20 combinations are missing here." in page
    assert "simulated" not in page
    assert "QUICK" not in page


def test_further_axes_make_further_tables(tmp_path):
    folder = a_sweep(tmp_path)
    record = json.loads((folder / "sweep.json").read_text())
    record["sweep"]["axes"]["partition"] = ["mild", "severe"]
    (folder / "sweep.json").write_text(json.dumps(record))
    text = (folder / "results.csv").read_text().splitlines()
    rows = [f"{text[0]},partition", *(f"{line},severe" for line in text[1:]), *(f"{line},mild" for line in text[1:5])]
    (folder / "results.csv").write_text("\n".join(rows) + "\n")
    tables = make_tables(Findings(folder))
    titles = [table.title for table in tables if table.title.startswith("Accuracy")]
    assert [title.split(", ")[-1] for title in titles] == ["partition = mild", "partition = severe"]
    assert texts(tables[0])["FLS"] == ["", ""]  # only UGS has mild


def test_a_method_has_one_colour_and_each_its_own(tmp_path):
    styles = _styles(Findings(a_sweep(tmp_path)))
    assert len({style["color"] for style in styles.values()}) == len(METHODS)
    assert (styles["UGS"]["color"], styles["centralised"]["color"]) == ("#0072B2", "#000000")


def test_many_methods_of_one_sampler_are_told_apart(tmp_path):
    folder = a_sweep(tmp_path)
    record = json.loads((folder / "sweep.json").read_text())
    record["sweep"]["methods"] |= {f"UGS {i}": {"sampler": "ugs"} for i in range(20)}
    (folder / "sweep.json").write_text(json.dumps(record))
    styles = _styles(Findings(folder))
    assert len({(style["color"], style["marker"]) for style in styles.values()}) == len(METHODS) + 20


@pytest.mark.parametrize("length", [3, 24, 40])
@pytest.mark.parametrize("panels", [2, 4])
def test_the_legend_fits_however_many_and_long_the_labels(panels, length):
    figure = Figure(figsize=(3.5 * panels, 4), layout="constrained")
    axes = list(figure.subplots(1, panels))
    for i in range(12):
        axes[0].plot([0, 1], label=f"{i:2}".ljust(length, "e"))
    _legend(figure, axes)
    figure.draw_without_rendering()
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.x1


def test_a_folder_without_results_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="has no results of a sweep"):
        write_report(tmp_path)


# --- the page of results ---------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def page_of_results():
    spec = importlib.util.spec_from_file_location("remake_results", DOCS / "remake_results.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_of_the_docs_are_made_anew_where_the_sweep_is_there(tmp_path, page_of_results):
    a_sweep(tmp_path / "outputs" / "two", axes={"num-clients": [16, 128]})
    a_sweep(tmp_path / "outputs" / "one", axes={})
    page = (
        "before\n<!-- outputs/two: Accuracy (%), mean of the last 3 epochs; Steps an epoch -->\n| old |\n<!-- end -->\n"
        "<!-- outputs/one: All metrics | steps an epoch | accuracy % -->\n| old |\n<!-- end -->\n"
        "<!-- outputs/gone: Steps an epoch -->\n| kept |\n<!-- end -->\nafter\n"
    )
    made, missing = page_of_results.remade(page, tmp_path)
    assert missing == ["outputs/gone"]
    assert "| old |" not in made
    assert "| kept |" in made
    assert "*Steps an epoch*\n\n|" in made
    assert "| UGS               | **81.0 ± 1.4** | **71.0 ± 1.4** |" in made
    assert "| UGS               |         10 ± 0 | **81.0 ± 1.4** |" in made
    assert page_of_results.remade(made, tmp_path)[0] == made
    with pytest.raises(SystemExit, match="no table 'Step' in this sweep, only 'Accuracy"):
        page_of_results.remade("<!-- outputs/two: Step -->\n<!-- end -->", tmp_path)


def test_make_results_runs_the_sweeps_whose_tables_the_docs_have(page_of_results):
    folders = [block[2] for block in page_of_results.BLOCK.finditer(page_of_results.PAGE.read_text(encoding="utf-8"))]
    (sweeps,) = re.findall(r"^SWEEPS \?= (.*)$", (DOCS.parent / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert folders == [f"outputs/{sweep}-quick" for sweep in sweeps.split()]
    assert set(sweeps.split()) <= set(preset_names("experiments"))
