"""The same comparison with centralised training, over Flower messages in the Ray simulation."""

import os
from pathlib import Path

import pytest
from safetensors.torch import load_file
from support import exactness_cases, largest_difference

from psl_flower.app.local import LocalSuperLink

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def superlink(tmp_path_factory):
    folder = tmp_path_factory.mktemp("superlink")
    link = LocalSuperLink(folder / "home", folder)
    # the app and its actors import `support`
    link.environment["PYTHONPATH"] = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    with link:
        yield link


@pytest.mark.flower
@pytest.mark.parametrize("num_clients", [1, 2, 16])
def test_equals_centralised_training(superlink, num_clients, tmp_path):
    superlink.run(
        TESTS / "apps" / "exactness", num_supernodes=num_clients, run_config=[f"results='{tmp_path}'"], quiet=True
    )
    cases = exactness_cases(num_clients)
    assert len(cases) == 9
    for name, case in cases.items():
        weights = load_file(tmp_path / f"{num_clients}-{name}.safetensors")
        reference = case.reference(num_clients)
        assert largest_difference({key: weights[key] for key in reference}, reference) < case.tolerance, name
