"""A sweep through each engine, killed in the middle, and finished by the same command."""

import csv
import importlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path

import pytest
from flwr.app import Context, RecordDict

from psl_flower.cli import main
from psl_flower.experiments import trial
from psl_flower.experiments.results import summarise
from psl_flower.experiments.sweep import read_sweep
from psl_flower.grid import InProcessGrid

PATIENCE = 120.0  # seconds until a test is given up
SWEEP = """
title = "Digits"
engine = "{engine}"
[config]
model = "tiny-cnn"
num-server-rounds = 1
batch-size = 128
partition = "mild"
evaluate-every = 0
[axes]
num-clients = [4]
seed = [0]
[methods]
UGS = {{ sampler = "ugs" }}
FLS = {{ sampler = "fls" }}
"""


@pytest.fixture
def temporary():
    """A folder with a short path: Ray's sockets lie in it, and a socket's path has 107 characters at most."""
    with tempfile.TemporaryDirectory(prefix="psl-") as folder:
        yield Path(folder)


def arguments(folder, engine):
    """Write a sweep and return the words that run it."""
    path = folder / f"{engine}.toml"
    path.write_text(SWEEP.format(engine=engine))
    return ["experiments", "run", str(path), "--output", str(folder / engine), "--workers", "1"]


def start(words, folder):
    """Start the command as a process of its own, with its temporary files in `folder`."""
    return subprocess.Popen(
        [sys.executable, "-m", "psl_flower", *words],
        env={**os.environ, "TMPDIR": str(folder)},
        stderr=subprocess.PIPE,
        text=True,
    )


def results(folder):
    with (folder / "results.csv").open(newline="") as file:
        return {(row["method"], row["seed"]): row for row in csv.DictReader(file)}


def processes(folder):
    """Return the processes that were started with `folder` for their temporary files."""
    found = {}
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            try:
                if f"TMPDIR={folder}\0".encode() in (path / "environ").read_bytes():
                    found[int(path.name)] = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:  # it has ended
                continue
    return found


def wait_for(condition):
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def test_a_killed_sweep_goes_on_where_it_was_and_both_engines_agree(tmp_path, temporary):
    words = arguments(tmp_path, "in-process")
    with start(words, temporary) as process:
        for line in process.stderr:
            if line.startswith("1/2"):
                break
        process.send_signal(signal.SIGKILL)
    wait_for(lambda: not processes(temporary))  # the training that was under way has noticed
    runs = tmp_path / "in-process" / "runs"
    finished = [path for path in runs.iterdir() if not path.name.startswith(".")]
    assert len(finished) == 1
    before = (finished[0] / "result.json").stat().st_mtime_ns
    assert main(words) == 0
    assert (finished[0] / "result.json").stat().st_mtime_ns == before
    split = results(tmp_path / "in-process")
    assert set(split) == {("UGS", "0"), ("FLS", "0")}
    assert not list(runs.glob(".*"))

    assert main(arguments(tmp_path, "vectorised")) == 0
    vectorised = results(tmp_path / "vectorised")
    for key, row in split.items():
        assert row["run"] != vectorised[key]["run"]  # another engine is another training
        for metric in ("accuracy_last", "loss_last", "steps", "deviation_mean"):
            assert float(row[metric]) == pytest.approx(float(vectorised[key][metric]), rel=1e-3), metric
    confusion = (tmp_path / "in-process" / "runs" / split["UGS", "0"]["run"] / "confusion.csv").read_text()
    same = (tmp_path / "vectorised" / "runs" / vectorised["UGS", "0"]["run"] / "confusion.csv").read_text()
    assert confusion == same


class InThisProcess:
    """Stands in for a SuperLink: runs the app of an experiment on an InProcessGrid."""

    def __init__(self, home):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def run(self, app, *, num_supernodes, quiet):
        described = tomllib.loads((app / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
        server, client = (
            getattr(importlib.import_module(module), name)
            for module, name in (described["components"][part].split(":") for part in ("serverapp", "clientapp"))
        )
        config = described["config"]
        grid = InProcessGrid(client, num_nodes=num_supernodes, run_config=config)
        server(grid, Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=config))


def test_the_app_of_an_experiment_on_the_simulation_is_the_experiment(tmp_path, monkeypatch):
    monkeypatch.setattr(trial, "LocalSuperLink", InThisProcess)
    found = {}
    for engine in ("simulation", "vectorised"):
        path = tmp_path / f"{engine}.toml"
        path.write_text(SWEEP.format(engine=engine))
        experiment = next(e for e in read_sweep(str(path)).experiments() if e.label.startswith("UGS"))
        (tmp_path / engine).mkdir()
        trial.run_trial(experiment, tmp_path / engine, lambda done: None)
        found[engine] = summarise(tmp_path / engine, 0.0)
    simulated, vectorised = found["simulation"], found["vectorised"]
    assert simulated["loss_last"] == pytest.approx(vectorised["loss_last"], rel=1e-3)
    assert simulated["steps"] == vectorised["steps"]


@pytest.mark.flower
@pytest.mark.slow
def test_a_killed_simulation_leaves_no_process_and_agrees_too(tmp_path, temporary):
    words = [*arguments(tmp_path, "simulation"), "--set", "method=['UGS']"]
    with start(words, temporary) as process:
        wait_for(lambda: any("flower-superlink" in command for command in processes(temporary).values()))
        process.send_signal(signal.SIGKILL)
    wait_for(lambda: not processes(temporary))
    assert not (tmp_path / "simulation" / "results.csv").exists()

    with start(words, temporary) as process:
        said = process.stderr.read()
    assert process.returncode == 0, said
    assert not processes(temporary)
    assert main([*arguments(tmp_path, "vectorised"), "--set", "method=['UGS']"]) == 0
    simulated, vectorised = (results(tmp_path / engine)["UGS", "0"] for engine in ("simulation", "vectorised"))
    assert float(simulated["loss_last"]) == pytest.approx(float(vectorised["loss_last"]), rel=1e-3)
    assert simulated["steps"] == vectorised["steps"]
