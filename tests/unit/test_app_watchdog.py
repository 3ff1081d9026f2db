"""A watchdog stops what a launcher had started when that is killed, whatever the processes have become."""

import os
import signal
import subprocess
import sys
import time

import pytest

from psl_flower.app.watchdog import Watchdog, _processes, stop_trees

pytestmark = pytest.mark.skipif(os.name != "posix", reason="there is no watchdog")

# Starts a descendant for all arguments but the first, each in a session of its own; a deaf one does not heed SIGTERM.
TREE = """
import os, signal, subprocess, sys, time
if sys.argv[1] == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
print(os.getpid(), flush=True)
if sys.argv[2:]:
    subprocess.Popen([sys.executable, sys.argv[0], *sys.argv[2:]], start_new_session=True)
time.sleep(600)
"""
LAUNCHER = """
import subprocess, sys, time
from psl_flower.app.watchdog import Watchdog
watchdog = Watchdog()
tree = subprocess.Popen([sys.executable, sys.argv[1], "heeds", "heeds"], start_new_session=True)
watchdog.watch(tree)
watchdog.remove(sys.argv[2])
time.sleep(600)
"""


def living(pids):
    """Return which of these live; a zombie does not."""
    return {pid for pid, _, _, state, _ in _processes() if pid in pids and not state.startswith("Z")}


def wait_until_gone(pids):
    end = time.monotonic() + 60
    while left := living(pids):
        assert time.monotonic() < end, f"{left} live"
        time.sleep(0.05)


@pytest.fixture
def tree(tmp_path):
    path = tmp_path / "tree.py"
    path.write_text(TREE)
    return str(path)


def test_killing_the_launcher_stops_the_tree_and_removes_the_folder(tree, tmp_path):
    folder = tmp_path / "a folder"
    folder.mkdir()
    command = [sys.executable, "-c", LAUNCHER, tree, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as launcher:
        pids = [int(launcher.stdout.readline()) for _ in range(2)]
        assert living(pids) == set(pids)
        launcher.send_signal(signal.SIGKILL)
        wait_until_gone(pids)
    end = time.monotonic() + 60
    while folder.exists():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize("kinds", [("heeds", "deaf"), ("deaf", "heeds"), ("deaf", "deaf")])
def test_what_does_not_heed_sigterm_is_killed_also_when_its_parent_has_gone(tree, kinds):
    command = [sys.executable, tree, *kinds]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        pids = [int(process.stdout.readline()) for _ in range(2)]
        stop_trees([process.pid], grace=0.5)
        assert living(pids) == set()


def test_an_orderly_end_stops_what_was_not_forgotten(tree):
    command = [sys.executable, tree, "heeds"]
    quiet = {"stdout": subprocess.PIPE, "text": True, "start_new_session": True}
    with subprocess.Popen(command, **quiet) as kept, subprocess.Popen(command, **quiet) as stopped:
        pids = [int(process.stdout.readline()) for process in (kept, stopped)]
        with Watchdog() as watchdog:
            watchdog.watch(kept)
            watchdog.watch(stopped)
            watchdog.forget(kept)
        assert living(pids) == {kept.pid}
        stop_trees([kept.pid])
