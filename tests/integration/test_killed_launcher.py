"""Nothing of a run lives on when its launcher ends, however it ends."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from flower_runs import processes, wait_until

ROOT = Path(__file__).parents[2]


def launched(home):
    """Start a long run of the default app."""
    command = [sys.executable, "-m", "psl_flower", "run", str(ROOT), "--num-supernodes", "2", "--home", str(home)]
    settings = f"num-server-rounds=100000 output-dir='{home / 'out'}'"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen([*command, "-c", settings], cwd=home.parent, **quiet)


def runs(home):
    names = " ".join(processes(home).values())
    return all(name in names for name in ("flower-superlink", "flwr-simulation", "raylet", "ray::"))


@pytest.mark.flower
@pytest.mark.parametrize(
    ("how", "code"),
    [
        (signal.SIGKILL, -signal.SIGKILL),
        pytest.param(signal.SIGTERM, 128 + signal.SIGTERM, marks=pytest.mark.slow),  # a launcher can do something then
    ],
)
def test_a_launcher_that_is_killed_or_asked_to_end_takes_superlink_simulation_and_ray_with_it(how, code, tmp_path):
    home = tmp_path / "home"
    launcher = launched(home)
    try:
        wait_until(lambda: runs(home), 240, lambda: f"Ray in {processes(home)}")
    finally:
        launcher.send_signal(how)
    wait_until(lambda: not processes(home), 120, lambda: f"the end of {processes(home)}")
    assert launcher.wait(120) == code
