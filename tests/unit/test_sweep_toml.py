"""What a sweep's TOML may say, what it comes to, and what is refused before anything runs."""

import re

import pytest

from psl_flower.app.models import build_model
from psl_flower.cli import main
from psl_flower.errors import ConfigError
from psl_flower.experiments.command import parse_set
from psl_flower.experiments.sweep import distinct, read_sweep
from psl_flower.presets import preset_names

SWEEP = """
title = "Three methods"
[config]
partition = "severe"
batch-size = 64
[axes]
num-clients = [8, 16]
seed = [0, 1]
[methods]
UGS = { sampler = "ugs" }
"Aligned, tilt 0.1" = { sampler = "aligned", sampler-tilt = 0.1, sampler-targets = "stratified", delays = "lognormal" }
centralised = { algorithm = "centralised" }
[quick.config]
num-server-rounds = 2
[full.config]
num-server-rounds = 100
[full.axes]
seed = [0, 1, 2]
"""


@pytest.fixture
def read(tmp_path):
    def write_and_read(text=SWEEP, form="", **overrides):
        path = tmp_path / "sweep.toml"
        path.write_text(text)
        return read_sweep(str(path), form, {key.replace("_", "-"): value for key, value in overrides.items()})

    return write_and_read


def test_every_combination_is_there_the_first_seed_first(read):
    found = [(e.values["seed"], e.values["num-clients"], e.method) for e in read().experiments()]
    methods = ["UGS", "Aligned, tilt 0.1", "centralised"]
    assert found == [(seed, k, method) for seed in (0, 1) for k in (8, 16) for method in methods]


def test_keys_reach_the_setting_from_everywhere(read):
    setting = read().experiments()[4].setting
    assert (setting.num_clients, setting.algorithm, setting.config.seed) == (16, "psl", 0)
    assert (setting.config.partition, setting.config.sampler, setting.config.sampler_tilt) == ("severe", "aligned", 0.1)


def test_a_training_that_does_not_depend_on_an_axis_is_run_once(read):
    experiments = read().experiments()
    central = {e.name for e in experiments if e.method == "centralised"}
    assert len(central) == 2  # seeds
    assert len(list(distinct(experiments))) == 2 * 2 * 2 + 2
    other_split = read(SWEEP.replace('"severe"', '"mild"')).experiments()
    assert {e.name for e in other_split if e.method == "centralised"} == central
    assert not {e.name for e in other_split if e.method == "UGS"} & {e.name for e in experiments}
    passes = read(local_epochs=[1, 2]).experiments()  # only algorithms with clients that train by themselves make them
    assert {e.name for e in passes} == {e.name for e in experiments}


def test_the_name_of_a_training_is_its_content_not_where_or_how_fast_it_runs(read):
    names = [e.name for e in read().experiments()]
    assert names == [e.name for e in read(data_path="/somewhere", threads=2, loggers="tensorboard").experiments()]
    assert names == [e.name for e in read(SWEEP.replace("UGS = {", '"Ours" = {')).experiments()]
    for change in (
        {"learning_rate": 0.5},
        {"examples": 1000},
        {"num_server_rounds": 9},
        {"precision": "bf16"},
        {"double": True},
    ):
        assert not set(names) & {e.name for e in read(**change).experiments()}
    in_process = SWEEP.replace("[config]", 'engine = "in-process"\n[config]', 1)
    by_clients = [e.name for e in read(in_process).experiments() if e.method != "centralised"]
    assert not set(names) & set(by_clients)


def test_what_has_no_clients_is_vectorised_under_every_engine(read):
    experiments = read(SWEEP.replace("[config]", 'engine = "simulation"\n[config]', 1)).experiments()
    assert {(e.method, e.engine) for e in experiments} == {
        ("UGS", "simulation"),
        ("Aligned, tilt 0.1", "simulation"),
        ("centralised", "vectorised"),
    }


def test_quick_is_the_default_where_there_are_both_forms_and_else_the_file_as_it_stands(read):
    assert read().form == "quick"
    assert read().config["num-server-rounds"] == 2
    full = read(form="full")
    assert (full.config["num-server-rounds"], full.config["batch-size"], full.axes["seed"]) == (100, 64, [0, 1, 2])
    only_quick = SWEEP[: SWEEP.index("[full.config]")]
    assert read(only_quick).form == ""
    assert "num-server-rounds" not in read(only_quick).config
    with pytest.raises(ConfigError, match=r"there is no form 'full': add a table \[full.config\]"):
        read(only_quick, form="full")


