"""The same comparison with centralised training, over messages and over streams in the Ray simulation."""

from pathlib import Path

import pytest
from flower_runs import prepared
from safetensors.torch import load_file
from support import exactness_cases, largest_difference

from psl_flower.app.local import LocalSuperLink

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def superlink(tmp_path_factory):
    folder = tmp_path_factory.mktemp("superlink")
    with prepared(LocalSuperLink(folder / "home", folder)) as link:
        yield link


@pytest.mark.flower
@pytest.mark.parametrize(
    ("transport", "num_clients"),
    [
        ("messages", 1),
        pytest.param("messages", 2, marks=pytest.mark.slow),  # a minute for what one and 16 clients show, too
        ("messages", 16),
        ("streams", 1),
        ("streams", 2),
        ("streams", 16),
    ],
)
def test_equals_centralised_training(superlink, transport, num_clients, tmp_path):
    output = superlink.run(
        TESTS / "apps" / "exactness",
        num_supernodes=num_clients,
        run_config=[f"results='{tmp_path}' transport='{transport}'"],
        quiet=True,
    )
    assert (f"{num_clients} clients are connected by" in output) == (transport == "streams")
    cases = exactness_cases(num_clients, transport)
    assert len(cases) == {"messages": 8, "streams": 15}[transport]
    for name, case in cases.items():
        weights = load_file(tmp_path / f"{num_clients}-{name}.safetensors")
        reference = case.reference(num_clients)
        assert largest_difference({key: weights[key] for key in reference}, reference) < case.tolerance, name


@pytest.mark.flower
def test_an_actor_that_dies_in_the_middle_of_a_step_changes_nothing(superlink, tmp_path):
    trap = tmp_path / "trap"
    output = superlink.run(
        TESTS / "apps" / "exactness",
        num_supernodes=16,
        run_config=[f"results='{tmp_path}' transport='streams' trap='{trap}'"],
        quiet=True,
    )
    assert not trap.exists()
    assert "the others take them over" in output
    name = "UniformGlobalSampler-sgd-64"
    reference = exactness_cases(16)[name].reference(16)
    weights = load_file(tmp_path / f"16-{name}.safetensors")
    assert largest_difference({key: weights[key] for key in reference}, reference) < 1e-9
