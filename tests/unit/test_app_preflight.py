"""What is wrong with a run is said in one line before anything is started."""

import re
import sys
from pathlib import Path

import pytest
from flwr.common.config import parse_config_args
from ray._private.utils import validate_socket_filepath

from psl_flower import cli, flower, temporary_folder
from psl_flower.app import datasets, local
from psl_flower.app.preflight import check_run, read_overrides
from psl_flower.app.task import check_split, split_indices
from psl_flower.config import RunConfig
from psl_flower.errors import ConfigError
from psl_flower.temporary_folder import check_temporary_folder

ROOT = Path(__file__).parents[2]
KEYS = RunConfig().as_run_config()


@pytest.fixture(autouse=True)
def nothing_starts(monkeypatch):
    """Let the launchers stop where they would start Flower, and take any Flower until then for one that they know."""

    def start(self):
        raise AssertionError("it was started")

    monkeypatch.setattr(flower, "version", lambda name: flower.FIRST_WITH_ONE_ADDRESS)
    monkeypatch.setattr(local.LocalSuperLink, "start", start)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-c", "batch-size=0"], "batch-size must be at least 1, got 0"),
        (
            ["-c", "batch_size=8"],
            f"a configuration key must be one of {len(KEYS)} names, got 'batch_size' (did you mean",
        ),
        (["-c", "zzz=8"], "a configuration key must be one of 'num-server-rounds', 'evaluate-every'"),
        (
            ["-c", "seed=1", "-c", "sampler=lds"],
            "-c takes numbers, true, false and strings in quotes",
        ),
        (["-c", "cut='stage9'"], "cut 'stage9'"),
        (["-c", "min-available-nodes=5", "--num-supernodes", "4"], "min-available-nodes must be at most the number of"),
        (["-c", "dataset='cifar10' data-path='/no/where'"], "data-path must be a folder with train-images-idx3-ubyte"),
        (["-c", "resume-from='latest' keep-checkpoints=0"], "checkpoint_every and resume_from='latest' need an output"),
        (["--num-supernodes", "0"], "--num-supernodes must be at least 1, got 0"),
        (
            ["--num-supernodes", "1438"],
            "every partition (client) needs at least one example, got 1437 examples for 1438 partit",
        ),
        (
            ["-c", "partition='severe'", "--num-supernodes", "4"],
            "every class needs a holder, but 4 partitions of 2 classes each hold at most 8 of 10 classes",
        ),
        (
            ["-c", "partition='mild' classes-per-client=11"],
            "the classes of a partition (client) must not exceed the number of classes, got 11 for 10",
        ),
        (["-c", "resume-from='/no/where'"], "resume_from: there is no checkpoint /no/where: pass 'latest', or the"),
        (["--home", "/dev/null/home"], "--home: /dev/null/home cannot be written to"),
    ],
)
@pytest.mark.parametrize("command", ["run", "deploy"])
def test_a_wrong_setting_ends_the_launcher_with_one_line(command, words, message, capsys):
    assert cli.main([command, str(ROOT), *words]) == 2
    said = capsys.readouterr()
    (line,) = said.err.splitlines()
    assert line.startswith(f"psl-flower: {message}")
    assert said.out == ""


@pytest.mark.parametrize(
    ("package", "setting", "extra"),
    [
        ("sklearn", "seed=1", "vision"),
        ("torchvision", "dataset='cifar10'", "vision"),
        ("torchvision", "model='resnet18'", "vision"),
        ("scipy", "sampler='lds'", "samplers"),
        ("tensorboard", "loggers='tensorboard'", "tensorboard"),
        ("wandb", "loggers='wandb'", "wandb"),
    ],
)
def test_what_the_settings_need_and_is_not_installed_is_told_first(package, setting, extra, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    assert cli.main(["run", str(ROOT), "-c", setting]) == 2
    assert f"needs {package}, which is not installed: pip install 'psl-flower[{extra}]'" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["run", "deploy"])
def test_right_settings_are_let_through(command):
    with pytest.raises(AssertionError, match="it was started"):
        cli.main([command, str(ROOT), "--num-supernodes", "2", "-c", "sampler='fls' batch-size=8", "-c", "seed=1"])


