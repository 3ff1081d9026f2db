"""Checkpoint files: what goes in comes out, whole or not at all, and nothing in them is run."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from psl_flower import checkpoint
from psl_flower.checkpoint import Checkpoints
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
    checkpoint.write(path, TREE)
    assert same(TREE, checkpoint.read(path))
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
    checkpoint.write(path, {"optimizer": mine.state_dict(), "model": dict(model.state_dict())})
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
    checkpoint.write(path, {"weights": torch.ones(1000), **(tree or {})})


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
        (None, "is no checkpoint, it holds tensors only: pass those of a model as initial_arrays"),
        ({"psl_flower": "{"}, "is no checkpoint, or damaged"),
        (text({"weights": 1}), "is no checkpoint, or damaged"),
        (
            text({"version": 99}),
            f"in version 99 of the format, this psl_flower reads version {checkpoint.VERSION}: resume with the psl",
        ),
        (text({"version": 2, "of": ["another", "kind"]}), "in version 2 of the format"),
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
    path, found = kept.latest()
    assert found["at"] == [10, 1]
    assert path == tmp_path / "round-00010-step-0000001.safetensors"
    kept.save(11, 0, {"at": [11, 0]})
    assert not list(tmp_path.glob("*.unfinished"))
    assert (tmp_path / "notes.txt").exists()


def test_nothing_to_resume_from(tmp_path):
    assert Checkpoints(tmp_path / "none", keep=1).latest() is None


def test_where_none_can_be_read_nothing_begins_anew_unasked(tmp_path):
    kept = Checkpoints(tmp_path, keep=2)
    for step in (1, 2):
        kept.save(1, step, {}).write_bytes(b"damaged")
    with pytest.raises(ConfigError, match=r"none of the 2 checkpoints in .* can be read: .*without resume_from"):
        kept.latest()


def test_another_version_is_not_passed_over(tmp_path):
    kept = Checkpoints(tmp_path, keep=2)
    kept.save(1, 1, {})
    save_file({}, kept.save(1, 2, {}), metadata=text({"version": 99}))
    with pytest.raises(ConfigError, match="version 99 of the format"):
        kept.latest()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_newer_ones_than_the_one_resumed_from_are_kept_aside(tmp_path, caplog):
    kept = Checkpoints(tmp_path / "checkpoints", keep=10)
    first, second, third = (kept.save(1, step, {"branch": 1}) for step in (1, 2, 3))
    kept.keep_aside(first)
    assert kept.all() == [first]
    aside = tmp_path / "checkpoints.aside"
    assert names(aside) == [second.name, third.name]
    assert f"kept in {aside}: {second.name}, {third.name}" in caplog.text
    kept.save(1, 2, {"branch": 2})
    kept.keep_aside(tmp_path / "checkpoints" / ".." / "checkpoints" / first.name)
    assert names(tmp_path / "checkpoints.aside-2") == [second.name]
    assert checkpoint.read(aside / second.name) == {"branch": 1}
    assert checkpoint.read(tmp_path / "checkpoints.aside-2" / second.name) == {"branch": 2}
    kept.keep_aside(first)  # nothing is newer
    assert len(names(tmp_path)) == 3


def test_all_are_kept_aside_for_one_from_elsewhere(tmp_path):
    kept, elsewhere = Checkpoints(tmp_path / "checkpoints", keep=10), Checkpoints(tmp_path / "other", keep=10)
    mine = kept.save(1, 1, {})
    kept.keep_aside(elsewhere.save(1, 2, {}))
    assert kept.all() == []
    assert names(tmp_path / "checkpoints.aside") == [mine.name]
