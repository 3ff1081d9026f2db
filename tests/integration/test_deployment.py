"""A real deployment on loopback, over TLS: streams, a ClientApp that dies or freezes, and nothing left behind."""

import importlib
import json
from pathlib import Path

import pytest
from flower_runs import TESTS, prepared, wait_until
from safetensors.torch import load_file
from support import exactness_cases, largest_difference

from psl_flower.app.deployment import LocalDeployment

pytestmark = pytest.mark.flower


def deployed(folder, **config):
    """Train in a deployment, which leaves no process; return what the run said, and its folder."""
    words = " ".join(f"{key}='{value}'" for key, value in {"results": folder / "results", **config}.items())
    with prepared(LocalDeployment(folder / "home", 2, folder, tls=True)) as deployment:
        output = deployment.run(TESTS / "apps" / "exactness", run_config=[words], quiet=True)
        groups = {each.pid for each in deployment.supernodes}
    wait_until(lambda: not living(groups), 120, lambda: f"the end of {living(groups)}")
    return output, folder / "results"


@pytest.fixture(scope="module")
def disturbed(tmp_path_factory):
    """Train with a ClientApp that dies, then with one that freezes."""
    return deployed(tmp_path_factory.mktemp("deployment"), trainings="", traps="die freeze")


def living(groups):
    """Return the processes of these groups that still run; a zombie, which nobody may ever reap, does not."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, rest = stat.read_text().rsplit(")", 1)
        except OSError:  # it ended meanwhile
            continue
        state, _, group = rest.split()[:3]
        if state != "Z" and int(group) in groups:
            found.append(name)
    return found


def assert_exact(files):
    cases = exactness_cases(2)
    for file in files:
        case, weights = cases[file.stem], load_file(file)
        reference = case.reference()
        assert largest_difference({key: weights[key] for key in reference}, reference) < case.tolerance, file.stem


def test_equals_centralised_training(tmp_path):
    some = "UniformGlobalSampler-adam-64"  # all others are in the simulation, over the same streams
    output, folder = deployed(tmp_path, trainings=f"auto/{some}", traps="")
    files = list((folder / "auto").iterdir())
    assert len(files) == 1
    assert output.count("2 clients are connected by 2 streams") >= len(files)  # found by transport = "auto"
    assert_exact(files)


# Processes that die and freeze are in test_stream_failures.py, too, without Flower: a deployment is slow.
@pytest.mark.slow
def test_a_clientapp_that_dies_in_the_middle_of_a_step_is_started_again(disturbed):
    output, folder = disturbed
    assert not (folder / "die" / "trap").exists()
    assert "The process of 1 clients is gone" in output
    assert_exact([folder / "die" / "UniformGlobalSampler-sgd-64.safetensors"])


@pytest.mark.slow
def test_a_frozen_clientapp_holds_nobody_up(disturbed):
    output, folder = disturbed
    # it goes on after two steps only, which the other takes by itself: were that one held up, this would never end
    assert (folder / "freeze" / "trap.went-on").exists()
    assert "no reply within 10 s" in output
    assert json.loads((folder / "freeze" / "summary.json").read_text())["examples_unseen"] == {}


@pytest.mark.slow
def test_over_messages_a_node_is_sent_frozen_weights_once(tmp_path, monkeypatch):
    """Each message is answered by a new process, which finds what its node has kept: the base model."""
    monkeypatch.syspath_prepend(TESTS / "apps" / "lora")
    task = importlib.import_module("lora.task")
    config = f"out='{tmp_path / 'found.json'}' transport='messages' steps=3 width=64 layers=2"
    with prepared(LocalDeployment(tmp_path / "home", 2, tmp_path)) as deployment:
        deployment.run(TESTS / "apps" / "lora", run_config=[config], quiet=True)
    found = json.loads((tmp_path / "found.json").read_text())
    theirs = task.bytes_of_step(task.make_model(64, 2), 64, processes=2)
    assert found["steps"] == 2
    assert found["bytes"]["received"] == theirs["received"] + theirs["masks and labels"]
    # a message for each way, and the head's adapters with both
    assert found["bytes"]["sent"] == task.bytes_of_step(task.make_model(64, 2), 64, processes=4)["sent"]
