import tomllib
from pathlib import Path

import pytest

from psl_flower.app.datasets import SPECS
from psl_flower.app.models import default_cut
from psl_flower.config import DATASETS, MODELS, RunConfig
from psl_flower.errors import ConfigError


def test_pyproject_lists_every_key_with_its_default():
    pyproject = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert pyproject["tool"]["flwr"]["app"]["config"] == RunConfig().as_run_config()


def test_an_empty_run_config_gives_the_defaults():
    assert RunConfig.read({}) == RunConfig()


def test_values_are_read_by_their_dashed_keys():
    config = RunConfig.read({"num-server-rounds": 3, "batch-size": 32, "learning-rate": 1, "dataset": "cifar10"})
    assert (config.num_server_rounds, config.batch_size, config.dataset) == (3, 32, "cifar10")
    assert config.learning_rate == 1.0
    assert isinstance(config.learning_rate, float)


def test_as_run_config_is_what_read_takes():
    config = RunConfig(partition="severe", dirichlet_alpha=0.5, cut="layer3", model="resnet18")
    assert RunConfig.read(config.as_run_config()) == config


def test_every_dataset_and_model_that_may_be_named_exists():
    assert set(DATASETS) == set(SPECS)
    assert all(default_cut(model) for model in MODELS)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("sampler", "usg", r"sampler must be one of .*'ugs'.*got 'usg' \(did you mean 'ugs'\?\)"),
        ("dataset", "mnist", r"dataset must be one of 'digits'.*got 'mnist'"),
        ("model", "resnet-18", r"did you mean 'resnet18'"),
        ("partition", "IID", r"partition must be one of 'iid', 'mild', 'severe', got 'IID'"),
        ("optimizer", "adamw", r"did you mean 'adam'"),
        ("augment", "flip", r"augment must be one of 'none', 'crop-flip'"),
        ("batch-size", 0, "batch-size must be at least 1, got 0"),
        ("batch-size", 64.0, "batch-size must be a whole number, got 64.0"),
        ("batch-size", "64", "batch-size must be a whole number, got '64'"),
        ("num-server-rounds", 0, "num-server-rounds must be at least 1"),
        ("evaluate-every", -1, "evaluate-every must be at least 0"),
        ("threads", 0, "threads must be at least 1"),
        ("seed", -1, "seed must be at least 0"),
        ("learning-rate", 0.0, "learning-rate must be greater than 0"),
        ("learning-rate", float("nan"), "learning-rate must be finite"),
        ("momentum", 1.0, "momentum must be below 1, got 1.0"),
        ("cut", 3, "cut must be a string, got 3"),
        ("output-dir", "", "output-dir must name a folder"),
        ("data-path", "some/where", "data-path must be absolute, got 'some/where'"),
        ("classes-per-client", 2, "choose another partition"),
        ("dirichlet-alpha", 0.1, "choose another partition"),
    ],
)
def test_a_bad_value_is_refused_with_its_key_and_the_rule(key, value, message):
    with pytest.raises(ConfigError, match=message):
        RunConfig.read({key: value})


def test_an_unknown_key_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"'batch_size' \(did you mean 'batch-size'\?\)"):
        RunConfig.read({"batch_size": 64})


def test_data_path_may_start_at_home():
    assert RunConfig.read({"data-path": "~/data"}).data_path == "~/data"


@pytest.mark.parametrize(
    ("values", "skew"),
    [
        ({"partition": "iid"}, None),
        ({"partition": "mild"}, (5, 3.0)),
        ({"partition": "severe"}, (2, 3.0)),
        ({"partition": "severe", "classes-per-client": 3}, (3, 3.0)),
        ({"partition": "mild", "dirichlet-alpha": 0.5}, (5, 0.5)),
    ],
)
def test_label_skew_comes_from_the_partitions_name_unless_its_numbers_are_given(values, skew):
    assert RunConfig.read(values).label_skew() == skew