def test_overrides_change_all_runs_a_list_makes_an_axis_and_an_axis_stays_one(read):
    sweep = read(num_clients=4, batch_size=[32, 64], method=["centralised", "UGS"], seed=5, sampler="fls")
    assert dict(sweep.axes) == {"num-clients": [4], "seed": [5], "batch-size": [32, 64]}
    assert list(sweep.methods) == ["centralised", "UGS"]
    assert sweep.methods["UGS"] == {}  # its sampler is that of all
    assert {e.setting.config.sampler for e in sweep.experiments() if e.method == "UGS"} == {"fls"}


def test_a_sweep_needs_no_methods_and_no_seed(read):
    sweep = read('[config]\nsampler = "fls"\nseed = 3\n[axes]\nbatch-size = [16, 32]')
    assert [(e.method, e.values["batch-size"], e.setting.config.seed) for e in sweep.experiments()] == [
        ("fls", 16, 3),
        ("fls", 32, 3),
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("[axes]", "[axis]"), r"a key of a sweep must be one of .*got 'axis' \(did you mean 'axes'\?\)"),
        (("batch-size = 64", "batchsize = 64"), r"a key of \[config\] must be one of .*did you mean 'batch-size'"),
        (("batch-size = 64", 'output-dir = "x"'), r"output-dir is the runner's own, it cannot stand in \[config\]"),
        (("num-clients = [8, 16]", "num-clients = 8"), "axis num-clients must be a list of at least one value, got 8"),
        (("num-clients = [8, 16]", "num-clients = []"), r"at least one value, got \[\]"),
        (("seed = [0, 1]", "seed = [0, 0]"), r"axis seed must name each value once, got \[0, 0\]"),
        (("seed = [0, 1]", 'method = ["UGs"]'), "a value of axis method must be one of 'UGS'.*did you mean 'UGS'"),
        (('sampler = "ugs"', "seed = 1"), r"seed is an axis, and set in \[methods.UGS\]: leave one"),
        (('sampler = "ugs" }', 'seed = 1 }\nX = { sampler = "ugs" }'), "seed is an axis"),
        (('sampler = "ugs"', 'sampler = "usg"'), "method 'UGS', num-clients = 8, seed = 0: sampler must be one of"),
        (('sampler = "ugs"', 'smapler = "ugs"'), r"a key of \[methods.UGS\] must be one of .*did you mean 'sampler'"),
        (('{ sampler = "ugs" }', "1"), r"\[methods.UGS\] must be a table of keys and values, got 1"),
        (('"centralised" }', '"central" }'), "algorithm must be one of .*did you mean 'centralised'"),
        (
            ("num-clients = [8, 16]", "num-clients = [8, 0]"),
            "num-clients = 0, seed = 0: num_clients must be at least 1",
        ),
        (('"Three methods"', "3"), "title must be a string, got 3"),
        (("[config]", 'engine = "ray"\n[config]'), "engine must be one of 'vectorised', 'in-process', 'simulation'"),
        (("[quick.config]", "[quick.paper2]"), r"a key of \[quick\] must be one of .*got 'paper2'"),
        (
            ("[axes]", "examples = 900\n[axes]\n", 'engine = "in-process"\n'),
            "examples is for engine 'vectorised', got 900",
        ),
        (("[axes]", 'precision = "bfloat16"\n[axes]'), "got 'bfloat16': write precision = 'bf16'"),
        (("[axes]", 'precision = "float64"\n[axes]'), "got 'float64': write double = true"),
        (("[config]", "[config"), "is no TOML"),
        (("[config]", "axes = 3\n[config]"), "is no TOML"),  # twice
        (("[config]", "paper = 3\n[config]"), r"\[paper\] must be a table of keys and values, got 3"),
        (("[quick.config]", "[paper.accuracy]\nUGs = { 8 = 1 }\n[quick.config]"), "paper.accuracy.*did you mean 'UGS'"),
        (("[quick.config]", "[paper.accuracy]\nUGS = 1\n[quick.config]"), r"\[paper.accuracy.UGS\] must be a table"),
        (("[quick.config]\nnum-server-rounds = 2", "[quick]\nconfig = 2"), r"\[config\] must be a table"),
    ],
)
def test_what_is_wrong_is_refused_with_the_file_and_the_rule(read, change, message):
    old, new, *head = change
    with pytest.raises(ConfigError, match=rf"sweep\.toml.*{message}"):
        read("".join(head) + SWEEP.replace(old, new, 1))


