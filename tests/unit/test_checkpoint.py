"""Checkpoint files: what goes in comes out, whole or not at all, and nothing in them is run."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from psl_flower import checkpoint
from psl_flower.checkpoint import Checkpoints, check_identity
from psl_flower.errors import ConfigError

TREE = {
    "numbers": [1, -2.5, 1e-300, 0.1 + 0.2, True, None, "ä"],
    "endless": [math.inf, -math.inf],
    "betas": (0.9, 0.999),
    "by_index": {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(2, 3)}, 1: {}},
    "empty": {"list": [], "tuple": (), "dict": {}, "tensor": torch.zeros(0, 2)},
    "looks_like": [["tensor", "numbers"], ["dict"], "tensor"],
    "arrays": {"ids": np.arange(5), "flags": np.array([[True, False]])},
    "numpy_scalar": np.int64(7),
    "half": torch.ones(2, dtype=torch.bfloat16),
    "transposed": torch.arange(6).reshape(2, 3).T,
}


def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return a == b and (isinstance(a, np.generic) or type(a) is type(b))


def test_what_goes_in_comes_out(tmp_path):
    path = tmp_path / "some" / "file.safetensors"
    checkpoint.write(path, {"version": checkpoint.VERSION, **TREE})
    found = checkpoint.read(path)
    assert found.pop("version") == checkpoint.VERSION
    assert same(TREE, found)
    assert [p.name for p in path.parent.iterdir()] == ["file.safetensors"]


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.Adagrad, torch.optim.LBFGS])
def test_optimizers_come_back_exactly(optimizer, tmp_path):
    options = {"momentum": 0.9} if optimizer is torch.optim.SGD else {}

    def steps(model, chosen, n, seed):
        torch.manual_seed(seed)
        for x in torch.randn(n, 4, 3):

            def closure(x=x):
                chosen.zero_grad()
                loss = model(x).square().mean()
                loss.backward()
                return loss

            chosen.step(closure)

    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    mine = optimizer(model.parameters(), lr=0.1, **options)
    steps(model, mine, 3, 1)
    path = tmp_path / "file.safetensors"
    checkpoint.write(
        path, {"version": checkpoint.VERSION, "optimizer": mine.state_dict(), "model": dict(model.state_dict())}
    )
    found = checkpoint.read(path)
    other = torch.nn.Linear(3, 2)
    other.load_state_dict(found["model"])
    theirs = optimizer(other.parameters(), lr=0.5, **options)
    theirs.load_state_dict(found["optimizer"])
    for each, chosen in ((model, mine), (other, theirs)):
        steps(each, chosen, 3, 2)
    assert torch.equal(model.weight, other.weight)


@pytest.mark.parametrize("value", [object(), lambda: None, {1, 2}, 1j, b"bytes"])
def test_what_is_no_data_is_refused_with_its_place(value, tmp_path):
    kind = type(value).__name__
    with pytest.raises(
        ConfigError, match=rf"numbers, strings and tensors only, 'scheduler/base/1' is a {kind}: .*keep_"
    ):
        checkpoint.write(tmp_path / "file", {"scheduler": {"base": [0.1, value]}})
    assert list(tmp_path.iterdir()) == []


def write(path, tree=None):
    checkpoint.write(path, {"version": checkpoint.VERSION, "weights": torch.ones(1000), **(tree or {})})


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_file_is_refused(share, tmp_path):
    path = tmp_path / "file"
    write(path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ConfigError, match=f"{path} is no checkpoint, or damaged"):
        checkpoint.read(path)


def text(value):
    return {"psl_flower": json.dumps(value)}


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (None, "is no checkpoint, or damaged"),
        ({"psl_flower": "{"}, "is no checkpoint, or damaged"),
        (text({"weights": 1}), "is no checkpoint, or damaged"),
        (text({"version": 99}), "is a checkpoint of version 99, this is version 2"),
        (text({"version": checkpoint.VERSION, "x": ["tensor", "absent"]}), "is no checkpoint, or damaged"),
        (
            text({"version": checkpoint.VERSION, "x": ["object", "os.system"]}),
            "is no checkpoint, or damaged: ValueError: unknown kind",
        ),
        (text({"version": checkpoint.VERSION, "x": []}), "is no checkpoint, or damaged"),
        (text([1]), "is no checkpoint, or damaged"),
    ],
)
def test_other_files_are_refused(metadata, message, tmp_path):
    path = tmp_path / "file"
    save_file({"w": torch.ones(2)}, path, metadata=metadata)
    with pytest.raises(ConfigError, match=message):
        checkpoint.read(path)


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file.safetensors"
    write(path, {"n": 1})

    def interrupted(*arguments, **options):
        (tmp_path / "file.unfinished").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(path, {"n": 2})
    assert checkpoint.read(path)["n"] == 1


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    events = []
    monkeypatch.setattr(checkpoint.os, "fsync", lambda descriptor: events.append("fsync"))
    replace = checkpoint.os.replace
    monkeypatch.setattr(checkpoint.os, "replace", lambda a, b: (events.append("rename"), replace(a, b)))
    write(tmp_path / "file")
    assert events == ["fsync", "rename", "fsync"]


def test_the_latest_is_by_number_not_by_name_or_date(tmp_path):
    kept = Checkpoints(tmp_path, keep=10)
    for r, step in ((2, 5), (10, 1), (9, 200), (10, 0)):
        kept.save(r, step, {"at": [r, step]})
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "round-00099-step-0000001.unfinished").write_text("killed")
    assert kept.latest()["at"] == [10, 1]
    kept.save(11, 0, {"at": [11, 0]})
    assert not list(tmp_path.glob("*.unfinished"))
    assert (tmp_path / "notes.txt").exists()


def test_nothing_to_resume_from(tmp_path):
    assert Checkpoints(tmp_path / "none", keep=1).latest() is None


@pytest.mark.parametrize(
    ("found", "here", "message"),
    [
        ({"a": {"b": 1}}, {"a": {"b": 2}}, "a: b: the checkpoint has 1, this run 2"),
        ({"a": {}}, {"a": {"b": 2}}, "a: b is in this run, not in the checkpoint"),
        ({"a": {"b": 1}}, {"a": {}}, "a: b is in the checkpoint, not in this run"),
        ({"a": None}, {"a": {"b": 2}}, "a: the checkpoint has None"),
    ],
)
def test_the_first_difference_is_named(found, here, message):
    check_identity(here, here)
    with pytest.raises(ConfigError, match=message):
        check_identity(found, here)
