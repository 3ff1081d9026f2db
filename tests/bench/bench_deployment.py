"""Steps of split learning in a deployment of two SuperNodes on this machine, as `bench_simulation.py` has them.

python tests/bench/bench_deployment.py [--steps 40]
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from steps import Table, prepared, run

from psl_flower.app.deployment import LocalDeployment

SUPERNODES = 2


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    os.environ.pop("OMP_NUM_THREADS", None)
    table = Table("deployment")
    for shared_memory in (True, False):
        with (
            tempfile.TemporaryDirectory() as folder,
            prepared(LocalDeployment(Path(folder) / "home", SUPERNODES, folder)) as link,
        ):
            table.add(run(link, "cost", shared_memory=shared_memory, steps=options.steps))


if __name__ == "__main__":
    main()
