"""Chaos at length: every sampler under many seeds, in one process; then deployments whose nodes are killed and frozen.

    python tests/bench/bench_chaos.py --seeds 20                in one process
    python tests/bench/bench_chaos.py --deployment 4            SuperLink and 4 SuperNodes
    python tests/bench/bench_chaos.py --deployment 2 --transport messages

What must hold is asserted: the run ends, every example of every client is used exactly once an epoch, what is refused
is what was injected. Prints what happened.
"""

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "integration")]


def _shown(counts):
    return ", ".join(f"{kind} {n}" for kind, n in counts.most_common())


def in_one_process(seeds):
    """Return how many faults there were, by kind."""
    import test_faults as chaos
    from faulty import FakeTime, RecordingRunner, assert_each_used_once

    from psl_flower.exchange import clients, messages
    from psl_flower.samplers.registry import SAMPLERS
    from psl_flower.strategy import run, tolerance
    from psl_flower.strategy import strategy as strategy_module

    clock = FakeTime()
    for module in (messages, clients, run, tolerance):
        module.time = clock
    strategy_module.StepRunner = RecordingRunner
    injected, ignored, replans, runs = Counter(), Counter(), 0, 0
    for seed in seeds:
        for name in SAMPLERS:
            with tempfile.TemporaryDirectory() as folder:
                grid = chaos.Flaky(seed, share=0.03 + 0.05 * (seed % 3))
                strategy = chaos.make(**chaos.options_for(name), output_dir=folder, patience=100.0)
                try:
                    chaos.start(strategy, grid, num_rounds=3)
                    assert_each_used_once(RecordingRunner.latest, chaos.K, 3)
                    summary = json.loads((Path(folder) / "summary.json").read_text())
                    assert summary["refused"] == +grid.injected, (summary["refused"], grid.injected)
                    assert summary["ignored"] == +grid.ignorable, (summary["ignored"], grid.ignorable)
                    assert summary["examples_unseen"] == {}
                except Exception:
                    print(f"sampler {name}, seed {seed}:", file=sys.stderr)
                    raise
            injected += grid.injected
            ignored += grid.ignorable
            replans, runs = replans + summary["replans"], runs + 1
    print(f"{runs} runs of 3 epochs: {injected.total()} faults refused {_shown(injected)}")
    print(f"ignored {_shown(ignored)}; {replans} plans made anew; every example used once in every epoch")


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
parser.add_argument("--seeds", type=int, default=5)
parser.add_argument("--first", type=int, default=0, help="the first seed")
parser.add_argument("--deployment", type=int, default=0, help="number of SuperNodes")
parser.add_argument("--transport", default="streams", choices=("streams", "messages"))
parser.add_argument("--step-timeout", type=float, default=20.0)
options = parser.parse_args()
if options.deployment:
    in_deployment(options.deployment, options.transport, options.first, options.step_timeout)
else:
    in_one_process(range(options.first, options.first + options.seeds))
