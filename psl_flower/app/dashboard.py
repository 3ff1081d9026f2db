"""TensorBoard beside a run, to look on: started with it, reached from this machine only, stopped with it.

A page of our own would have to draw, poll, zoom and be kept; TensorBoard does all that, is known to whoever trains, and
the run's logger for it is there already.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from psl_flower.app.watchdog import Watchdog, stop_trees
from psl_flower.callbacks.registry import check_loggers
from psl_flower.errors import ConfigError
from psl_flower.extras import check_extra

_LOGGER = "tensorboard"


def with_logger(config: dict[str, Any], run_config: Sequence[str]) -> list[str]:
    """Return a run's overrides, with the logger that the dashboard shows.

    Parameters
    ----------
    config : dict
        The app's configuration as it will be: its keys, with the overrides.
    run_config : sequence of str
        The overrides, as ``-c`` takes them.

    Raises
    ------
    ConfigError
        If TensorBoard is not installed, or the app or a file of overrides leaves no room for the logger.
    """
    check_extra(_LOGGER, _LOGGER, "--dashboard")
    if "loggers" not in config or "output-dir" not in config:
        raise ConfigError(
            "--dashboard shows what the logger 'tensorboard' writes, which this app's configuration has no keys for: "
            "give it loggers and output-dir, as the default app has them, or leave --dashboard out"
        )
    loggers = check_loggers(config["loggers"])
    if _LOGGER in loggers:
        return list(run_config)
    if any(text.endswith(".toml") for text in run_config):
        raise ConfigError(f'--dashboard needs loggers = "{",".join([*loggers, _LOGGER])}" in {run_config[0]}: add it')
    return [*run_config, f"loggers='{','.join([*loggers, _LOGGER])}'"]


@contextmanager
def dashboard(output_dir: str | Path, port: int) -> Iterator[str]:
    """Serve what a run writes, on loopback, and print the address once there is something to see.

    Parameters
    ----------
    output_dir : path
        The run's; it need not be there yet.
    port : int
        A free one.

    Yields
    ------
    str
        The address.
    """
    folder, url = Path(output_dir).resolve() / _LOGGER, f"http://127.0.0.1:{port}/#custom_scalars"
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder), "--host", "127.0.0.1"]
    command += ["--port", str(port), "--reload_interval", "2", "--window_title", "psl-flower"]
    over, nothing = threading.Event(), subprocess.DEVNULL
    with Watchdog() as watchdog:
        process = subprocess.Popen(command, stdin=nothing, stdout=nothing, stderr=nothing, start_new_session=True)
        watchdog.watch(process)
        teller = threading.Thread(target=_tell, args=(url, folder, process, over), daemon=True)
        teller.start()
        try:
            yield url
        finally:
            over.set()
            teller.join()
            stop_trees([process.pid])
            process.wait()
            watchdog.forget(process)
            print(f"To look at it again: tensorboard --logdir {folder}", flush=True)


def _tell(url: str, folder: Path, process: subprocess.Popen[bytes], over: threading.Event) -> None:
    """Print the address once there is something to see."""
    begin, port = time.time(), urlsplit(url).port
    while process.poll() is None and not over.wait(0.3):
        written = any(file.stat().st_mtime >= begin for file in folder.glob("events.*"))
        with socket.socket() as probe:
            if written and probe.connect_ex(("127.0.0.1", port)) == 0:
                print(
                    f"Dashboard: {url} (the round arrow loads what is new; who is slow and who failed: TEXT)",
                    flush=True,
                )
                return
    if not over.is_set():
        print(f"The dashboard has ended; the run goes on. To see why: tensorboard --logdir {folder}", flush=True)
