"""Run a Flower app on a SuperLink of its own, and leave nothing behind.

``flwr run .`` starts a local SuperLink that goes on running, keeps the environment it was first started with and shares
one home folder with every other app. This starts one on a free port with a home of its own, runs the app on it, and
stops it by its process id: what ``psl-flower run`` does.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Self

import typer

from psl_flower.app.dashboard import dashboard, with_logger
from psl_flower.app.preflight import check_run
from psl_flower.app.watchdog import Watchdog, stop_trees
from psl_flower.checks import writing_to
from psl_flower.colours import wanted
from psl_flower.threads import SLEEP_WHILE_WAITING

_START_TIMEOUT = 180.0  # seconds; on a busy machine importing Flower alone takes half a minute
_NAME = "psl-local"


class LocalSuperLink:
    """A SuperLink in simulation mode, as a process of ours; a context manager.

    Parameters
    ----------
    home : path
        Its FLWR_HOME: logs, installed apps. Made if it is not there.
    folder : path, optional
        Where it runs: relative paths in an app's configuration start here. Default: the current one.
    """

    def __init__(self, home: str | Path, folder: str | Path | None = None) -> None:
        self.home = Path(home).resolve()
        self._folder = Path(folder or ".").resolve()
        self._process: subprocess.Popen[bytes] | None = None
        self.watchdog: Watchdog | None = None  # while it runs
        # apps run in the environment at hand: Flower would install their dependencies anew for every run
        self.environment = {
            **SLEEP_WHILE_WAITING,
            # Ray gives its workers way to everything else: beside other work a step would wait for its clients
            "RAY_worker_niceness": "0",
            **os.environ,
            "FLWR_HOME": str(self.home),
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_TELEMETRY_ENABLED": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        }

    def start(self) -> Self:
        """Start it and wait until it answers."""
        self.home.mkdir(parents=True, exist_ok=True)
        port, control_port = free_ports(2)
        config = f'[superlink]\ndefault = "{_NAME}"\n\n[superlink.{_NAME}]\naddress = "127.0.0.1:{port}"\n'
        (self.home / "config.toml").write_text(config + self._connection_config(), encoding="utf-8")
        command = ["flower-superlink", *self._superlink_options(), "--isolation", "subprocess"]
        command += ["--host", "127.0.0.1", "--port", str(port), "--control-api-address", f"127.0.0.1:{control_port}"]
        self.watchdog = Watchdog()
        self._process = self._spawn(command, "superlink.log")
        try:
            self._wait_until_open(port)
            self._start_nodes(f"127.0.0.1:{port}")
        except BaseException:
            self.stop()
            raise
        return self

    def _spawn(self, command: Sequence[str], log_name: str, **environment: str) -> subprocess.Popen[bytes]:
        """Start a process that ends with this one, with a log in the home."""
        with (self.home / log_name).open("wb") as log:
            process = subprocess.Popen(
                command,
                cwd=self._folder,
                env={**environment, **self.environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for the launcher, which then stops it
            )
        if self.watchdog is not None:
            self.watchdog.watch(process)
        return process

    def _stop(self, *processes: subprocess.Popen[bytes]) -> None:
        """Stop processes and everything they started."""
        stop_trees([process.pid for process in processes])
        for process in processes:
            process.wait()
            if self.watchdog is not None:
                self.watchdog.forget(process)

    # --- what a deployment does otherwise ----------------------------------------------------------------------------
    def _superlink_options(self) -> list[str]:
        return ["--insecure", "--simulation"]

    def _connection_config(self) -> str:
        return "insecure = true\n"

    def _start_nodes(self, address: str) -> None:
        """Start what answers for the clients; in a simulation, the SuperLink does."""

    # --- running -----------------------------------------------------------------------------------------------------
    def _wait_until_open(self, port: int) -> None:
        end = time.monotonic() + _START_TIMEOUT
        while self._process is not None and self._process.poll() is None and time.monotonic() < end:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    return
            time.sleep(0.1)
        raise RuntimeError(f"the SuperLink did not start: see {self.home / 'superlink.log'}")

    def run(
        self, app: str | Path, *, num_supernodes: int | None = None, run_config: Sequence[str] = (), quiet: bool = False
    ) -> str:
        """Run an app to its end, with its log on standard output.

        Parameters
        ----------
        app : path
            The folder with the app's pyproject.toml.
        num_supernodes : int, optional
            Virtual clients.
        run_config : sequence of str
            Overrides as ``flwr run -c`` takes them.
        quiet : bool
            Do not print.

        Returns
        -------
        str
            All it printed.

        Raises
        ------
        RuntimeError
            If the run did not complete.
        """
        command = ["flwr", "run", str(Path(app).resolve()), _NAME, "--stream"]
        if num_supernodes is not None:
            command += ["--federation-config", f"num-supernodes={num_supernodes} client-resources-num-cpus=1"]
        if run_config:
            command += ["-c", " ".join(run_config)]
        lines = []
        with subprocess.Popen(
            command,
            cwd=self._folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process:
            try:
                for line in process.stdout or ():
                    lines.append(line)
                    if not quiet:
                        typer.echo(line, nl=False, color=wanted(sys.stdout))
            except BaseException:
                process.terminate()  # it only shows the log, and would for as long as the SuperLink has one
                raise
        output = "".join(lines)
        status = self._status(output)
        if process.returncode or status != "finished:completed":
            log = f":\n{output[-4000:]}" if quiet else ""  # else it stands above already
            code = f", flwr run with exit code {process.returncode}" if process.returncode else ""
            raise RuntimeError(f"the run ended with status {status!r}{code}{log}")
        return output

    def _status(self, output: str) -> str:
        """Return the status of the run that `output` tells of."""
        found = re.search(r"Successfully started run (\d+)", output)
        if found is None:
            return "not started"
        command = ["flwr", "list", _NAME, "--run-id", found[1], "--format", "json"]
        reply = subprocess.run(
            command, cwd=self._folder, env=self.environment, capture_output=True, text=True, check=False
        )
        try:
            return str(json.loads(reply.stdout)["runs"][0]["status"])
        except (ValueError, LookupError):
            return f"unknown ({(reply.stdout + reply.stderr)[-500:]})"

    def stop(self) -> None:
        """Stop it and everything it started."""
        if self._process is not None:
            self._stop(self._process)
            self._process = None
        if self.watchdog is not None:
            self.watchdog.close()
            self.watchdog = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()


def free_ports(count: int) -> list[int]:
    """Return distinct TCP ports that are free on loopback now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def run_app(
    app: Path,
    superlink: Callable[[Path], LocalSuperLink],
    num_supernodes: int,
    run_config: Sequence[str],
    home: Path | None,
    *,
    simulation: bool,
    with_dashboard: bool = False,
) -> int:
    """Run an app on what `superlink` makes of a home, a temporary one unless it is given; return the exit code.

    That is 0, 1 if the run failed, or 128 and the number of the signal that ended it.

    Raises
    ------
    ConfigError
        If a setting is refused; nothing is started then.
    """
    config = check_run(app, run_config, num_supernodes, simulation=simulation)
    if home is not None:
        with writing_to(home, "--home"):
            home.mkdir(parents=True, exist_ok=True)
    page: AbstractContextManager[object] = nullcontext()
    if with_dashboard:
        run_config = with_logger(config, run_config)
        page = dashboard(config["output-dir"], *free_ports(1))
    with ended_by_signals(), tempfile.TemporaryDirectory(prefix="psl-flower-") as temporary:
        try:
            with page, superlink(home or Path(temporary)) as running:
                if running.watchdog is not None:
                    running.watchdog.remove(temporary)
                running.run(app, num_supernodes=num_supernodes if simulation else None, run_config=run_config)
        except RuntimeError as error:
            print(error, file=sys.stderr)
            return 1
        except EndedBySignal as ended:
            return 128 + ended.number
    return 0


class EndedBySignal(BaseException):
    """Somebody wants this process to end.

    Parameters
    ----------
    number : int
        The signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Raise EndedBySignal inside where the system would end the process, so that it stops what it has started."""

    def end(number: int, frame: object) -> None:
        for each in before:
            signal.signal(each, signal.SIG_IGN)  # one is enough
        raise EndedBySignal(number)

    # SIGHUP: the terminal is closed; under nohup it is ignored, and stays so. Windows has none.
    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    before = {number: handler for number, handler in before.items() if handler != signal.SIG_IGN}
    for number in before:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
