"""What the batches of each sampler do to accuracy, and how much simulated time they take under stragglers.

Trains the uncut model on exactly the examples that each step of a plan names. The integration tests show that the split
run gives the same weights; here the whole batch takes one forward pass, which makes three seeds affordable.

    python tests/bench/bench_learning.py --dataset fashion-mnist --data-path FOLDER --out results.jsonl
    python tests/bench/bench_learning.py --table results.jsonl

Finished runs are not run again, so an interrupted call goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from psl_flower.app.datasets import SPECS, load_arrays
from psl_flower.app.images import ImageSet
from psl_flower.experiments.schedule import fill_plan
from psl_flower.metrics import batch_deviation
from psl_flower.partition.split import extended_dirichlet_split
from psl_flower.samplers.base import Population
from psl_flower.samplers.registry import make_sampler
from psl_flower.stragglers import SlowFractionDelays, step_times

# name: (sampler, options)
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "centralised": ("", {}),
    "UGS": ("ugs", {}),
    "FLS": ("fls", {}),
    "FPLS": ("fpls", {}),
    "LDS delta=1": ("lds", {"delta": 1.0}),
    "LDS delta=1 natural": ("lds", {"delta": 1.0, "order": "natural"}),
    "LB": ("lb", {}),
    "Aligned random": ("aligned", {"targets": "random"}),
    "Aligned stratified": ("aligned", {"targets": "stratified"}),
    "Aligned tilt 0.1": ("aligned", {"targets": "stratified", "tilt": 0.1}),
    "Aligned tilt 0.3": ("aligned", {"targets": "stratified", "tilt": 0.3}),
}
EVALUATIONS = 2  # an epoch


def small_cnn(channels: int, num_classes: int, side: int, seed: int) -> nn.Module:
    """Return a CNN of two strided convolutions: a step takes some 20 ms on one core."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        stem = [nn.Conv2d(channels, 16, 5, stride=2, padding=2), nn.GroupNorm(4, 16), nn.ReLU()]
        body = [nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten()]
        width = 32 * (-(-side // 4)) ** 2
        return nn.Sequential(*stem, *body, nn.Linear(width, 64), nn.ReLU(), nn.Linear(64, num_classes))


def slow_class_holders(shares: list[np.ndarray], labels: np.ndarray, classes: tuple[int, ...]) -> np.ndarray:
    """Return who holds any example of `classes`."""
    return np.array([np.isin(labels[rows], classes).any() for rows in shares])


def train(name: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train once and return the curve: epochs, steps, simulated seconds and accuracy at each evaluation."""
    spec = SPECS[options.dataset]
    source = load_arrays(options.dataset, "train", options.data_path)
    rng = np.random.default_rng([seed, 11])
    used = rng.permutation(len(source[1]))[: options.examples]
    labels = np.asarray(source[1])[used]
    data = ImageSet(*source, mean=spec.mean, std=spec.std, indices=used)
    test = ImageSet(*load_arrays(options.dataset, "test", options.data_path), mean=spec.mean, std=spec.std)
    shares = extended_dirichlet_split(labels, options.clients, 2, 3.0, rng)
    counts = np.stack([np.bincount(labels[rows], minlength=spec.num_classes) for rows in shares])
    ids = np.arange(options.clients)
    delays = SlowFractionDelays(seed=seed).delays(ids)
    if options.worst_case:  # the stragglers are all holders of two classes
        slow = slow_class_holders(shares, labels, (0, 1))
        delays = type(delays)(np.where(slow, 10.0, 1.0), np.zeros(len(ids)))
    population = Population(ids, counts.sum(axis=1), counts, delays)
    sampler, extra = RUNS[name]

    model = small_cnn(spec.shape[0], spec.num_classes, spec.shape[-1], seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=options.learning_rate, momentum=0.9)
    curve, deviations, seconds, steps = [], [], 0.0, 0
    pooled = np.bincount(labels, minlength=spec.num_classes)
    for epoch in range(options.epochs):
        if sampler:
            plan = make_sampler(sampler, options.batch_size, seed, **extra).plan(population, epoch)
            schedule, times = fill_plan(plan, shares, labels, seed=seed, epoch=epoch), step_times(plan)
            batches = np.split(schedule.rows, schedule.bounds()[1:-1])
        else:
            order = np.random.default_rng([seed, epoch]).permutation(len(labels))
            batches = np.array_split(order, -(-len(order) // options.batch_size))
            times = np.zeros(len(batches))
        evaluate_at = set(np.linspace(0, len(batches), EVALUATIONS + 1).round().astype(int)[1:] - 1)
        deviations += [np.bincount(labels[b], minlength=spec.num_classes) for b in batches]
        for i, batch in enumerate(batches):
            x, y = data.get_batch(batch)
            model.train()
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            seconds += float(times[i])
            steps += 1
            if i in evaluate_at:
                curve.append((epoch + (i + 1) / len(batches), steps, seconds, accuracy(model, test)))
    deviation = batch_deviation(np.stack(deviations), pooled)
    return {
        "name": name,
        "seed": seed,
        "worst_case": options.worst_case,
        "curve": curve,
        "deviation_mean": float(deviation.mean()),
        "deviation_p95": float(np.percentile(deviation, 95)),
        "steps": steps,
        "seconds": seconds,
    }


@torch.inference_mode()
def accuracy(model: torch.nn.Module, test: ImageSet) -> float:
    model.eval()
    parts = np.array_split(np.arange(len(test)), -(-len(test) // 1000))
    right = 0
    for part in parts:
        x, y = test.get_batch(part)
        right += int((model(x).argmax(1) == y).sum())
    return right / len(test)


def table(path: Path, worst_case: bool) -> None:
    """Print the runs of a file, each against UGS of the same seed."""
    rows = [r for r in map(json.loads, path.read_text().splitlines()) if r["worst_case"] == worst_case]
    by = {(r["name"], r["seed"]): r for r in rows}
    heads = f"{'sampler':22} {'seeds':>5} {'accuracy %':>14} {'- UGS':>14} {'time':>6} {'dev mean / p95':>14}"
    print(f"{heads} {'time to UGS - 0.5':>18}")
    for name in RUNS:
        runs = [r for r in rows if r["name"] == name]
        if not runs:
            continue
        late, gaps, times, reach = [], [], [], []
        for run in runs:
            late.append(100 * np.mean([c[3] for c in run["curve"][-3 * EVALUATIONS :]]))
            ugs = by.get(("UGS", run["seed"]))
            if ugs is None:
                continue
            gaps.append(late[-1] - 100 * np.mean([c[3] for c in ugs["curve"][-3 * EVALUATIONS :]]))
            times.append(run["seconds"] / ugs["seconds"])
            goal = np.mean([c[3] for c in ugs["curve"][-EVALUATIONS:]]) - 0.005
            first = next((c[2] for c in run["curve"] if c[3] >= goal), None)
            ugs_first = next(c[2] for c in ugs["curve"] if c[3] >= goal)
            reach.append(None if first is None else first / ugs_first)
        reached = " ".join("never" if x is None else f"{x:.2f}" for x in reach)
        mean, p95 = (np.mean([r[f"deviation_{k}"] for r in runs]) for k in ("mean", "p95"))
        scores = f"{np.mean(late):7.2f} ± {np.std(late):4.2f} {np.mean(gaps):+7.2f} ± {np.std(gaps):4.2f}"
        print(f"{name:22} {len(runs):5d} {scores} {np.mean(times):6.3f} {f'{mean:.3f} / {p95:.3f}':>14} {reached:>18}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="digits", choices=list(SPECS))
    parser.add_argument("--data-path", default="")
    parser.add_argument("--examples", type=int, default=20_000)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=0.02)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", nargs="*", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("--worst-case", action="store_true", help="stragglers hold all of two classes")
    parser.add_argument("--out", type=Path, default=Path("results.jsonl"))
    parser.add_argument("--table", type=Path)
    options = parser.parse_args()
    if options.table:
        table(options.table, options.worst_case)
        return
    torch.set_num_threads(1)
    done = set()
    if options.out.exists():
        done = {(r["name"], r["seed"], r["worst_case"]) for r in map(json.loads, options.out.read_text().splitlines())}
    todo = [(n, s) for s in range(options.seeds) for n in options.runs if (n, s, options.worst_case) not in done]
    begin = time.monotonic()
    for i, (name, seed) in enumerate(todo):
        result = train(name, seed, options)
        with options.out.open("a") as file:
            file.write(json.dumps(result) + "\n")
        eta = (time.monotonic() - begin) / (i + 1) * (len(todo) - i - 1)
        print(
            f"{i + 1}/{len(todo)} {name} seed {seed}: {result['curve'][-1][3]:.4f}, ETA {eta / 60:.1f} min", flush=True
        )
    table(options.out, options.worst_case)


if __name__ == "__main__":
    main()
