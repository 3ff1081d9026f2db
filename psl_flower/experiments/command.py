"""``psl-flower experiments``: run sweeps, and report what came out."""

from __future__ import annotations

import json
import os
import signal
import time
import tomllib
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from psl_flower.app.task import check_model
from psl_flower.checks import check_int
from psl_flower.errors import ConfigError
from psl_flower.experiments.data import check_data
from psl_flower.experiments.estimate import estimate
from psl_flower.experiments.findings import SWEEP_FILE, Findings
from psl_flower.experiments.provenance import provenance
from psl_flower.experiments.report import write_report
from psl_flower.experiments.results import RESULTS_FILE, RUNS_FOLDER, read_result
from psl_flower.experiments.runner import Runner, alone_in, default_workers, say
from psl_flower.experiments.sweep import FORMS, Experiment, Sweep, distinct, read_sweep
from psl_flower.experiments.tables import make_tables
from psl_flower.files import written
from psl_flower.presets import elsewhere, preset_names
from psl_flower.strategy.progress import clock

app = typer.Typer(no_args_is_help=True, add_completion=False)

_Json = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]


def _presets(begun: str) -> list[str]:
    return [name for name in preset_names("experiments") if name.startswith(begun)]


@app.callback(
    epilog="""Examples:

  psl-flower experiments list

  psl-flower experiments run severe --quick

  psl-flower experiments run severe --full --set "num-clients=[128]" --set seed=0

  psl-flower experiments run my-sweep.toml --output results --workers 4

  psl-flower experiments report results"""
)
def _about() -> None:
    """Train every combination of methods, clients, batch sizes, seeds ... that a small TOML file names.

    All results are kept in one table, and a report with pictures is written.
    What is finished is not run again: after an interruption, give the same
    command. The presets are the tables of the paper (arXiv 2407.15738);
    docs/experiments.md describes the TOML.
    """


@app.command(
    "run",
    epilog="""Examples:

  psl-flower experiments run severe --quick

  psl-flower experiments run severe --set "method=['UGS', 'FLS']" --set seed=0 --dry-run""",
)
def _run(
    ctx: typer.Context,
    sweep: Annotated[str, typer.Argument(metavar="PRESET_OR_TOML", autocompletion=_presets)],
    quick: Annotated[
        bool, typer.Option("--quick", help="Minutes on a laptop; the default, if there is such a form.")
    ] = False,
    full: Annotated[bool, typer.Option("--full", help="The paper's setting: for a GPU.")] = False,
    output: Annotated[Path | None, typer.Option(metavar="DIR", help="Where results go; outputs/NAME-FORM.")] = None,
    workers: Annotated[
        int | None, typer.Option(metavar="N", help="Trainings at once; one a core, or one on a GPU.")
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a key for all runs, as in TOML; a list makes an axis."),
    ] = None,
    data_path: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where the dataset's files are; torchvision downloads them.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list what would be run.")] = False,
) -> None:
    """Run a sweep, then report what came out.

    PRESET_OR_TOML is a name that psl-flower experiments list shows, or a path
    ending in .toml.
    """
    if quick and full:
        raise ConfigError("--quick and --full are two forms of a sweep: leave one out")
    overrides = dict(map(parse_set, changes or ()))
    if data_path:
        overrides["data-path"] = str(data_path.expanduser().resolve())
    asked = read_sweep(sweep, "quick" if quick else "full" if full else "", overrides)
    folder = output or Path("outputs") / "-".join(filter(None, [Path(sweep).stem, asked.form]))
    try:
        raise typer.Exit(_run_sweep(asked, folder, workers, ctx.obj, dry_run=dry_run))
    except KeyboardInterrupt:
        say("Interrupted; what is finished is kept. The same command goes on from here.")
        raise typer.Exit(130) from None


@app.command("report")
def _report(
    folder: Annotated[Path, typer.Argument(metavar="DIR")],
    as_json: _Json = False,
) -> None:
    """Write report.html and report.md of a sweep anew; with --json, print its tables as well.

    DIR is the --output of a sweep, finished or not.
    """
    files = [str(path) for path in write_report(folder)]
    if as_json:
        tables = [asdict(table) for table in make_tables(Findings(folder))]
        print(json.dumps({"files": files, "tables": tables}, indent=2))
    else:
        print(*files, sep="\n")


