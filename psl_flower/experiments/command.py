"""``python -m psl_flower.experiments``: run sweeps, and report what came out."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
import tomllib
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from psl_flower.app.task import check_model
from psl_flower.checks import check_int
from psl_flower.errors import ConfigError
from psl_flower.experiments.data import check_data
from psl_flower.experiments.findings import SWEEP_FILE
from psl_flower.experiments.provenance import provenance
from psl_flower.experiments.report import write_report
from psl_flower.experiments.results import RESULTS_FILE, RUNS_FOLDER, read_result
from psl_flower.experiments.runner import Runner, alone_in, default_workers, say
from psl_flower.experiments.sweep import FORMS, Experiment, Sweep, distinct, preset_names, read_sweep

_DESCRIPTION = """\
Train every combination of methods, clients, batch sizes, seeds ... that a small TOML file names; keep all results in
one table, and write a report with pictures. What is finished is not run again: after an interruption, give the same
command. The presets are the tables of the paper (arXiv 2407.15738); docs/experiments.md describes the TOML.
"""
_EXAMPLES = """\
examples:
  python -m psl_flower.experiments list
  python -m psl_flower.experiments run severe --quick
  python -m psl_flower.experiments run severe --full --set "num-clients=[128]" --set seed=0
  python -m psl_flower.experiments run my-sweep.toml --out results --workers 4
  python -m psl_flower.experiments report results
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 0; 1 if a training failed; 2 if an argument is refused."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_args(words)
    try:
        status: int = options.command(options, words)
    except ConfigError as error:
        print(f"psl_flower.experiments: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        say("Interrupted; what is finished is kept. The same command goes on from here.")
        return 130
    return status


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m psl_flower.experiments", description=_DESCRIPTION, epilog=_EXAMPLES, formatter_class=raw
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    run = commands.add_parser(
        "run", help="run a preset or a TOML file, then report", description="Run a sweep, then report what came out."
    )
    run.add_argument("sweep", metavar="PRESET_OR_TOML", help=f"{', '.join(preset_names())}; or a path ending in .toml")
    forms = run.add_mutually_exclusive_group()
    forms.add_argument(
        "--quick",
        dest="form",
        action="store_const",
        const="quick",
        help="minutes on a laptop (default, if there is one)",
    )
    forms.add_argument("--full", dest="form", action="store_const", const="full", help="the paper's setting: for a GPU")
    run.add_argument("--out", type=Path, metavar="DIR", help="where results go (default: outputs/NAME-FORM)")
    run.add_argument(
        "--workers", type=int, metavar="N", help="trainings at once (default: one a core, or one on a GPU)"
    )
    run.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a key for all runs, as in TOML; a list makes an axis: --set \"method=['UGS', 'FLS']\"",
    )
    run.add_argument(
        "--data-path", metavar="DIR", help="where the dataset's files are (default: torchvision downloads them)"
    )
    run.add_argument("--dry-run", action="store_true", help="only list what would be run")
    run.set_defaults(command=_run, form="")
    report = commands.add_parser(
        "report", help="write the report of a sweep anew", description="Write report.html and report.md of a sweep."
    )
    report.add_argument("folder", type=Path, metavar="DIR", help="the --out of a sweep, finished or not")
    report.set_defaults(command=_report)
    lists = commands.add_parser("list", help="list the presets", description="List the presets and their sizes.")
    lists.set_defaults(command=_list)
    return parser


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


def _run(options: argparse.Namespace, words: Sequence[str]) -> int:
    overrides = dict(map(parse_set, options.set))
    if options.data_path:
        overrides["data-path"] = str(Path(options.data_path).expanduser().resolve())
    sweep = read_sweep(options.sweep, options.form, overrides)
    experiments = sweep.experiments()
    folder = options.out or Path("outputs") / "-".join(filter(None, [Path(options.sweep).stem, sweep.form]))
    form = f", {sweep.form}" if sweep.form else ""
    trainings = len(list(distinct(experiments)))
    say(f"{sweep.title}{form}: {len(experiments)} combinations, {trainings} trainings, in {folder}")
    if options.dry_run:
        print("\n".join(f"{experiment.label}  {experiment.name}" for experiment in experiments))
        return 0
    configs = [experiment.setting.config for experiment in experiments]
    if options.workers is not None:
        check_int(options.workers, "--workers", least=1)
    runs = folder / RUNS_FOLDER
    _check(experiment for experiment in distinct(experiments) if read_result(runs / experiment.name) is None)
    threads = max(config.threads or 1 for config in configs)  # of themselves, one: trainings fill the cores
    workers = options.workers
    if workers is None:
        workers = default_workers(threads, configs[0].device)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # before the trainings' processes import numpy
    signal.signal(signal.SIGTERM, _interrupt)
    with alone_in(folder):
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
    unfinished = folder / f"{SWEEP_FILE}.unfinished"
    unfinished.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    os.replace(unfinished, folder / SWEEP_FILE)


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def _report(options: argparse.Namespace, words: Sequence[str]) -> int:
    for path in write_report(options.folder):
        print(path)
    return 0


def _list(options: argparse.Namespace, words: Sequence[str]) -> int:
    for name in preset_names():
        for form in FORMS:
            sweep = read_sweep(name, form)
            trainings = len(list(distinct(sweep.experiments())))
            print(f"{name:12} --{form:6} {trainings:4} trainings   {sweep.title}")
    return 0