def test_of_another_app_the_keys_are_known(tmp_path):
    (tmp_path / "pyproject.toml").write_text(
        '[tool.flwr.app.components]\nserverapp = "a:app"\n[tool.flwr.app.config]\nrounds = 3\nnet.width = 8\n'
    )
    check_run(tmp_path, ["rounds=0 net.width=9"], 2, simulation=False)
    with pytest.raises(ConfigError, match=r"'net.widht' \(did you mean 'net.width'\?\)"):
        check_run(tmp_path, ["net.widht=9"], 2, simulation=False)
    with pytest.raises(ConfigError, match=r"there is no Flower app here: .*nowhere"):
        check_run(tmp_path / "nowhere", [], 2, simulation=False)
    (tmp_path / "pyproject.toml").write_text("[project]\nname = 'x'\n")
    with pytest.raises(ConfigError, match=r"must have \[tool.flwr.app\]"):
        check_run(tmp_path, [], 2, simulation=False)


def test_overrides_are_read_as_flower_reads_them(tmp_path):
    given = ["a=1 b='two words' c=\"x\" d=0.5", "e=true a=2 f.g=-3"]
    expected = {"a": 2, "b": "two words", "c": "x", "d": 0.5, "e": True, "f.g": -3}
    assert read_overrides(given) == parse_config_args(list(given)) == expected
    (tmp_path / "these.toml").write_text("a = 1\n[f]\ng = 'h'\n")
    given = [str(tmp_path / "these.toml")]
    assert read_overrides(given) == parse_config_args(given) == {"a": 1, "f.g": "h"}


@pytest.mark.parametrize("text", ["a = 1", "a", "a=1 b", "a=1, b=2"])
def test_what_flower_would_pass_over_in_silence_is_refused(text):
    with pytest.raises(ConfigError, match="-c takes"):
        read_overrides([text])


@pytest.fixture
def longest(monkeypatch):
    """The longest folder that Ray takes."""
    monkeypatch.delenv("TMPDIR", raising=False)
    folder = "/" + "t" * (temporary_folder._SOCKET_PATH_LIMIT - len(temporary_folder._SOCKET) - 1)
    validate_socket_filepath(folder + temporary_folder._SOCKET)
    with pytest.raises(OSError, match="AF_UNIX"):
        validate_socket_filepath(f"{folder}t{temporary_folder._SOCKET}")
    return folder


LINUX = pytest.mark.skipif(sys.platform != "linux", reason="Ray does not look at it")


@pytest.mark.parametrize("name", ["RAY_TMPDIR", pytest.param("TMPDIR", marks=LINUX)])
def test_a_folder_too_long_for_the_paths_of_rays_sockets_is_refused(monkeypatch, longest, name):
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    check_temporary_folder()
    monkeypatch.setenv(name, longest)
    check_temporary_folder()
    monkeypatch.setenv(name, f"{longest}t")
    with pytest.raises(ConfigError, match=rf"{name} must have at most {len(longest)} bytes.*: set {name}=/tmp before"):
        check_run(ROOT, [], 2, simulation=True)
    check_run(ROOT, [], 2, simulation=False)  # a deployment has no Ray


@pytest.mark.parametrize(
    ("given", "right"),
    [
        ("False", "false"),
        ("0,1", "0.1"),
        (".5", "0.5"),
        ("5.", "5.0"),
        ("fls", "'fls'"),
        ("b1", "'b1'"),
        ("a,b", "'a,b'"),
    ],
)
def test_who_writes_a_value_otherwise_than_toml_is_told_how_to(given, right):
    with pytest.raises(ConfigError, match=rf": write key={re.escape(right)}$"):
        read_overrides([f"key={given}"])


def test_clients_as_many_or_few_as_a_split_can_have_are_let_through():
    most = datasets.SPECS["digits"].num_examples
    assert most == len(datasets.load_arrays("digits", "train")[1])
    for clients, config in ((most, RunConfig()), (5, RunConfig(partition="severe"))):
        check_split(config, clients)
        assert len(split_indices(config, "train", clients)) == clients


@pytest.mark.parametrize("command", ["run", "deploy"])
def test_a_flower_whose_addresses_are_given_otherwise_is_refused(command, monkeypatch, capsys):
    monkeypatch.setattr(flower, "version", lambda name: "1.39.2")
    assert cli.main([command, str(ROOT)]) == 2
    assert capsys.readouterr().err.startswith("psl-flower: psl-flower run and deploy need flwr 1.40 or newer, got ")
    monkeypatch.setattr(flower, "version", lambda name: "1.40.0")
    with pytest.raises(AssertionError, match="it was started"):
        cli.main([command, str(ROOT)])
