"""Trainings are run once, in processes of their own; what fails stops nothing and is never taken for finished."""

import csv
import fcntl
import json
import re
import shutil

import pytest

from psl_flower.cli import main
from psl_flower.errors import ConfigError
from psl_flower.experiments.results import summarise, write_results
from psl_flower.experiments.runner import alone_in
from psl_flower.experiments.sweep import read_sweep
from psl_flower.experiments.trial import run_trial
from psl_flower.records import read_metrics
from psl_flower.strategy.recorder import METRICS_FILE

SWEEP = """
title = "Digits"
[config]
model = "tiny-cnn"
num-server-rounds = 1
batch-size = 256
[axes]
num-clients = [2, 4]
[methods]
UGS = { sampler = "ugs" }
centralised = { algorithm = "centralised" }
broken = { sampler = "killer_for_a_test:Broken" }
killed = { sampler = "killer_for_a_test:Killer" }
"""
KILLER = """
import os, signal
from psl_flower.samplers import UniformGlobalSampler

class Killer(UniformGlobalSampler):
    def _plan(self, population, rng):
        os.kill(os.getpid(), signal.SIGKILL)  # as when memory runs out

class Broken(UniformGlobalSampler):
    def _plan(self, population, rng):
        raise ZeroDivisionError("no plan")
"""


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    (tmp_path / "killer_for_a_test.py").write_text(KILLER)
    monkeypatch.syspath_prepend(
        tmp_path
    )  # now that the file is there: Python may list the folder at once, and only then
    path = tmp_path / "sweep.toml"
    path.write_text(SWEEP)
    return str(path)


def table(folder):
    with (folder / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_sweep_survives_failures_and_runs_nothing_twice(sweep, tmp_path, capsys):
    folder = tmp_path / "out"
    command = ["experiments", "run", sweep, "--output", str(folder), "--workers", "2"]
    assert main(command) == 1
    said = capsys.readouterr().err
    assert "8 combinations, 7 trainings" in said
    assert "broken, num-clients 2, seed 0: FAILED: ZeroDivisionError: no plan" in said
    assert "Traceback" in said  # once more at the end, in full
    assert "FAILED killed, num-clients 4, seed 0:\nthe process ended without a word (exit code -9)" in said
    rows = table(folder)
    assert [(row["method"], row["num-clients"]) for row in rows] == [
        ("UGS", "2"),
        ("centralised", "2"),
        ("UGS", "4"),
        ("centralised", "4"),
    ]
    assert rows[1]["run"] == rows[3]["run"]  # it has no clients
    names = sorted(path.name for path in (folder / "runs").iterdir())
    assert names == sorted({row["run"] for row in rows})
    for name in names:
        files = {path.name for path in (folder / "runs" / name).iterdir()}
        assert files >= {"setting.json", "config.json", "metrics.jsonl", "steps.csv", "rounds.csv", "confusion.csv"}
    assert re.search("4 trainings failed: .*broken, num-clients 2, seed 0", (folder / "report.md").read_text())

    # an interrupted training leaves such a folder, and what is finished is not run again
    (folder / "runs" / f".unfinished-{names[0]}-1").mkdir()
    before = {path: path.stat().st_mtime_ns for path in folder.glob("runs/*/*")}
    assert main([*command, "--set", "method=['UGS', 'centralised']"]) == 0
    assert "3 of 3 trainings are finished already" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in folder.glob("runs/*/*")} == before
    record = json.loads((folder / "sweep.json").read_text())
    assert len(record["seconds"]) == 2
    assert record["failures"] == {}

    # nor is what somebody has damaged taken for finished
    shutil.rmtree(folder / "runs" / rows[2]["run"])
    (folder / "runs" / rows[0]["run"] / "result.json").write_text('{"accuracy_last": 0.')
    assert main(["experiments", "report", str(folder)]) == 0
    assert "Not finished yet: 1 of 4" in (folder / "report.md").read_text()
    assert main([*command, "--set", "method=UGS", "--set", "num-clients=2"]) == 0
    (again,) = table(folder)
    assert {k: v for k, v in again.items() if "seconds" not in k} == {
        k: v for k, v in rows[0].items() if "seconds" not in k
    }
    assert record["provenance"]["command"].endswith("'method=['\"'\"'UGS'\"'\"', '\"'\"'centralised'\"'\"']'")


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ('bad = { dataset = "fashion-mnist", data-path = "/nowhere" }', "data-path must be"),
        ("bad = { batch-size = 1438 }", "batch-size must be at most 1437, the examples trained on, got 1438"),
        ('bad = { cut = "stage9" }', "cut 'stage9'"),
    ],
)
def test_what_any_training_would_refuse_ends_the_command_before_the_first(sweep, tmp_path, capsys, methods, message):
    folder = tmp_path / "out"
    with open(sweep, "a") as file:
        file.write(f"{methods}\n")
    assert main(["experiments", "run", sweep, "--output", str(folder)]) == 2
    assert f"bad, num-clients 2, seed 0: {message}" in capsys.readouterr().err.splitlines()[-1]
    assert not folder.exists()


