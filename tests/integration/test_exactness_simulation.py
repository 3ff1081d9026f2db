"""The same comparison with centralised training, over messages and over streams in the Ray simulation."""

import pytest
from flower_runs import TESTS
from safetensors.torch import load_file
from support import exactness_cases, largest_difference

pytestmark = pytest.mark.flower
SOME = "messages/UniformGlobalSampler-adam messages/AlignedSampler-sgd"  # whole batches, and quotas for each class
# each sampler, and one with all optimizers and dtypes: samplers know neither, and messages carry no more than streams
STREAMS = "streams/-sgd-64 streams/UniformGlobalSampler-adam streams/UniformGlobalSampler-sgd-32"


def run(superlink, num_clients, folder, trainings, traps=""):
    """Train as the app in tests/apps does; return what it says."""
    config = f"results='{folder}' trainings='{trainings}' traps='{traps}'"
    return superlink.run(TESTS / "apps" / "exactness", num_supernodes=num_clients, run_config=[config], quiet=True)


def assert_exact(num_clients, folder, transport, num_cases):
    """Assert that there are so many trainings over a transport, each equal to the centralised one."""
    cases = exactness_cases(num_clients, transport)
    files = list((folder / transport).glob("*-*.safetensors"))
    assert len(files) == num_cases
    for file in files:
        case, weights = cases[file.stem], load_file(file)
        reference = case.reference()
        assert largest_difference({key: weights[key] for key in reference}, reference) < case.tolerance, file.stem


@pytest.mark.slow
def test_one_client_equals_centralised_training(superlink, tmp_path):
    output = run(superlink, 1, tmp_path, f"{SOME} streams/")
    assert_exact(1, tmp_path, "messages", 2)
    assert_exact(1, tmp_path, "streams", 15)
    assert output.count("1 client is connected by") == 15


@pytest.mark.slow  # a minute for what one and 16 clients show, too
def test_two_clients_equal_centralised_training(superlink, tmp_path):
    output = run(superlink, 2, tmp_path, "streams/")
    assert_exact(2, tmp_path, "streams", 15)
    assert output.count("2 clients are connected by") == 15


def test_sixteen_clients_equal_centralised_training_also_if_an_actor_dies_in_the_middle_of_a_step(superlink, tmp_path):
    output = run(superlink, 16, tmp_path, f"{SOME} {STREAMS}", traps="die")
    assert_exact(16, tmp_path, "messages", 2)
    assert_exact(16, tmp_path, "streams", 8)
    assert output.count("16 clients are connected by") == 8 + 1
    assert not (tmp_path / "die" / "trap").exists()
    assert "the others take them over" in output
    assert_exact(16, tmp_path, "die", 1)


@pytest.mark.slow
def test_sixteen_clients_equal_centralised_training_with_every_optimizer_and_dtype(superlink, tmp_path):
    run(superlink, 16, tmp_path, "streams/")
    assert_exact(16, tmp_path, "streams", 15)


@pytest.mark.slow
@pytest.mark.parametrize("num_clients", [1, 2, 16])
def test_messages_equal_centralised_training_with_every_sampler(superlink, num_clients, tmp_path):
    output = run(superlink, num_clients, tmp_path, "messages/")
    assert_exact(num_clients, tmp_path, "messages", 8)
    assert "connected by" not in output
