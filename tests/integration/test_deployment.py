"""A real deployment on loopback, over TLS: streams, a ClientApp that dies or freezes, and nothing left behind."""

import json
import os
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from support import exactness_cases, largest_difference

from psl_flower.app.deployment import LocalDeployment

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def deployment(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deployment")
    deployment = LocalDeployment(folder / "home", 2, folder, tls=True)
    deployment.environment["PYTHONPATH"] = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    deployment.environment["OMP_NUM_THREADS"] = "1"
    with deployment:
        yield deployment
        groups = {each.pid for each in deployment.supernodes}
    end = time.monotonic() + 30
    while left := living(groups):
        assert time.monotonic() < end, f"left behind: {left}"
        time.sleep(0.05)


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


def differences(folder, names):
    cases = exactness_cases(2)
    for name in names:
        weights, reference = load_file(folder / f"2-{name}.safetensors"), cases[name].reference(2)
        yield name, largest_difference({key: weights[key] for key in reference}, reference), cases[name].tolerance


@pytest.mark.flower
def test_equals_centralised_training(deployment, tmp_path):
    some = "UniformGlobalSampler"  # with SGD and Adam, in double and in single precision
    output = deployment.run(
        TESTS / "apps" / "exactness", run_config=[f"results='{tmp_path}' cases='{some}'"], quiet=True
    )
    names = [name for name in exactness_cases(2) if some in name]
    assert output.count("2 clients are connected by 2 streams") == len(names) == 3  # found by transport = "auto"
    for name, difference, tolerance in differences(tmp_path, names):
        assert difference < tolerance, name


@pytest.mark.flower
def test_a_clientapp_that_dies_in_the_middle_of_a_step_is_started_again(deployment, tmp_path):
    trap = tmp_path / "trap"
    output = deployment.run(
        TESTS / "apps" / "exactness", run_config=[f"results='{tmp_path}' trap='{trap}'"], quiet=True
    )
    assert not trap.exists()
    assert "The process of 1 clients is gone" in output
    for name, difference, tolerance in differences(tmp_path, ["UniformGlobalSampler-sgd-64"]):
        assert difference < tolerance, name


@pytest.mark.flower
def test_a_frozen_clientapp_holds_nobody_up(deployment, tmp_path):
    trap = tmp_path / "trap"
    output = deployment.run(
        TESTS / "apps" / "exactness", run_config=[f"results='{tmp_path}' trap='{trap}' freeze=true"], quiet=True
    )
    # it goes on after five steps only, which the other takes by itself: were that one held up, this would never end
    assert trap.with_suffix(".went-on").exists()
    assert "no reply within 2 s" in output
    assert json.loads((tmp_path / "summary.json").read_text())["examples_unseen"] == {}
