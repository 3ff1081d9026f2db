"""Epoch time and deviation of every sampler under stragglers, the lower bound, and what building a plan costs.

Run it as ``PYTHONPATH=tests python tests/bench/bench_delay_samplers.py [SEEDS [CLIENTS...]]`` (5 seeds, 64 and 128
clients by default): 50,000 examples of 10 classes in the severe split, batches of 128. For each delay model it prints
the epoch time relative to UGS, the mean batch deviation and the processor seconds of a plan (single-threaded, median
over seeds). The bound is for the targets of Aligned with random targets; the gap is how far that schedule is above it.
"""

import sys
import time

import numpy as np
from schedules import class_table, severe_population

from psl_flower.metrics import batch_deviation, schedule_lower_bound
from psl_flower.metrics.simulate import draw_class_counts
from psl_flower.samplers import make_sampler
from psl_flower.stragglers import step_times

BATCH_SIZE = 128
KINDS = ("latency 10 %", "latency 20 %", "per-sample 10 %", "lognormal")
SAMPLERS = {
    "UGS": ("ugs", {}),
    "FLS": ("fls", {}),
    "FPLS": ("fpls", {}),
    "LDS c=1 delta=1": ("lds", {"delta": 1.0}),
    "LDS c=0.1 delta=0.25": ("lds", {"delta": 0.25, "c": 0.1}),
    "LB greedy": ("lb", {"method": "greedy"}),
    "LB flow": ("lb", {"method": "flow"}),
    "LB auto": ("lb", {}),
    "Aligned random": ("aligned", {}),
    "Aligned stratified": ("aligned", {"targets": "stratified"}),
    "Aligned stratified tilt 0.1": ("aligned", {"targets": "stratified", "tilt": 0.1}),
    "Aligned stratified tilt 0.3": ("aligned", {"targets": "stratified", "tilt": 0.3}),
}


def measure(population, seed):
    """Return (time, deviation, processor seconds) by sampler, and the bound for Aligned's random targets."""
    results = {}
    for name, (kind, options) in SAMPLERS.items():
        sampler = make_sampler(kind, BATCH_SIZE, seed=seed, **options)
        begin = time.process_time()
        plan = sampler.plan(population)
        took = time.process_time() - begin
        classes = draw_class_counts(plan, np.random.default_rng(seed))
        deviation = batch_deviation(classes, population.label_counts.sum(axis=0)).mean()
        results[name] = step_times(plan).sum(), deviation, took
        if name == "Aligned random":
            bound = schedule_lower_bound(population, class_table(plan))
    return results, bound


def main():
    """Print the table."""
    num_seeds, *num_clients = (int(x) for x in sys.argv[1:]) if len(sys.argv) > 1 else (5,)
    for clients in num_clients or (64, 128):
        for kind in KINDS:
            runs = [measure(severe_population(clients, kind, seed), seed) for seed in range(num_seeds)]
            uniform = np.array([results["UGS"][0] for results, _ in runs])
            bounds = np.array([bound for _, bound in runs])
            aligned = np.array([results["Aligned random"][0] for results, _ in runs])
            print(
                f"\nK={clients}, {kind}: bound {np.mean(bounds / uniform):.3f}, Aligned random above its bound by "
                f"{np.mean(aligned / bounds) - 1:.1%} (at most {np.max(aligned / bounds) - 1:.1%})"
            )
            print(f"{'':28s}  time vs UGS (sd)  deviation  build s")
            for name in SAMPLERS:
                times, deviations, took = (np.array([results[name][i] for results, _ in runs]) for i in range(3))
                ratio = times / uniform
                print(
                    f"{name:28s}  {ratio.mean():11.3f} ({ratio.std():.2f})  {deviations.mean():9.3f}  "
                    f"{np.median(took):7.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
