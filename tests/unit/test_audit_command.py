"""The command of the audit: options, presets, and what it refuses before anything runs."""

import json
import struct

import numpy as np
import pytest

from psl_flower import cli
from psl_flower.app.models import build_model
from psl_flower.audit import ACTIVE, ATTACKS
from psl_flower.audit.command import _OF_MODEL, _fitting
from psl_flower.audit.preset import read_preset
from psl_flower.presets import preset_names
from psl_flower.privacy import parse_defences
from psl_flower.split import cut_candidates

QUICK = ["--num-clients", "2", "--rounds", "1", "--cut", "stage2", "--attack", "labels"]


def test_it_trains_attacks_and_reports(tmp_path, capsys):
    words = [
        "audit",
        "--examples",
        "96",
        *QUICK,
    ]
    words += ["--defences", "none", "--defences", "RandomizedResponse(0.01, 10)", "--output", str(tmp_path), "--json"]
    words += ["--attack", "tail-labels"]  # on what only a U shape has
    assert cli.main(words) == 0
    shown = capsys.readouterr()
    told = json.loads(shown.out)
    assert told == json.loads((tmp_path / "audit.json").read_text())
    assert told["command"].startswith("psl-flower audit --examples 96")
    assert told["versions"]["torch"]
    shares = [case["findings"][0]["value"] for case in told["cases"]]
    assert shares[0] == 1.0
    assert shares[1] < 0.4  # chance is 0.1
    assert "2/2  cut stage2, RandomizedResponse(0.01, 10), seed 0: labels  ETA" in shown.err
    assert (tmp_path / "frontier.png").exists()
    assert [case["idle"] for case in told["cases"]] == [["tail-labels"]] * 2
    report = (tmp_path / "audit.md").read_text()
    assert report.count("Had nothing to attack here, which is no sign of safety: tail-labels.") == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--defences", "GaussianNoize(1)"], "did you mean 'GaussianNoise'"),
        (["--attack", "decodr"], "did you mean 'decoder'"),
        (["--seeds", "0"], "--seeds must be at least 1"),
        (["--cut", "stage7"], "has no such submodule"),
        (["--examples", "50"], "at least 16 training examples a client"),
        (["cifar10", "--data-path", "/nowhere"], "/nowhere"),
        (["cifar"], "did you mean 'cifar10'"),
        (["severe"], "'severe' is a preset of another command: give psl-flower experiments run severe"),
    ],
)
def test_what_is_wrong_is_refused(words, message, capsys, tmp_path):
    assert cli.main(["audit", *words, "--output", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_to_is_refused_before_anything_runs(capsys):
    assert cli.main(["audit", "--output", "/dev/null/out"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("psl-flower: --output: /dev/null/out cannot be written to")


@pytest.mark.parametrize("name", preset_names("audit"))
def test_presets_name_what_there_is(name):
    preset = read_preset(name)
    model = build_model(preset.model, in_channels=1, num_classes=10, seed=0)
    assert set(preset.cuts) <= set(cut_candidates(model, depth=1))
    assert set(preset.attacks) <= {*ATTACKS, *ACTIVE}
    for text in preset.defences:
        assert text == "none" or parse_defences(text, _OF_MODEL)


def test_presets_are_listed_with_what_they_do_and_no_two_commands_have_one_name(capsys):
    assert cli.main(["audit", "--list"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert [line.split("   ")[0].strip() for line in lines] == preset_names("audit")
    assert "What leaks of digits" in next(line for line in lines if line.startswith("digits "))
    assert last == "Run one: psl-flower audit NAME. Other presets: psl-flower experiments list"
    assert not set(preset_names("audit")) & set(preset_names("experiments"))
    assert cli.main(["experiments", "run", "privacy-digits"]) == 2
    assert "give psl-flower audit privacy-digits" in capsys.readouterr().err


def test_a_preset_with_a_tail_has_the_cuts_that_leave_the_server_something():
    model = build_model("cnn", in_channels=1, num_classes=10, seed=0)
    assert _fitting(read_preset("digits").cuts, model, None) == ["stage2", "stage3", "head"]
    assert _fitting(read_preset("digits").cuts, model, "head") == ["stage2", "stage3"]
    assert _fitting(["head"], model, "head") == ["head"]  # which is refused then, with the reason


def test_fashion_mnist_from_files_of_its_format(tmp_path, capsys):
    """A stand-in: the real files are not the package's."""
    rng = np.random.default_rng(0)
    for prefix, count in (("train", 96), ("t10k", 40)):
        labels = np.arange(count, dtype=np.uint8) % 10
        images = (20 * labels[:, None, None] + rng.integers(0, 40, (count, 28, 28))).astype(np.uint8)
        for name, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
            (tmp_path / f"{prefix}-{name}-ubyte").write_bytes(header + array.tobytes())
    words = [
        "--data-path",
        str(tmp_path),
        *QUICK,
    ]
    assert cli.main(["audit", "fashion-mnist", *words, "--output", str(tmp_path / "out"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["dataset"], told["training examples"], told["test examples"]) == ("fashion-mnist", 96, 40)
    assert told["cases"][0]["findings"][0]["value"] == 1.0
