"""What planning costs when clients fail: seconds, and what the batches look like.

Run it as ``python tests/bench/bench_replanning.py [K] [SAMPLER ...]`` (by default 1,000 clients and ugs, lds, lb and
aligned): 50,000 examples of ten classes, two classes a client, batches of 128, lognormal delays; no training, only the
epoch's ledger with made-up attempts. It prints, for every sampler and kind of faults, how often the rest of the epoch
was planned anew, processor seconds spent planning, their ratio to an epoch without faults, and what came of it: the
batches' deviation from the pooled classes, and how many were small. Then the same for planning anew whenever somebody
is lost or back, for the first kind of faults only: the others would take minutes.
"""

import sys
import time

import numpy as np

from psl_flower.metrics.deviation import batch_deviation
from psl_flower.samplers import Population
from psl_flower.samplers.registry import SAMPLERS
from psl_flower.stragglers import delay_model
from psl_flower.strategy.ledger import EpochLedger, part
from psl_flower.strategy.tolerance import Backoff

EXAMPLES, CLASSES, BATCH = 50_000, 10, 128


class Eager(EpochLedger):
    """Plans anew whenever the plan is not exactly what remains of the available clients."""

    def _replanning_pays(self, available):
        return (self._planned != np.where(available, self.remaining, 0)).any()


def make_population(num_clients):
    """Return clients of two classes each."""
    rng = np.random.default_rng(0)
    counts = np.zeros((num_clients, CLASSES), dtype=np.int64)
    for row in counts:
        row[rng.choice(CLASSES, 2, replace=False)] = rng.multinomial(EXAMPLES // num_clients, [0.5, 0.5])
    delays = delay_model("lognormal", seed=1)
    return Population(np.arange(num_clients), counts.sum(axis=1), counts, delays.delays(np.arange(num_clients)))


def nobody(rng, clients, attempt, num_clients):
    """Lose nobody."""
    return []


def one_in_twenty_steps(rng, clients, attempt, num_clients):
    """Lose a client from every twentieth step."""
    return [rng.choice(clients)] if rng.random() < 0.05 else []


def one_in_hundred(rng, clients, attempt, num_clients):
    """Lose every hundredth reply."""
    return clients[rng.random(len(clients)) < 0.01]


def dead(rng, clients, attempt, num_clients):
    """Lose one client in twenty for the first 300 attempts."""
    return clients[clients % 20 == 0] if attempt < 300 else []


def epoch(kind, sampler, population, faults):
    """Go through an epoch; return seconds of planning, plans made anew, and (steps, classes) of the batches."""
    rng, backoff, classes = np.random.default_rng(5), Backoff(), []
    unseen = {k: rng.permutation(np.repeat(np.arange(CLASSES), row)) for k, row in enumerate(population.label_counts)}
    seconds, begin = 0.0, time.process_time()
    ledger = kind(sampler, population, 0)
    seconds += time.process_time() - begin
    attempt = 0
    while len(unfinished := ledger.unfinished()):
        available = np.array([k for k in unfinished if k not in backoff.left_out()], dtype=np.int64)
        begin = time.process_time()
        step = ledger.step(available if len(available) else unfinished)
        seconds += time.process_time() - begin
        backoff.next_attempt()
        lost = set(np.asarray(faults(rng, step.clients, attempt, len(population))).tolist())
        attempt += 1
        came = {k: None for k in step.clients.tolist() if k not in lost}
        backoff.failed(lost)
        backoff.succeeded(came)
        if not came:
            continue
        step = part(step, came)
        labels = {}
        for i, (k, n) in enumerate(zip(step.clients.tolist(), step.quotas, strict=True)):
            if step.class_quotas is None:
                labels[k], unseen[k] = unseen[k][:n], unseen[k][n:]
            else:
                labels[k] = np.repeat(np.arange(CLASSES), step.class_quotas[i])
        ledger.done(step, labels)
        classes.append(np.bincount(np.concatenate(list(labels.values())), minlength=CLASSES))
    return seconds, ledger.replans, np.array(classes)


def main():
    """Print a line for every sampler and kind of faults."""
    population = make_population(int(sys.argv[1]) if len(sys.argv) > 1 else 1000)
    pooled = population.label_counts.sum(axis=0)

    def shown(seconds, replans, classes, than):
        deviation, small = batch_deviation(classes, pooled), int((classes.sum(axis=1) < BATCH / 2).sum())
        return (
            f"{replans} plans made anew, {seconds:.2f} s of planning, {seconds / than:.1f} x; "
            f"deviation mean {deviation.mean():.3f}, p95 {np.percentile(deviation, 95):.3f}, {small} small batches"
        )

    print(f"{len(population)} clients")
    for name in sys.argv[2:] or ["ugs", "lds", "lb", "aligned"]:
        sampler, once = SAMPLERS[name](BATCH, seed=0), None
        for faults in (nobody, one_in_twenty_steps, one_in_hundred, dead):
            found = epoch(EpochLedger, sampler, population, faults)
            once = once or found[0]
            print(f"{name}: {faults.__doc__}\n    {shown(*found, once)}", flush=True)
            if faults is one_in_twenty_steps:
                print(f"    at every loss: {shown(*epoch(Eager, sampler, population, faults), found[0])}", flush=True)


if __name__ == "__main__":
    main()
