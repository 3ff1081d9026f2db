"""Runs in Flower that end early, however that comes: the last checkpoint is good, and no process is left."""

import json
import signal

import pytest
from faulty import recording_app
from flower_runs import FlowerRun, prepared
from flwr.app import ArrayRecord
from support import CUT, largest_difference, sgd, tiny_resnet

from psl_flower import InProcessGrid, ParallelSplitLearning, UniformGlobalSampler
from psl_flower.app.deployment import LocalDeployment

pytestmark = pytest.mark.flower
K, ROUNDS = 6, 3


def finish(folder, num_clients=K, rounds=ROUNDS, **options):
    """Train, or go on training, in this process; return the whole model."""
    strategy = ParallelSplitLearning(
        tiny_resnet(),
        cut=CUT,
        sampler=UniformGlobalSampler(32, seed=3),
        optimizer=sgd,
        min_available_nodes=num_clients,
        evaluate_every=0,
        output_dir=folder,
        **options,
    )
    grid = InProcessGrid(recording_app(), num_clients)
    result = strategy.start(grid, ArrayRecord(tiny_resnet().state_dict()), rounds)
    return result.arrays.to_torch_state_dict()


def interrupted(link, folder, hold_at, num_supernodes=K, **config):
    """Start a run and return it in the middle of an exchange, with its clients at work."""
    for name in ("held", "go", "summary.json"):
        (folder / name).unlink(missing_ok=True)
    options = {"transport": "'streams'", "share": 0.0, "checkpoint-every": 4, "rounds": ROUNDS, **config}
    words = [f"results='{folder}' hold-at='{hold_at}' resume-from='latest'", *(f"{k}={v}" for k, v in options.items())]
    run = FlowerRun(link, "chaos", " ".join(words), num_supernodes)
    if hold_at:
        run.wait_for(folder / "held")
        (folder / "summary.json").unlink(missing_ok=True)  # of the round before
    return run


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text())


@pytest.mark.parametrize("killed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_interrupted_a_run_ends_as_one_that_nothing_happened_to(superlink, killed, tmp_path):
    results = tmp_path / "results"
    results.mkdir()
    if killed:  # once before
        run = interrupted(superlink, results, "1-5")
        run.signal_server(signal.SIGKILL)
        assert not (results / "summary.json").exists()  # there was no time for it

    run = interrupted(superlink, results, "2-3")
    run.signal_server(signal.SIGINT)
    run.wait_for(results / "summary.json")  # while its clients still work: nothing waits for them
    (results / "go").touch()
    run.wait_until_gone()
    assert run.status() == "finished:failed"
    assert (summary_of(results)["resumed"], summary_of(results)["refused"]) == (int(killed), {})

    resumed, whole = finish(results, resume_from="latest"), finish(tmp_path / "whole")
    assert summary_of(results)["steps_committed"] == summary_of(tmp_path / "whole")["steps_committed"]
    assert largest_difference(resumed, whole) < 1e-5


@pytest.mark.slow
def test_failed_a_run_ends_as_one_that_nothing_happened_to(superlink, tmp_path):
    results = tmp_path / "results"
    results.mkdir()
    run = interrupted(superlink, results, "", **{"fail-in-round": ROUNDS})
    run.wait_for(results / "summary.json")
    run.wait_until_gone()
    assert run.status() == "finished:failed"
    assert "OSError: no test data today" in run.output(), run.output()[-8000:]
    assert summary_of(results)["refused"] == {}
    resumed, whole = finish(results, resume_from="latest"), finish(tmp_path / "whole")
    assert largest_difference(resumed, whole) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["messages", "streams"])
def test_flwr_stop_ends_a_simulation(superlink, transport, tmp_path):
    assert_stopped(superlink, tmp_path, K, transport, K)


@pytest.mark.slow
def test_flwr_stop_and_signals_end_a_deployment(tmp_path):
    with prepared(LocalDeployment(tmp_path / "home", 2, tmp_path)) as link:
        assert_stopped(link, tmp_path, 2, "streams")


def assert_stopped(link, folder, num_clients, transport, num_supernodes=None):
    """Assert that a run can be stopped, and gone on with, and interrupted, and gone on with."""
    results = folder / "results"
    results.mkdir()
    config = {"transport": f"'{transport}'"}
    for how, where, status in (("stop", "1-5", "finished:stopped"), ("interrupt", "2-3", "finished:failed")):
        run = interrupted(link, results, where, num_supernodes, **config)
        run.stop() if how == "stop" else run.signal_server(signal.SIGINT)
        if num_supernodes or how == "interrupt":  # else Flower gives it no time for that
            run.wait_for(results / "summary.json")
        (results / "go").touch()
        run.wait_until_gone()
        assert run.status() == status
    resumed, whole = (
        finish(folder, num_clients, **options)
        for folder, options in ((results, {"resume_from": "latest"}), (folder / "whole", {}))
    )
    assert summary_of(results)["refused"] == {}
    assert largest_difference(resumed, whole) < 1e-5
