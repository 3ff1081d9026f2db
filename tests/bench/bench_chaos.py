"""Chaos at length: runs drawn from seeds (tests/mayhem); then deployments whose nodes are killed and frozen.

    python tests/bench/bench_chaos.py --seed 0 --epochs 1000    in one process; `make chaos SEED=0 EPOCHS=1000`
    python tests/bench/bench_chaos.py --deployment 4            SuperLink and 4 SuperNodes
    python tests/bench/bench_chaos.py --deployment 2 --transport messages

What must hold is asserted: the run ends, every example of every client is used exactly once an epoch, what is refused
is what was injected, the model is that of the committed steps. Prints what happened, and whether memory, threads and
open files are as they were.
"""

import argparse
import gc
import json
import logging
import os
import sys
import tempfile
import threading
import time
from collections import Counter
from itertools import count
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "integration")]

WARM_UP = 60  # epochs, after which nothing more should be taken


def held():
    """Return what this process holds: memory in MB, threads, open files."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6, threading.active_count(), len(os.listdir("/proc/self/fd"))


def in_one_process(seed, epochs):
    """Play the scenarios from a seed on until there were so many epochs, and print what happened in them."""
    from mayhem import play_until

    logging.getLogger("flwr").setLevel(logging.CRITICAL)
    seeds, begin = count(seed), time.monotonic()
    done, runs, found = play_until(seeds, min(WARM_UP, epochs))
    before = held()
    if done < epochs:
        more = play_until(seeds, epochs - done)
        done, runs, found = (one + other for one, other in zip((done, runs, found), more, strict=True))
    print(f"{done} epochs, seeds {seed} to {next(seeds) - 1}, in {time.monotonic() - begin:.0f} s; all survived")
    print("epochs:", ", ".join(f"{what} {n}" for what, n in sorted(runs.items())))
    print("what happened:", ", ".join(f"{what} {n}" for what, n in sorted(found.items()) if n))
    print("MB, threads, open files after {} epochs: {:.0f}, {}, {}".format(min(WARM_UP, epochs), *before), end="; ")
    print("at the end: {:.0f}, {}, {}".format(*held()))


def in_deployment(num_nodes, transport, seed, seconds):
    """Freeze, kill and restart SuperNodes while a run goes on whose clients fail, too."""
    from flower_runs import FlowerRun, prepared, wait_until
    from supernodes import FragileDeployment
    from test_chaos_flower import assert_used_once

    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        results = folder / "results"
        results.mkdir()
        deployment = prepared(FragileDeployment(folder / "home", num_nodes, folder))
        with deployment:
            config = f"results='{results}' transport='{transport}' share=0.05 deaths=2 step-timeout={seconds}"
            config += " patience=300.0 rounds=3"
            run, begin, done = FlowerRun(deployment, "chaos", config), time.monotonic(), Counter()
            over, drawn = results / "committed.json", results / "drawn"
            while not over.exists():
                what, node = str(rng.choice(["restart", "freeze"])), int(rng.integers(num_nodes))
                # the next disturbance comes when there was progress since the last
                enough = (len(list(drawn.iterdir())) if drawn.exists() else 0) + int(rng.integers(5, 40))
                wait_until(lambda n=enough: over.exists() or _reached(drawn, n), 400, run.output)
                if over.exists():
                    break
                if what == "restart":
                    deployment.restart(node)
                else:
                    deployment.freeze(node, float(rng.uniform(0.2, 1.5) * seconds))
                done[what] += 1
            run.wait_until_gone()
        summary = json.loads((results / "summary.json").read_text())
        refused = summary["refused"]
        assert_used_once(results, num_nodes)
        assert summary["examples_unseen"] == {}
        poisoned = len(list((results / "poisoned").iterdir()))
        # a reply that is not finite may be lost with its process
        assert 0 <= poisoned - refused.get("not finite", 0) <= done.total() + 2
        print(f"{num_nodes} SuperNodes over {transport}, seed {seed}: {dict(done)} in {time.monotonic() - begin:.0f} s")
        print(f"{poisoned} replies spoiled; refused {refused}; {summary['steps_redone']} attempts redone")
        print("every example used once in every epoch")


def _reached(folder, number):
    return folder.exists() and len(list(folder.iterdir())) >= number


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--seed", type=int, default=0, help="the first")
parser.add_argument("--epochs", type=int, default=60)
parser.add_argument("--deployment", type=int, default=0, help="number of SuperNodes")
parser.add_argument("--transport", default="streams", choices=("streams", "messages"))
parser.add_argument("--step-timeout", type=float, default=20.0)
options = parser.parse_args()
if options.deployment:
    in_deployment(options.deployment, options.transport, options.seed, options.step_timeout)
else:
    in_one_process(options.seed, options.epochs)
