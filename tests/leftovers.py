"""What belongs to one run of pytest: a temporary folder, and a keeper that ends its processes however pytest ends.

A plugin of pytest, which `conftest.py` takes in. The keeper is this file, run as a process of its own::

    python tests/leftovers.py PID MARK FOLDER

It waits for the end of process PID, which may be a kill, then ends all processes of the session and removes FOLDER.
They are known by the variable MARK in their environment, which children inherit (those of Ray and Flower, too, which
leave their parent's group and session), and by their parents: Ray's workers write their title over their environment.
"""

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

GRACE = 3.0  # seconds in which helpers of Python's own (resource trackers) end by themselves


def pytest_configure(config):
    """Give the session its folder and its keeper; the workers of pytest-xdist belong to their parent's."""
    if sys.platform != "linux" or hasattr(config, "workerinput"):
        return
    # tests' own folders stay where pytest keeps them, for whoever looks into a failure
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())
    folder = tempfile.mkdtemp(prefix="psl-")  # short: the path of one of Ray's sockets has 107 characters at most
    mark = (
        f"PSL_TESTS_{os.getpid()}_{time.time_ns()}"  # a variable of its own: a pytest within a test is in two sessions
    )
    command = [sys.executable, "-I", __file__, str(os.getpid()), mark, folder]
    subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)  # not marked, and no Ctrl-C
    os.environ.update({mark: "1", "TMPDIR": folder})
    os.environ.update({name: f"{folder}/{name}" for name in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME")})
    tempfile.tempdir = None  # read TMPDIR again


def keep(pid, mark, folder):
    """Wait for the end of a session, and clean up after it."""
    with contextlib.suppress(ProcessLookupError):  # it has ended
        select.select([os.pidfd_open(pid)], [], [])
    end = time.monotonic() + GRACE
    while left := processes(mark):
        if time.monotonic() > end:
            for each in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(each, signal.SIGKILL)
        time.sleep(0.05)
    shutil.rmtree(folder, ignore_errors=True)


def processes(mark):
    """Return the living processes that have a mark, and those that descend from them."""
    marked, children = [], {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            state, parent = (entry / "stat").read_text().rsplit(")", 1)[1].split()[:2]
            if state == "Z":  # nobody may ever reap it
                continue
            children.setdefault(int(parent), []).append(int(entry.name))
            if f"{mark}=".encode() in (entry / "environ").read_bytes():
                marked.append(int(entry.name))
        except OSError:  # it ended meanwhile
            continue
    found = set()
    while marked:
        pid = marked.pop()
        if pid not in found:
            found.add(pid)
            marked += children.get(pid, [])
    return found


if __name__ == "__main__":
    keep(int(sys.argv[1]), sys.argv[2], sys.argv[3])