def test_unknown_sweeps_are_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"a preset, or a path .*got 'sever' \(did you mean 'severe'\?\)"):
        read_sweep("sever")
    with pytest.raises(ConfigError, match=r"not/here\.toml cannot be read"):
        read_sweep("not/here.toml")
    with pytest.raises(ConfigError, match=r"a key to set must be one of .*did you mean 'batch-size'"):
        read_sweep("severe", overrides={"batch_size": 3})


def test_the_presets_are_those_of_the_paper_and_all_of_their_combinations_are_accepted():
    assert preset_names("experiments") == [
        "baselines",
        "batch-size",
        "cifar10-small",
        "iid",
        "mild",
        "severe",
        "stragglers",
    ]
    for name in set(preset_names("experiments")) - {"cifar10-small"}:
        quick, full = read_sweep(name, "quick"), read_sweep(name, "full")
        assert quick.title
        assert quick.axes["seed"] == [0, 1, 2]
        for sweep, dataset, model in ((quick, "fashion-mnist", "tiny-cnn"), (full, "cifar10", "resnet18")):
            configs = [e.setting.config for e in sweep.experiments()]
            assert {(c.dataset, c.model) for c in configs} == {(dataset, model)}
    for table in ("iid", "mild", "severe"):
        assert read_sweep(table).axes["num-clients"] == [16, 32, 64, 128]
        assert list(read_sweep(table).methods) == ["UGS", "FPLS", "FLS", "centralised"]
    assert read_sweep("batch-size").axes["batch-size"] == [64, 128, 256]


def test_the_preset_for_a_processor_has_a_small_model_without_batch_statistics_and_every_kind_of_sampler():
    quick, full = (read_sweep("cifar10-small", form) for form in ("quick", "full"))
    for sweep in (quick, full):
        experiments = sweep.experiments()
        assert len(list(distinct(experiments))) == 3 * (2 * 5 + 1)  # seeds, clients by samplers, centralised
        assert {e.setting.config.sampler for e in experiments} == {"ugs", "lds", "aligned", "fpls", "fls"}
        assert {e.setting.config.partition for e in experiments if e.setting.algorithm == "psl"} == {"severe"}
        assert {(e.engine, e.setting.config.dataset) for e in experiments} == {("vectorised", "cifar10")}
        (name,) = {e.setting.config.model for e in experiments}
        model = build_model(name, in_channels=3, num_classes=10, seed=0)
        assert sum(parameter.numel() for parameter in model.parameters()) < 300_000
        assert not list(model.buffers())


# --- the command -----------------------------------------------------------------------------------------------------
def test_values_to_set_are_toml_or_text():
    assert [parse_set(text) for text in ("seed=[1, 2]", "sampler=ugs", "sampler='ugs'", "a=b=c", "sleep=true")] == [
        ("seed", [1, 2]),
        ("sampler", "ugs"),
        ("sampler", "ugs"),
        ("a", "b=c"),
        ("sleep", True),
    ]
    with pytest.raises(ConfigError, match="--set takes KEY=VALUE, got 'seed'"):
        parse_set("seed")


def test_the_command_lists_presets_and_combinations_and_runs_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["experiments", "list"]) == 0
    assert re.search(r"^severe +--quick +39 trainings ", capsys.readouterr().out, re.MULTILINE)
    assert main(["experiments", "run", "severe", "--dry-run", "--set", "num-clients=128", "--set", "seed=0"]) == 0
    out, err = capsys.readouterr()
    assert [line.split(",")[0] for line in out.splitlines()] == ["UGS", "FPLS", "FLS", "centralised"]
    assert "quick: 4 combinations, 4 trainings" in err
    assert not list(tmp_path.iterdir())


def test_the_command_refuses_with_status_2(capsys, tmp_path):
    assert main(["experiments", "run", "severe", "--set", "sampler=usg"]) == 2
    assert "did you mean 'ugs'" in capsys.readouterr().err
    assert main(["experiments", "report", str(tmp_path)]) == 2
    assert "has no results of a sweep" in capsys.readouterr().err


def test_a_model_that_cannot_be_cut_there_is_refused_before_anything_is_trained(capsys, tmp_path):
    out = tmp_path / "out"
    assert main(["experiments", "run", "severe", "--set", "cut=stage9", "--output", str(out)]) == 2
    assert "has no such submodule" in capsys.readouterr().err
    assert not out.exists()
