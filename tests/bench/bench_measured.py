"""Two of eight clients really sleep 0.3 s a step, and the sampler is told nothing: does it find out, and save time?

Over streams in the Ray simulation; seconds are real. UGS, which plans without delays, is the baseline of the same run.

    python tests/bench/bench_measured.py
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

from psl_flower.app.local import LocalSuperLink

TESTS = Path(__file__).parents[1]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        superlink = LocalSuperLink(Path(folder) / "home", folder)
        superlink.environment["PYTHONPATH"] = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
        path = Path(folder) / "out.json"
        with superlink:
            superlink.run(TESTS / "apps" / "measured", num_supernodes=8, run_config=[f"out='{path}'"], quiet=True)
        outcome = json.loads(path.read_text())
    base = outcome["UniformGlobalSampler"]
    for name, row in outcome.items():
        seconds = "  ".join(f"{s:6.2f}" for s in row["seconds"])
        ratios = "  ".join(f"{s / b:.2f}" for s, b in zip(row["seconds"], base["seconds"], strict=True))
        print(f"{name:22} {row['steps']} steps an epoch; seconds of each epoch: {seconds}; against UGS: {ratios}")
        print(f"{'':22} estimated latency of clients 0 to 7 (2 and 5 sleep 0.3 s): {row['latency']}")


if __name__ == "__main__":
    main()
