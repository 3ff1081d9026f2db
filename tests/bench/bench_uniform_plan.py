"""Time and peak memory of planning an epoch of many examples over many clients.

Run it as ``python tests/bench/bench_uniform_plan.py [N] [K] [B]`` (by default 1e7 examples, 1e5 clients, batches of
128). It prints, for every basic sampler, the processor seconds of a plan (single-threaded: its time on an idle
machine), their ratio to the floor of uniform sampling (one shuffle of N owners), and the peak memory of the process
that made it, less what it held before.
"""

import multiprocessing
import resource
import sys
import time

import numpy as np

from psl_flower import samplers

REPEATS = 5


def population(num_examples: int, num_clients: int) -> samplers.Population:
    """Return clients of nearly equal sizes, none empty."""
    rng = np.random.default_rng(0)
    sizes = 1 + rng.multinomial(num_examples - num_clients, np.full(num_clients, 1 / num_clients))
    return samplers.Population(np.arange(num_clients), sizes)


def peak_mib() -> float:
    """Return the peak resident memory of this process, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def measure(name: str, num_examples: int, num_clients: int, batch_size: int) -> tuple[float, float, str]:
    """Return the least processor seconds of a plan (or a shuffle alone), MiB above the start, and what was planned."""
    clients = population(num_examples, num_clients)
    before, seconds, result = peak_mib(), [], "uint32 owners"
    for epoch in range(REPEATS):
        if name == "shuffle":
            owners = np.repeat(np.arange(num_clients, dtype=np.uint32), clients.sizes)
            begin = time.process_time()
            np.random.default_rng(epoch).shuffle(owners)
        else:
            sampler = getattr(samplers, name)(batch_size)
            begin = time.process_time()
            result = repr(sampler.plan(clients, epoch))
        seconds.append(time.process_time() - begin)
    return min(seconds), peak_mib() - before, result


def main() -> None:
    """Measure each in a process of its own, so that peaks do not add up."""
    given = [int(float(argument)) for argument in sys.argv[1:4]]
    num_examples, num_clients, batch_size = given + [10_000_000, 100_000, 128][len(given) :]
    print(f"N = {num_examples:,}, K = {num_clients:,}, B = {batch_size}, least of {REPEATS}")
    floor = None
    for name in ("shuffle", "UniformGlobalSampler", "FixedLocalSampler", "FixedProportionalSampler"):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            seconds, mib, result = pool.apply(measure, (name, num_examples, num_clients, batch_size))
        floor = floor or seconds
        print(f"{name:26s} {seconds:7.3f} s  {seconds / floor:5.2f} x shuffle  {mib:7.0f} MiB  {result}")


if __name__ == "__main__":
    main()
