import pytest

from psl_flower.config import RunConfig
from psl_flower.errors import ConfigError
from psl_flower.experiments import ALGORITHMS, Setting


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_defaults(algorithm):
    setting = Setting(config=RunConfig(batch_size=128), num_clients=4, algorithm=algorithm)
    assert setting.batch_size_of_clients == (128 if algorithm == "sl" else 32)
    assert hash(setting) == hash(Setting(config=RunConfig(batch_size=128), num_clients=4, algorithm=algorithm))


def test_small_global_batches_bound_local_ones():
    setting = Setting(config=RunConfig(batch_size=8), num_clients=4, algorithm="fedavg")
    assert setting.batch_size_of_clients == 8


def test_a_local_batch_size_that_is_given_is_kept():
    setting = Setting(config=RunConfig(batch_size=8), num_clients=4, algorithm="fedavg", local_batch_size=50)
    assert setting.batch_size_of_clients == 50


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"config": {}}, "config must be a RunConfig"),
        ({"algorithm": "splitfed"}, r"algorithm must be one of .* \(did you mean 'splitfed-v"),
        ({"double": 1}, "double must be true or false"),
        (
            {"double": True, "config": RunConfig(precision="bf16")},
            "double computes in float64, precision 'bf16' does not",
        ),
        ({"num_clients": 0}, "num_clients must be at least 1"),
        ({"local_epochs": 0}, "local_epochs must be at least 1"),
        ({"local_batch_size": -1}, "local_batch_size must be at least 0"),
        ({"examples": 2.5}, "examples must be a whole number"),
        ({"examples": 63}, "examples must be at least 64"),
        ({"examples": 99, "num_clients": 100}, "examples must be at least 100"),
        ({"channels_last": 1}, "channels_last must be true or false"),
        ({"config": RunConfig(delays="measured")}, "delays 'measured' needs clients"),
        ({"config": RunConfig(delays="lognormal", sleep=True)}, "sleep True needs clients"),
        ({"config": RunConfig(max_gradient_norm=1.0)}, r"max-gradient-norm 1.0 .*leave it 0.0"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ConfigError, match=message):
        Setting(**{"config": RunConfig(), "num_clients": 4, **options})
