"""Ctrl-C in a script: it ends at once, with the exit code of one, and what it leaves can be gone on from."""

import json
import signal
import subprocess
import sys
from pathlib import Path

from interrupted import train
from support import largest_difference

SCRIPT = Path(__file__).parents[1] / "interrupted.py"


def test_a_script_that_is_interrupted(tmp_path):
    command = [sys.executable, str(SCRIPT), str(tmp_path / "cut"), "100000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as script:
        assert script.stdout.readline() == "training\n"
        script.send_signal(signal.SIGINT)
        _, errors = script.communicate(timeout=240)
    assert script.returncode == -signal.SIGINT
    assert "KeyboardInterrupt" in errors
    assert json.loads((tmp_path / "cut" / "summary.json").read_text())["refused"] == {}
    resumed, whole = train(tmp_path / "cut", 12, resume_from="latest"), train(tmp_path / "whole", 12)
    assert largest_difference(resumed, whole) < 1e-5
