"""The folder of a run: nobody else writes there meanwhile, and each run can have one of its own."""

import os
import re
import socket

import pytest
from warm import WARM

from psl_flower.errors import ConfigError
from psl_flower.strategy import folder as folder_module
from psl_flower.strategy.folder import FolderLock, run_folder


def hold(folder, pipe):
    """Lock a folder until there is word to end."""
    with FolderLock(folder):
        pipe.send("locked")
        pipe.recv()


@pytest.fixture
def holder(tmp_path):
    pipe, theirs = WARM.Pipe()
    process = WARM.Process(target=hold, args=(tmp_path, theirs))
    process.start()
    assert pipe.recv() == "locked"
    process.pipe = pipe
    yield process
    process.kill()
    process.join()


def test_the_second_of_two_runs_is_refused_and_told_whose_it_is(holder, tmp_path):
    whose = rf"process {holder.pid} on {re.escape(socket.gethostname())}, since \d{{4}}-\d\d-\d\dT"
    for _ in range(2):  # being refused takes nothing away from the owner
        with pytest.raises(ConfigError, match=rf"another run writes to .*: {whose}.*: wait for it, end it, or give"):
            FolderLock(tmp_path).__enter__()
    holder.pipe.send("end")
    holder.join()
    with FolderLock(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_dead_runs_lock_is_taken_over(holder, tmp_path, caplog):
    holder.kill()
    holder.join()
    assert [path.name for path in tmp_path.iterdir()] == [folder_module.LOCK_FILE]
    with FolderLock(tmp_path):
        assert f"did not end in order: process {holder.pid} on" in caplog.text
        with pytest.raises(ConfigError, match=f"process {os.getpid()} on"):
            FolderLock(tmp_path).__enter__()
    assert list(tmp_path.iterdir()) == []


def test_two_runs_of_one_process_are_kept_apart_too(tmp_path):
    with FolderLock(tmp_path / "a"), FolderLock(tmp_path / "b"), pytest.raises(ConfigError, match="another run writes"):
        FolderLock(tmp_path / "a").__enter__()


def test_the_lock_ends_with_an_error(tmp_path):
    with pytest.raises(OSError, match="disk full"), FolderLock(tmp_path):
        raise OSError("disk full")
    with FolderLock(tmp_path):
        pass


def test_a_lock_that_is_unlinked_while_it_is_opened_is_none(tmp_path, monkeypatch):
    """Who waits with the file open, while its owner ends, must not lock a file that nobody else can see."""
    flock, tries = folder_module.fcntl.flock, []

    def late(descriptor, how):
        if not tries:
            (tmp_path / folder_module.LOCK_FILE).unlink()
        tries.append(descriptor)
        flock(descriptor, how)

    monkeypatch.setattr(folder_module.fcntl, "flock", late)
    with FolderLock(tmp_path):
        assert len(tries) == 2
        with pytest.raises(ConfigError, match="another run"):
            FolderLock(tmp_path).__enter__()


def test_without_flock_the_run_goes_on_and_it_is_said(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", "flwr.psl_flower")
    monkeypatch.setattr(folder_module, "_HAS_FLOCK", False)
    with FolderLock(tmp_path):
        assert "no flock: nothing keeps another run" in caplog.text


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, caplog):
    def refuse(descriptor, how):
        raise OSError("no locks available")

    monkeypatch.setattr(folder_module.fcntl, "flock", refuse)
    with FolderLock(tmp_path):
        assert "cannot be locked (no locks available)" in caplog.text


def test_nothing_is_locked_without_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with FolderLock(None):
        pass
    assert list(tmp_path.iterdir()) == []


# --- a folder of its own ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "expected"),
    [("digits-ugs", "-digits-ugs"), ("../../etc", "-etc"), ("a b/c", "-a-b-c"), ("", ""), ("größe_1.5", "-größe_1.5")],
)
def test_a_run_has_a_folder_of_its_own(name, expected, tmp_path):
    folder = run_folder(tmp_path / "outputs", name)
    assert folder.parent == tmp_path / "outputs"
    assert re.fullmatch(rf"\d{{8}}-\d{{6}}{re.escape(expected)}", folder.name)
    assert list(folder.iterdir()) == []


def test_no_two_runs_share_one_and_latest_is_the_last(tmp_path):
    made = [run_folder(tmp_path, "x") for _ in range(3)]
    assert len(set(made)) == 3
    assert (tmp_path / "latest").resolve() == made[-1].resolve()
    assert os.readlink(tmp_path / "latest") == made[-1].name  # relative: the outputs may be moved
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*(path.name for path in made), "latest"])


def test_a_folder_called_latest_is_left_alone(tmp_path, caplog):
    (tmp_path / "latest").mkdir()
    (tmp_path / "latest" / "mine.txt").touch()
    folder = run_folder(tmp_path, "x")
    assert (tmp_path / "latest" / "mine.txt").exists()
    assert f"latest does not point to {folder.name}" in caplog.text
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["latest", folder.name])
