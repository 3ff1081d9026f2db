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
    command = [sys.executable, "-m", "psl_flower.app.local", str(ROOT), "--num-supernodes", "2", "--home", str(home)]
    settings = f"num-server-rounds=100000 output-dir='{home / 'out'}'"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen([*command, "-c", settings], cwd=home.parent, **quiet)


def runs(home):
    names = " ".join(processes(home).values())
    return all(name in names for name in ("flower-superlink", "flwr-simulation", "raylet", "ray::"))


@pytest.mark.flower
def test_launchers_that_are_asked_to_end_or_killed_take_superlink_simulation_and_ray_with_them(tmp_path):
    launchers = {number: launched(tmp_path / number.name) for number in (signal.SIGTERM, signal.SIGKILL)}
    homes = [tmp_path / number.name for number in launchers]
    try:
        wait_until(lambda: all(map(runs, homes)), 240, lambda: f"Ray in {list(map(processes, homes))}")
    finally:
        for number, launcher in launchers.items():
            launcher.send_signal(number)
    wait_until(lambda: not any(map(processes, homes)), 20, lambda: f"the end of {list(map(processes, homes))}")
    codes = {number: launcher.wait(60) for number, launcher in launchers.items()}
    assert codes == {signal.SIGTERM: 128 + signal.SIGTERM, signal.SIGKILL: -signal.SIGKILL}
