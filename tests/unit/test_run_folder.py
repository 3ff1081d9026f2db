"""The folder of a run: nobody else writes there meanwhile, and what an earlier run has left is kept."""

import os
import re
import socket
from datetime import datetime

import pytest
from warm import WARM

from psl_flower.errors import ConfigError
from psl_flower.strategy import folder as folder_module
from psl_flower.strategy.folder import FolderLock, set_aside


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


# --- what an earlier run has left ------------------------------------------------------------------------------------
def test_results_are_set_aside_under_the_time_of_the_last_of_them(tmp_path):
    for seconds, name in ((100, "a.json"), (200, "b.json"), (900, "mine.txt")):
        (tmp_path / name).write_text(name)
        os.utime(tmp_path / name, (seconds, seconds))
    set_aside(tmp_path, ["a.json", "b.json", "c.json"])
    (aside,) = tmp_path.glob("earlier-*")
    assert aside.name == f"earlier-{datetime.fromtimestamp(200):%Y%m%d-%H%M%S}"
    assert sorted(path.name for path in aside.iterdir()) == ["a.json", "b.json"]
    assert (tmp_path / "mine.txt").exists()


def test_where_nothing_is_left_nothing_is_made(tmp_path):
    set_aside(tmp_path, ["a.json"])
    set_aside(tmp_path / "not there", ["a.json"])
    assert list(tmp_path.iterdir()) == []


def test_two_that_ended_in_the_same_second_have_folders_of_their_own(tmp_path):
    for _ in range(2):
        (tmp_path / "a.json").touch()
        os.utime(tmp_path / "a.json", (100, 100))
        set_aside(tmp_path, ["a.json"])
    assert len(list(tmp_path.glob("earlier-*/a.json"))) == 2
