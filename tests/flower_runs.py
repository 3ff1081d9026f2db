"""Runs of a Flower app that are interrupted: started, found among processes, stopped, and looked after."""

import json
import os
import re
import subprocess
import time
from pathlib import Path

from psl_flower.app.local import LocalSuperLink

TESTS = Path(__file__).parent
_LINK = "psl-local"  # what LocalSuperLink calls itself in its configuration
# Ray chooses its ports some time before it takes them: where another process is given one meanwhile, it does not start.
_RAY_FAILED = "The current node timed out during startup"


def prepared(link: LocalSuperLink) -> LocalSuperLink:
    """Let a link's processes import what tests share, each with one thread."""
    link.environment["PYTHONPATH"] = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    link.environment["OMP_NUM_THREADS"] = "1"
    return link


class FlowerRun:
    """A run that goes on by itself.

    Parameters
    ----------
    link : LocalSuperLink
        Started.
    app : str
        Name of a folder in tests/apps.
    config : str
        As ``flwr run -c`` takes it.
    num_supernodes : int, optional
        Of a simulation.
    """

    def __init__(self, link, app, config, num_supernodes=None):
        self._link = link
        self._before = set(processes(link.home))
        self._words = ["run", str(TESTS / "apps" / app), _LINK, "-c", config]
        if num_supernodes is not None:
            self._words += ["--federation-config", f"num-supernodes={num_supernodes} client-resources-num-cpus=1"]
        self._start()

    def _start(self):
        self.run_id = re.search(r"Successfully started run (\d+)", self._flwr(*self._words))[1]

    def _flwr(self, *words):
        done = subprocess.run(
            ["flwr", *words],
            env=self._link.environment,
            cwd=self._link.home,
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout

    def status(self):
        """Return Flower's word for how far it is."""
        listed = self._flwr("list", _LINK, "--run-id", self.run_id, "--format", "json")
        return json.loads(listed)["runs"][0]["status"]

    def output(self):
        """Return what it has logged."""
        return self._flwr("log", self.run_id, _LINK, "--show")

    def stop(self):
        """Stop it as a user does."""
        self._flwr("stop", self.run_id, _LINK)

    def signal_server(self, number):
        """Send a signal to the process that the ServerApp runs in."""
        (server,) = [
            pid for pid, name in self.processes().items() if "flwr-simulation" in name or "flwr-serverapp" in name
        ]
        os.kill(server, number)

    def processes(self):
        """Return its processes, with their command lines, by id: those since its start, but for Flower's servers."""
        found = processes(self._link.home).items()
        return {pid: name for pid, name in found if pid not in self._before and "/flower-super" not in name}

    def wait_for(self, path, seconds=240):
        """Wait until it has made a file; fail soon where it has ended without."""
        end, ask_at, restarted = time.monotonic() + seconds, time.monotonic() + 5, False
        while not path.exists():
            assert time.monotonic() < end, f"no {path.name} by run {self.run_id}:\n{self.output()[-9000:]}"
            time.sleep(0.05)
            if time.monotonic() < ask_at:
                continue
            ask_at = time.monotonic() + 5
            if "finished" in self.status():
                if not restarted and _RAY_FAILED in self.output():
                    restarted = True
                    self._start()
                else:  # Flower says so before its processes are gone
                    end = min(end, time.monotonic() + 30)

    def wait_until_gone(self, seconds=120):
        """Wait until no process of it is left."""
        wait_until(lambda: not self.processes(), seconds, lambda: f"the end of {self.processes()}")


def processes(home):
    """Return the living processes that know a FLWR_HOME; a zombie, which nobody may ever reap, is none."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state = (folder / "stat").read_text().rsplit(")", 1)[1].split()[0]
            if state != "Z" and f"FLWR_HOME={home}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ")[:200]
        except OSError:  # it ended meanwhile
            continue
    return found


def wait_until(condition, seconds, what):
    """Look again and again until a condition holds; fail after a long time."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} s for {what()}"
        time.sleep(0.05)