def test_one_sweep_at_a_time_in_a_folder(sweep, tmp_path, capsys):
    with alone_in(tmp_path / "out"):
        with (tmp_path / "out" / ".lock").open() as lock, pytest.raises(OSError, match="unavailable"):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with (
            pytest.raises(ConfigError, match=r"--output: another run writes to .*out: process \d+ on .*: wait for it"),
            alone_in(tmp_path / "out"),
        ):
            pass
    with alone_in(tmp_path / "out"):
        pass


def test_nothing_of_an_earlier_sweep_in_the_folder_is_reported(sweep, tmp_path):
    experiments = read_sweep(sweep).experiments()
    folder = tmp_path / "runs" / experiments[0].name
    folder.mkdir(parents=True)
    (folder / "result.json").write_text('{"accuracy_last": 0.5}')
    assert len(write_results(tmp_path, experiments)) == len(table(tmp_path)) == 1
    assert write_results(tmp_path, experiments[1:]) == []
    assert not (tmp_path / "results.csv").exists()
    (folder / "result.json").write_text('{"accuracy_last": 0.')  # torn
    assert write_results(tmp_path, experiments) == []


def test_a_folder_that_cannot_be_written_is_refused(sweep, capsys):
    assert main(["experiments", "run", sweep, "--output", f"{sweep}/out"]) == 2
    assert "cannot be written to" in capsys.readouterr().err


def test_loggers_are_told_all_that_a_training_depends_on(tmp_path):
    path = tmp_path / "sweep.toml"
    path.write_text(SWEEP.replace("[axes]", "local-epochs = 2\n[axes]"))
    (experiment, *_) = read_sweep(str(path), overrides={"algorithm": "fedavg", "method": ["UGS"]}).experiments()
    (tmp_path / "run").mkdir()
    run_trial(experiment, tmp_path / "run", lambda done: None)
    told = json.loads((tmp_path / "run" / "config.json").read_text())
    expected = {"algorithm": "fedavg", "num-clients": 2, "local-epochs": 2, "batch-size": 256}
    assert {key: told[key] for key in expected} == expected


def test_a_row_of_results_is_its_metrics_in_short(tmp_path, sweep):
    """Against numbers worked out by hand."""
    experiment = read_sweep(sweep).experiments()[0]
    folder = tmp_path / "runs" / experiment.name
    folder.mkdir(parents=True)
    a_step = {"kind": "step", "loss": 1.0, "accuracy": 0.5, "batch_size": 10, "clients": 2}
    a_step |= {"bytes_sent": None, "bytes_received": None, "seconds_real": 1.0, "seconds_simulated": 2.0}
    a_round = {"kind": "round", "loss": 0.5, "accuracy": 0.5, "num_examples": 20, "num_steps": 2, "num_clients": 2}
    a_round |= {"deviation_mean": 0.0, "deviation_p95": 0.0, "deviation_weighted": 0.0, "clients_per_step": 2.0}
    a_round |= {"bytes_sent": None, "bytes_received": None, "client_mix_mean": 0.0, "seconds_plan": 0.0}
    a_round |= {"seconds_real": 2.0, "seconds_simulated": 4.0}
    lines = []
    for epoch, accuracy in enumerate([0.1, 0.9, 0.4, 0.5], start=1):
        lines += [{**a_step, "round": epoch, "step": step, "deviation": epoch + step} for step in range(2)]
        lines += [{**a_round, "round": epoch, "evaluate_serverapp": {"accuracy": accuracy, "loss": epoch / 10}}]
    (folder / METRICS_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert len(read_metrics(folder / METRICS_FILE)) == 12
    result = summarise(folder, 99.0)
    assert result == pytest.approx(
        {
            "accuracy_last": 0.5,
            "accuracy_last3": 0.6,
            "accuracy_best": 0.9,
            "loss_last": 0.4,
            "train_loss_last": 0.5,
            "epochs": 4,
            "steps": 8,
            "examples": 80,
            "clients_per_step": 2.0,
            "deviation_mean": 3.0,
            "deviation_p95": 4.65,
            "seconds_simulated": 16.0,
            "seconds_real": 8.0,
            "seconds_total": 99.0,
        }
    )
    (row,) = write_results(tmp_path, [experiment, read_sweep(sweep).experiments()[1]])  # the other is not finished
    assert (row["method"], row["num-clients"], row["seed"], row["accuracy_best"]) == ("UGS", 2, 0, 0.9)
    assert [line["run"] for line in table(tmp_path)] == [experiment.name]
