"""Kill -9 a training run at 20 random moments, resume it each time, and compare with an uninterrupted run.

    python tests/bench/bench_kill.py            one process that trains; its clients are in it
    python tests/bench/bench_kill.py --flower   the ServerApp's process of a Ray simulation, on a SuperLink

Prints how many kills hit, and how far the final weights are from those of the uninterrupted run.
"""

import argparse
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1]))

KILLS = 20


def in_one_process(folder: Path, kills: int) -> None:
    script = Path(__file__).parents[1] / "kill_resume.py"
    hits, begin = 0, 0
    while hits < kills:
        run = folder / str(begin)
        command = [sys.executable, str(script), str(run), "8", str(begin + 100)]
        hits += int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        whole, killed = (load_file(run / part / "model.safetensors") for part in ("whole", "killed"))
        equal = all(torch.equal(t, killed[n]) for n, t in whole.items())
        print(f"run {begin}: {hits} kills so far, final weights equal: {equal}")
        begin += 1
        if not equal:
            sys.exit(1)


def in_flower(folder: Path, kills: int, seed: int) -> None:
    """Kill runs that only go on from each other, at a random number of client passes after each has begun training."""
    from flower_runs import FlowerRun, prepared, wait_until
    from integration.test_shutdown_flower import K, finish
    from support import largest_difference

    from psl_flower.app.local import LocalSuperLink

    rng, results = np.random.default_rng(seed), folder / "results"
    results.mkdir()
    drawn = results / "drawn"

    def passes() -> int:
        return len(list(drawn.iterdir())) if drawn.exists() else 0

    # rounds enough for all kills: an interrupted run trains at most as long as it takes to make `most` new passes
    rounds, most = 5 * kills, 70
    config = (
        f"results='{results}' transport='streams' share=0.0 rounds={rounds} checkpoint-every=4 resume-from='latest'"
    )
    with prepared(LocalSuperLink(folder / "home", folder)) as link:
        for kill in range(kills):
            before = passes()
            run, after = FlowerRun(link, "chaos", config, K), int(rng.integers(1, most))
            wait_until(lambda before=before, after=after: passes() >= before + after, 120, run.output)
            run.signal_server(signal.SIGKILL)
            saved = sorted(path.name for path in (results / "checkpoints").glob("*"))
            print(f"kill {kill + 1}: {after} passes after it began; checkpoints {saved}", flush=True)
    resumed, whole = finish(results, rounds=rounds, resume_from="latest"), finish(folder / "whole", rounds=rounds)
    print(f"{kills} kills; largest difference of the final weights: {largest_difference(resumed, whole):.1e}")


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--flower", action="store_true", help="the ServerApp's process of a Ray simulation")
parser.add_argument("--kills", type=int, default=KILLS)
parser.add_argument("--seed", type=int, default=0)
options = parser.parse_args()
with tempfile.TemporaryDirectory() as name:
    if options.flower:
        in_flower(Path(name), options.kills, options.seed)
    else:
        in_one_process(Path(name), options.kills)