@app.command("list")
def _list(as_json: _Json = False) -> None:
    """List the presets and their sizes."""
    presets = [(name, form, read_sweep(name, form)) for name in preset_names("experiments") for form in FORMS]
    rows = [
        {"preset": name, "form": form, "trainings": len(list(distinct(sweep.experiments()))), "title": sweep.title}
        for name, form, sweep in presets
    ]
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    width = max(len(str(row["preset"])) for row in rows)
    for row in rows:
        print(f"{row['preset']:{width}} --{row['form']:6} {row['trainings']:4} trainings   {row['title']}")
    print(elsewhere("experiments"))


def parse_set(text: str) -> tuple[str, Any]:
    """Read KEY=VALUE; the value is TOML, or else text as it stands.

    Examples
    --------
    >>> parse_set("num-clients=[16, 64]"), parse_set("sampler=ugs")
    (('num-clients', [16, 64]), ('sampler', 'ugs'))
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set takes KEY=VALUE, got {text!r}")
    try:
        return key.strip(), tomllib.loads(f"x = {value}")["x"]
    except tomllib.TOMLDecodeError:
        return key.strip(), value.strip()


def _run_sweep(sweep: Sweep, folder: Path, workers: int | None, words: Sequence[str], *, dry_run: bool) -> int:
    """Run what is not finished of a sweep; return the exit code, 1 if a training failed."""
    experiments = sweep.experiments()
    form = f", {sweep.form}" if sweep.form else ""
    trainings = len(list(distinct(experiments)))
    say(f"{sweep.title}{form}: {len(experiments)} combinations, {trainings} trainings, in {folder}")
    if dry_run:
        print("\n".join(f"{experiment.label}  {experiment.name}" for experiment in experiments))
        return 0
    configs = [experiment.setting.config for experiment in experiments]
    if workers is not None:
        check_int(workers, "--workers", least=1)
    runs = folder / RUNS_FOLDER
    waiting = [experiment for experiment in distinct(experiments) if read_result(runs / experiment.name) is None]
    _check(waiting)
    threads = max(config.threads or 1 for config in configs)  # of themselves, one: trainings fill the cores
    if workers is None:
        workers = default_workers(threads, configs[0].device)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # before the trainings' processes import numpy
    signal.signal(signal.SIGTERM, _interrupt)
    with alone_in(folder):
        if seconds := estimate(waiting):
            say(f"{len(waiting)} trainings take about {clock(seconds / workers)} here, by some steps of each kind")
        return _train(sweep, experiments, folder, workers, words)


def _check(experiments: Iterable[Experiment]) -> None:
    """Refuse data and cuts that a training would refuse, before the first of them."""
    models, splits = set[object](), set[object]()
    for experiment in experiments:
        setting, config = experiment.setting, experiment.setting.config
        model = (config.dataset, config.model, config.cut)
        data = (config.dataset, config.data_path, setting.examples, config.batch_size)
        split = (*data, config.label_skew(), config.seed, setting.num_clients)
        try:
            if model not in models:
                check_model(config)
            if split not in splits:
                check_data(setting)
        except ConfigError as exc:
            raise ConfigError(f"{experiment.label}: {exc}") from exc
        models.add(model)
        splits.add(split)


def _train(sweep: Sweep, experiments: Sequence[Experiment], folder: Path, workers: int, words: Sequence[str]) -> int:
    begin, before = time.monotonic(), list[float]()
    with suppress(OSError, ValueError, KeyError):  # of an earlier, interrupted call
        before = json.loads((folder / SWEEP_FILE).read_text(encoding="utf-8"))["seconds"]
    made = provenance(words, workers)
    record = {"sweep": sweep.to_dict(), "provenance": made, "failures": {}, "seconds": before}
    _write(folder, record)
    failures: dict[str, str] = {}
    try:
        failures = Runner(folder, workers).run(experiments)
    finally:
        record |= {"failures": failures, "seconds": [*before, time.monotonic() - begin]}
        _write(folder, record)
    if len(failures) < len({experiment.name for experiment in experiments}):
        for path in write_report(folder):
            say(f"Report: {path}")
        say(f"Results: {folder / RESULTS_FILE}")
    for label, error in failures.items():
        say(f"FAILED {label}:\n{error}")
    return 1 if failures else 0


def _write(folder: Path, record: dict[str, Any]) -> None:
    with written(folder / SWEEP_FILE) as path:
        path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt
