import inspect
import pickle
import tomllib
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest

from psl_flower.app.datasets import SPECS
from psl_flower.app.models import default_cut
from psl_flower.config import DATASETS, MODELS, RunConfig
from psl_flower.config.key import keys_of
from psl_flower.config.written import settings_page, toml_block, with_block
from psl_flower.errors import ConfigError
from psl_flower.faults import FaultPolicy
from psl_flower.samplers.registry import SAMPLERS
from psl_flower.stragglers import DELAY_MODELS, CsvDelays, DelayEstimator, LognormalDelays, SlowFractionDelays

ROOT = Path(__file__).parents[2]


def test_pyproject_lists_every_key_with_its_default():
    text = (ROOT / "pyproject.toml").read_text()
    assert tomllib.loads(text)["tool"]["flwr"]["app"]["config"] == RunConfig().as_run_config()
    assert with_block(text) == text, "write it anew: python -m psl_flower.config"


def test_the_page_of_settings_is_what_the_definitions_say():
    text = (ROOT / "docs" / "settings.md").read_text()
    assert text == settings_page(), "write it anew: python -m psl_flower.config"
    for key in RunConfig().as_run_config():
        assert f"| `{key}` |" in text


def test_the_block_replaces_what_is_there_and_nothing_else():
    before, after = '[project]\nname = "x"\n[tool.flwr.app.config]\n', "[tool.other]\na = 1\n"
    assert with_block(f"{before}old = 1\nolder = 2\n{after}") == before + toml_block() + after


def test_every_key_says_what_it_means_and_units_and_ranges_are_told():
    keys = {key.name: key for key in keys_of(RunConfig)}
    assert list(keys) == list(RunConfig().as_run_config())
    assert all(len(key.sentence) > 5 and not key.sentence.endswith(".") for key in keys.values())
    assert (keys["step-timeout"].rule, keys["momentum"].rule) == (
        "seconds, at least 0",
        "a number, at least 0, below 1",
    )
    assert (keys["join"].rule, keys["sleep"].rule) == ("epoch, step", "true or false")


def test_several_wrong_values_are_told_at_once_in_one_line():
    with pytest.raises(ConfigError) as caught:
        RunConfig.read({"batch-size": 0, "sampler-delta": True, "join": "never"})
    assert str(caught.value).split("; ") == [
        "batch-size must be at least 1, got 0",
        "sampler-delta must be a number or a string, got True",
        "join must be one of 'epoch', 'step', got 'never'",
    ]


def test_a_configuration_is_compared_copied_and_sent_by_value():
    config = RunConfig(seed=3)
    assert pickle.loads(pickle.dumps(config)) == config == replace(RunConfig(), seed=3)
    assert hash(config) == hash(RunConfig(seed=3)) != hash(RunConfig())
    with pytest.raises(ConfigError, match="seed must be at least 0"):
        replace(config, seed=-1)
    with pytest.raises(ConfigError, match=r"'sed' \(did you mean 'seed'\?\)"):
        RunConfig(sed=1)
    with pytest.raises(FrozenInstanceError):
        config.seed = 4


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
        ("threads", -1, "threads must be at least 0"),
        ("seed", -1, "seed must be at least 0"),
        ("learning-rate", 0.0, "learning-rate must be greater than 0"),
        ("learning-rate", float("nan"), "learning-rate must be finite"),
        ("momentum", 1.0, "momentum must be below 1, got 1.0"),
        ("cut", 3, "cut must be a string, got 3"),
        ("output-dir", "", "output-dir must be given, got ''"),
        ("data-path", "some/where", "data-path must be absolute, got 'some/where'"),
        ("classes-per-client", 2, "choose another partition"),
        ("dirichlet-alpha", 0.1, "choose another partition"),
        ("tolerate-faults", 1, "tolerate-faults must be true or false, got 1"),
        ("step-timeout", -1.0, "step-timeout must be at least 0, got -1.0"),
        ("min-batch-fraction", 2.0, "min-batch-fraction must be at most 1, got 2.0"),
        ("patience", -1.0, "patience must be at least 0"),
        ("join", "round", "join must be one of 'epoch', 'step', got 'round'"),
        ("non-finite-loss", "ignore", "non-finite-loss must be one of 'stop', 'skip'"),
        ("max-gradient-norm", -1.0, "max-gradient-norm must be at least 0"),
        ("checkpoint-every", -1, "checkpoint-every must be at least 0"),
        ("keep-checkpoints", 0.5, "keep-checkpoints must be a whole number"),
        ("resume-from", 3, "resume-from must be a string, got 3"),
    ],
)
def test_a_bad_value_is_refused_with_its_key_and_the_rule(key, value, message):
    with pytest.raises(ConfigError, match=message):
        RunConfig.read({key: value})


def test_an_unknown_key_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"'batch_size' \(did you mean 'batch-size'\?\)"):
        RunConfig.read({"batch_size": 64})


def test_the_policy_for_faults_is_that_of_the_library_unless_its_numbers_are_given():
    assert RunConfig().fault_policy() == FaultPolicy()
    given = {"tolerate-faults": False, "step-timeout": 5.0, "max-gradient-norm": 1.0, "join": "step"}
    expected = FaultPolicy(tolerate=False, step_timeout=5.0, max_gradient_norm=1.0, join="step")
    assert RunConfig.read(given).fault_policy() == expected


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


# --- samplers and delays ---------------------------------------------------------------------------------------------
def options_of(kind):
    return set(inspect.signature(kind).parameters) - {"batch_size", "seed"}


def test_every_option_that_changes_a_schedule_or_a_delay_has_a_key_and_every_such_key_an_option():
    keys = set(RunConfig().as_run_config())
    numerics = {"tolerance", "max_durations"}  # cost time, change next to nothing
    of_samplers = set().union(*map(options_of, SAMPLERS.values())) - numerics
    assert {k for k in keys if k.startswith("sampler-")} == {f"sampler-{o.replace('_', '-')}" for o in of_samplers}
    of_delays = set().union(*(options_of(model) for name, model in DELAY_MODELS.items() if name != "measured"))
    assert {k for k in keys if k.startswith("delays-")} == {f"delays-{o.replace('_', '-')}" for o in of_delays}


def test_options_reach_the_sampler():
    config = {"sampler": "lds", "batch-size": 32, "seed": 7, "delays": "lognormal"}
    lds = RunConfig.read(
        {**config, "sampler-delta": 0, "sampler-c": 0.5, "sampler-sample-size": 10, "sampler-order": "natural"}
    ).make_sampler()
    assert type(lds) is SAMPLERS["lds"]
    assert (lds.batch_size, lds.seed, lds.delta, lds.c, lds.sample_size, lds.order) == (32, 7, 0, 0.5, 10, "natural")
    assert RunConfig.read(config).make_sampler().delta == SAMPLERS["lds"](32).delta
    lb = RunConfig.read(
        {"sampler": "lb", "delays": "lognormal", "sampler-method": "flow", "sampler-targets": "stratified"}
    ).make_sampler()
    assert (lb.method, lb.targets) == ("flow", "stratified")
    aligned = RunConfig.read({"sampler": "aligned", "delays": "lognormal", "sampler-tilt": 0.1}).make_sampler()
    assert (aligned.tilt, aligned.targets) == (0.1, "random")


@pytest.mark.parametrize(
    ("values", "model"),
    [
        (
            {"delays": "slow-fraction", "delays-fraction": 0.2, "delays-latency": 0, "delays-latency-factor": 2}
            | {"delays-per-sample": 0.5, "delays-per-sample-factor": 3, "seed": 4},
            SlowFractionDelays(fraction=0.2, latency=0, latency_factor=2, per_sample=0.5, per_sample_factor=3, seed=4),
        ),
        (
            {"delays": "lognormal", "delays-latency": 2, "delays-latency-sigma": 0.5, "delays-per-sample": 0.25}
            | {"delays-per-sample-sigma": 0},
            LognormalDelays(latency=2, latency_sigma=0.5, per_sample=0.25, per_sample_sigma=0, seed=0),
        ),
        ({"delays": "lognormal"}, LognormalDelays()),
    ],
)
@pytest.mark.parametrize("measured", [False, True])
def test_numbers_reach_the_delay_model_planned_with_or_only_simulated(values, model, measured):
    if measured:
        values = {**values, "delays": "measured", "simulated-delays": values["delays"], "sleep": True}
    planned, simulated = RunConfig.read(values).make_delays()
    assert simulated == model
    assert isinstance(planned, DelayEstimator) if measured else planned is simulated


def test_without_delays_there_is_no_virtual_clock():
    assert RunConfig().make_delays() == (None, None)
    planned, simulated = RunConfig(delays="measured").make_delays()
    assert isinstance(planned, DelayEstimator)
    assert simulated is None


def test_only_the_server_needs_the_file_with_the_delays(tmp_path):
    path = tmp_path / "delays.csv"
    config = RunConfig(delays="csv", delays_path=str(path))
    with pytest.raises(ConfigError, match="cannot be read"):
        config.make_delays()
    path.write_text("client_id,latency,per_sample\n0,1,0\n1,5,0.5\n")
    planned, simulated = config.make_delays()
    assert isinstance(planned, CsvDelays)
    assert planned is simulated
    assert planned.delays([1, 0]).latency.tolist() == [5, 1]


