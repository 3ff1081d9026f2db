"""What a step costs over the message carrier on the Ray simulation: against a centralised step, and the engine's floor.

The floor is an echo: the same number of messages of the same size, twice a step, with clients that compute nothing. The
centralised step trains the same model on the same batches in one process. All are measured in one run, on one machine.

    python tests/bench/bench_messages.py [clients ...]
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

from psl_flower.app.local import LocalSuperLink

TESTS = Path(__file__).parents[1]


def main(counts: list[int]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        superlink = LocalSuperLink(Path(folder) / "home", folder)
        superlink.environment["PYTHONPATH"] = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
        print(f"{'clients':>8} {'active':>7} {'split ms':>9} {'echo ms':>8} {'central ms':>11}", end=" ")
        print(f"{'/ echo':>7} {'/ central':>10} {'KB sent':>8} {'KB back':>8}")
        with superlink:
            for count in counts:
                path = Path(folder) / f"{count}.json"
                superlink.run(TESTS / "apps" / "cost", num_supernodes=count, run_config=[f"out='{path}'"], quiet=True)
                row = json.loads(path.read_text())
                split, echo, central = (1000 * row[name] for name in ("split", "echo", "central"))
                print(f"{count:8d} {row['active']:7.1f} {split:9.1f} {echo:8.1f} {central:11.1f}", end=" ")
                print(f"{split / echo:7.2f} {split / central:10.1f}", end=" ")
                print(f"{row['sent'] / 1024:8.1f} {row['received'] / 1024:8.1f}", flush=True)


if __name__ == "__main__":
    main([int(arg) for arg in sys.argv[1:]] or [16, 128])
