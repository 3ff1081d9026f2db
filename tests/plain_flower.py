"""Run the default app by Flower's own commands, on any Flower that is allowed: simulation, or deployment."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from flower_runs import processes

from psl_flower.app.local import free_ports
from psl_flower.app.watchdog import stop_trees
from psl_flower.flower import has_one_address

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
NODES = 2


def _at(address):
    """Return the words that say where a program listens, since flwr 1.40."""
    host, port = address.split(":")
    return ["--host", host, "--port", port]


def deployment(home, environment):
    """Start a SuperLink and SuperNodes, and return the name of the connection to them."""
    fleet, server_app, control, *others = (f"127.0.0.1:{port}" for port in free_ports(3 + NODES))
    if has_one_address():
        asked, link = fleet, [*_at(fleet), "--control-api-address", control]
        own = [_at(each) for each in others]
    else:
        asked, link = control, ["--fleet-api-address", fleet, "--serverappio-api-address", server_app]
        link += ["--control-api-address", control]
        own = [["--clientappio-api-address", each] for each in others]
    (home / "config.toml").write_text(f'[superlink.plain]\naddress = "{asked}"\ninsecure = true\n')
    commands = [["flower-superlink", "--insecure", *link]]
    for partition, words in enumerate(own):
        config = f"partition-id={partition} num-partitions={NODES}"
        commands += [["flower-supernode", "--insecure", "--superlink", fleet, *words, "--node-config", config]]
    for i, (program, *words) in enumerate(commands):
        with (home / f"{program}-{i}.log").open("wb") as log:
            subprocess.Popen(
                [BIN / program, *words], env=environment, cwd=home, stdout=log, stderr=log, start_new_session=True
            )  # the leader of a group, which stop_trees stops
    return "plain"


def main(kind):
    """Return the exit code: 0 if a round was trained."""
    with tempfile.TemporaryDirectory(prefix="psl-") as folder:
        home = Path(folder)
        path = os.pathsep.join([str(BIN), os.environ.get("PATH", "")])
        ours = {"FLWR_HOME": folder, "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1", "PATH": path}
        environment = os.environ | ours
        words = ["-c", f"num-server-rounds=1 output-dir='{folder}/out'"]
        try:
            if kind == "deployment":
                words.insert(0, deployment(home, environment))
            command = [BIN / "flwr", "run", ROOT, *words, "--stream"]
            end = time.monotonic() + 180  # until the SuperLink answers
            while subprocess.run(command, env=environment, check=False).returncode and time.monotonic() < end:
                time.sleep(5)
        finally:
            stop_trees(processes(folder))
        if (home / "out" / "model.safetensors").exists():
            print(f"A {kind} has trained.")
            return 0
        print(*(log.read_text(errors="replace")[-4000:] for log in home.glob("*.log")), sep="\n\n")
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
