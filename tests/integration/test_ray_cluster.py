"""A simulation on a Ray cluster of two machines, which are two network namespaces here, without any option set."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAD, WORKER = "10.231.77.1", "10.231.77.2"
RAY = str(Path(sys.executable).parent / "ray")
K = 4


def ip(words):
    subprocess.run(["ip", *words.split()], check=True, capture_output=True, text=True)


@pytest.fixture
def machines():
    """Two machines on one network, by address; a process that is started there stays there."""
    names = {HEAD: f"psl-{os.getpid()}-a", WORKER: f"psl-{os.getpid()}-b"}
    ends = {HEAD: f"pa{os.getpid()}", WORKER: f"pb{os.getpid()}"}
    with contextlib.ExitStack() as stack:
        for name in names.values():
            ip(f"netns add {name}")
            stack.callback(remove, name)
        ip(f"link add {ends[HEAD]} netns {names[HEAD]} type veth peer name {ends[WORKER]} netns {names[WORKER]}")
        for address, name in names.items():
            ip(f"-n {name} addr add {address}/24 dev {ends[address]}")
            for device in ("lo", ends[address]):
                ip(f"-n {name} link set {device} up")
        yield {address: ["ip", "netns", "exec", name] for address, name in names.items()}


def remove(namespace):
    """End what runs on a machine, and remove it."""
    pids = subprocess.run(["ip", "netns", "pids", namespace], check=True, capture_output=True, text=True).stdout
    for pid in map(int, pids.split()):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    ip(f"netns del {namespace}")


@pytest.mark.slow
@pytest.mark.flower
@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="network namespaces are root's, on Linux")
def test_clients_of_both_machines_train_over_streams(machines, tmp_path):
    # a folder of its own, and a short one for the paths of sockets: in a shared one every Ray would join this cluster
    folder = tempfile.mkdtemp()
    environment = os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1", "RAY_TMPDIR": folder}
    ray = ["--num-cpus", "1", "--node-ip-address"]
    for address, words in (
        (HEAD, ["--head", "--port", "6379", "--include-dashboard", "false"]),
        (WORKER, ["--address", f"{HEAD}:6379"]),
    ):
        command = [*machines[address], RAY, "start", *words, *ray, address]
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL, timeout=120)
    command = [*machines[HEAD], sys.executable, "-m", "psl_flower", "run", str(ROOT), "--num-supernodes", str(K)]
    settings = f"num-server-rounds=1 output-dir='{tmp_path}' transport='streams'"
    log = tmp_path / "log"
    with log.open("w") as output:
        run = subprocess.Popen(
            [*command, "-c", settings],
            env=environment | {"RAY_ADDRESS": f"{HEAD}:6379"},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    clients = set()
    end = time.monotonic() + 300
    while run.poll() is None and time.monotonic() < end:
        clients |= {
            address for address in machines if any("ClientAppActor" in name for name in names(machines[address]))
        }
        time.sleep(0.2)
    told = log.read_text()
    assert run.wait(0) == 0, told[-5000:]
    assert clients == {HEAD, WORKER}
    assert f"clients connect to this one's address in it, {HEAD}" in told
    assert "cannot connect" not in told, "the processes of one machine took over the clients of the other"
    assert (tmp_path / "model.safetensors").exists()


def names(machine):
    """Return the command lines of a machine's processes."""
    for pid in subprocess.run(["ip", "netns", "pids", machine[-1]], capture_output=True, text=True).stdout.split():
        with contextlib.suppress(OSError):  # it ended meanwhile
            yield Path(f"/proc/{pid}/cmdline").read_text()
