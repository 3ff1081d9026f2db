"""Run the default app by plain ``flwr run``, on any Flower that is allowed, and stop the SuperLink it starts."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from flower_runs import processes

from psl_flower.app.watchdog import stop_trees

ROOT = Path(__file__).parents[1]


def main():
    """Return the exit code: 0 if a round was trained."""
    with tempfile.TemporaryDirectory(prefix="psl-") as home:
        here = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        surroundings = {"FLWR_HOME": home, "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1", "PATH": here}
        config = f"num-server-rounds=1 output-dir='{home}/out'"
        command = [Path(sys.executable).with_name("flwr"), "run", ROOT, "--stream", "-c", config]
        try:
            subprocess.run(command, env=os.environ | surroundings, check=True)
        finally:
            stop_trees(processes(home))
        return int(not (Path(home) / "out" / "model.safetensors").exists())


if __name__ == "__main__":
    sys.exit(main())