def test_the_delays_file_may_start_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "delays.csv").write_text("client_id,latency,per_sample\n0,3,0\n")
    planned, _ = RunConfig(delays="csv", delays_path="~/delays.csv").make_delays()
    assert planned.delays([0]).latency.tolist() == [3]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sampler-delta": 0.5}, r"sampler-delta is for sampler 'lds', got 0\.5 with sampler 'ugs': leave it empty"),
        ({"sampler-delta": 0}, "sampler-delta is for sampler 'lds', got 0 with sampler 'ugs'"),
        (
            {"sampler": "lds", "delays": "lognormal", "sampler-targets": "random"},
            "sampler-targets is for sampler 'lb' and 'aligned', got 'random' with sampler 'lds'",
        ),
        (
            {"sampler": "lds", "delays": "lognormal", "sampler-delta": -1},
            r"sampler-\*: delta must be at least 0, got -1",
        ),
        ({"sampler": "lds", "delays": "lognormal", "sampler-delta": "1"}, r"delta must be a number, got '1'"),
        ({"sampler": "lb", "delays": "lognormal", "sampler-method": "flows"}, r"did you mean 'flow'"),
        ({"sampler": "lb", "delays": "lognormal", "sampler-method": 1}, "sampler-method must be a string, got 1"),
        (
            {"sampler": "lds"},
            "sampler 'lds' plans with delays, got delays 'none': set delays to one of 'slow-fraction'",
        ),
        ({"sampler": "aligned"}, "sampler 'aligned' plans with delays"),
        ({"delays": "slow"}, r"delays must be one of .*'slow-fraction'.*got 'slow'"),
        ({"delays-latency": 2.0}, "delays-latency is for delays 'slow-fraction' and 'lognormal', got 2.0 with delays"),
        ({"delays": "lognormal", "delays-fraction": 0.5}, "delays-fraction is for delays 'slow-fraction', got 0.5"),
        ({"delays": "slow-fraction", "delays-fraction": 2}, r"keys delays-\*: fraction must be at most 1, got 2"),
        ({"delays": "slow-fraction", "delays-path": "/a.csv"}, "delays-path is for delays 'csv', got '/a.csv'"),
        ({"stream-bind": "9095"}, r"the keys stream-\*: bind must be host:port"),
        ({"loggers": "wandb,tb"}, "^loggers must be one of 'tensorboard', 'wandb', got 'tb'"),
        ({"delays": "csv"}, r"delays-\*: delays 'csv' needs the option 'path'"),
        ({"delays": "csv", "delays-path": "a.csv"}, "delays-path must be absolute, got 'a.csv'"),
        ({"delays": "measured", "delays-latency": 1.0}, "got 1.0 with simulated-delays 'none'"),
        (
            {"delays": "lognormal", "simulated-delays": "lognormal"},
            "simulated-delays goes with delays 'measured', got 'lognormal' with delays 'lognormal'",
        ),
        ({"delays": "measured", "simulated-delays": "measured"}, "simulated-delays must be one of 'none', 'slow-"),
        (
            {"delays": "measured", "simulated-delays": "lognormal"},
            "got simulated-delays 'lognormal' without sleep: set sleep to true, or delays to 'lognormal'",
        ),
        ({"sleep": True}, "sleep needs simulated delays to wait for, got none: set delays"),
        ({"sleep": True, "delays": "measured"}, "set simulated-delays, or leave sleep out"),
        ({"sleep": 1}, "sleep must be true or false, got 1"),
        ({"dp-examples": 100, "target-epsilon": 8.0}, "dp-examples goes with sampler 'poisson', got 100 with sampler"),
    ],
)
def test_what_does_not_go_together_is_refused_with_the_remedy(values, message):
    with pytest.raises(ConfigError, match=message):
        RunConfig.read(values)


@pytest.mark.parametrize(
    "values",
    [
        {"sampler": "lds", "sampler-delta": 0.0},  # does not look at delays
        {"delays": "slow-fraction", "sleep": True},
        {"sampler": "lds", "delays": "csv", "delays-path": "/not/here.csv", "sleep": True},
        {"sampler": "lds", "delays": "measured"},
        {"delays": "measured", "simulated-delays": "none"},
        {"dp-examples": 100, "target-epsilon": 8.0, "sampler": "poisson-global"},
        {"dp-examples": 100, "target-epsilon": 8.0, "sampler": "psl_flower.samplers:PoissonGlobalSampler"},
    ],
)
def test_what_goes_together_is_accepted_and_survives_the_way_to_the_clients(values):
    config = RunConfig.read(values)
    assert RunConfig.read(config.as_run_config()) == config
