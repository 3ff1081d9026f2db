"""Kill -9 a training run at 20 random moments, resume it each time, and compare with an uninterrupted run.

Prints how many kills hit, and whether the final weights are equal.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

with tempfile.TemporaryDirectory() as name:
    folder, script = Path(name), Path(__file__).parents[1] / "kill_resume.py"
    hits, begin = 0, 0
    while hits < 20:
        run = folder / str(begin)
        command = [sys.executable, str(script), str(run), "8", str(begin + 100)]
        hits += int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        whole, killed = (load_file(run / part / "model.safetensors") for part in ("whole", "killed"))
        equal = all(torch.equal(t, killed[n]) for n, t in whole.items())
        print(f"run {begin}: {hits} kills so far, final weights equal: {equal}")
        begin += 1
        if not equal:
            sys.exit(1)
