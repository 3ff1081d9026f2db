"""A run of pytest leaves no process and no temporary file, also when it is killed in the middle of a test."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from flower_runs import TESTS, processes, wait_until

SMALL = """
import subprocess, sys, tempfile, time
from pathlib import Path

from flower_runs import prepared
from psl_flower.app.local import LocalSuperLink


def test_that_is_not_let_finish():
    folder = Path({folder!r})
    with prepared(LocalSuperLink(folder / "home", folder)) as link:
        wait = [sys.executable, "-c", "import time; time.sleep(600)"]
        subprocess.Popen(wait, env=link.environment, start_new_session=True)  # of no group that anybody stops
        Path(tempfile.mkdtemp(), "file").touch()
        (folder / "new").write_text(tempfile.gettempdir())
        (folder / "new").rename(folder / "started")
        time.sleep(600)
"""


@pytest.mark.flower
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_what_a_test_has_started_ends_with_its_session(how, tmp_path):
    (tmp_path / "test_small.py").write_text(SMALL.format(folder=str(tmp_path)))
    command = [sys.executable, "-m", "pytest", "-p", "leftovers", "-p", "no:cacheprovider", "--rootdir", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])}
    started, log = tmp_path / "started", tmp_path / "log"
    with log.open("wb") as output:
        session = subprocess.Popen(
            [*command, str(tmp_path)],
            cwd=tmp_path,
            env=environment,
            stdout=output,
            stderr=output,
            stdin=subprocess.DEVNULL,
        )
    try:
        wait_until(lambda: started.exists() or session.poll() is not None, 120, log.read_text)
        assert session.poll() is None, log.read_text()
        folder = Path(started.read_text())
        assert len(processes(tmp_path / "home")) >= 2
        assert list(folder.glob("*/file"))
    finally:
        session.send_signal(how)
    session.wait()
    wait_until(
        lambda: not processes(tmp_path / "home") and not folder.exists(), 120, lambda: "the end of what it started"
    )
