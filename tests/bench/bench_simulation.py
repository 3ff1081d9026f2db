"""Steps of split learning in Flower's simulation against centralised ones of the same run.

    python tests/bench/bench_simulation.py [--clients 16 128 1000] [--steps 40] [--transport streams] [--profile FOLDER]

A run of the app ``tests/apps/cost`` through Flower, as a user has it: the default CNN, images of CIFAR-10's size, 128
examples a step. After each split step the ServerApp takes centralised ones on as many examples of the same data, with
one thread and with all, so that both see the same machine; medians are compared, and the ratio is to the faster. Then
what a step is made of, medians too: the server's parts of the model; the slowest client process of each exchange, by
its own clock; what exchanges took beyond that; planning; records; all else. At last, the seconds since ``flwr run``.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from steps import Table, prepared, ray_seconds, run

from psl_flower.app.local import LocalSuperLink


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--clients", type=int, nargs="*", default=[16, 128, 1000])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--transport", default="streams")
    parser.add_argument("--no-shared-memory", action="store_true")
    parser.add_argument("--profile", default="", help="folder for profiles of the ServerApp's main thread")
    options = parser.parse_args()
    os.environ.pop("OMP_NUM_THREADS", None)  # each process as many as a user has
    with tempfile.TemporaryDirectory() as folder, prepared(LocalSuperLink(Path(folder) / "home", folder)) as link:
        table = Table("simulation", **{"Ray's own start": f"{ray_seconds():.1f} s"})
        for count in options.clients:
            profile = str(Path(options.profile).resolve() / f"{count}.pstats") if options.profile else ""
            table.add(
                run(
                    link,
                    "cost",
                    num_supernodes=count,
                    transport=options.transport,
                    shared_memory=not options.no_shared_memory,
                    steps=options.steps,
                    profile=profile,
                )
            )


if __name__ == "__main__":
    main()
