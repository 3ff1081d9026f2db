"""How many threads torch gets, and from what."""

import os
import sys

import pytest
import torch

from psl_flower import threads
from psl_flower.app.local import LocalSuperLink
from psl_flower.errors import ConfigError
from psl_flower.threads import available_cores, set_threads


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """Eight cores, nothing set, no Ray; and torch's threads are put back."""
    monkeypatch.setattr(threads, "available_cores", lambda: 8)
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("policy", "simulation", "expected"), [("", False, 8), ("", True, 1), ("PASSIVE", True, 8)])
def test_all_cores_unless_waiting_threads_spin_where_clients_compute(monkeypatch, policy, simulation, expected):
    monkeypatch.setenv("OMP_WAIT_POLICY", policy)
    if simulation:
        monkeypatch.setitem(sys.modules, "ray", torch)
    assert set_threads() == torch.get_num_threads() == expected


def test_what_the_user_says_comes_first(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")  # torch has read it
    assert set_threads() == 3
    assert set_threads(2) == 2
    with pytest.raises(ConfigError, match="threads must be at least 0"):
        set_threads(-1)


def test_threads_that_spin_beside_clients_are_told(monkeypatch, caplog):
    caplog.set_level("WARNING", "flwr.psl_flower")
    monkeypatch.setattr(threads.log, "propagate", True)
    threads.warn_of_spinning()
    assert "with 3 threads" in caplog.text
    assert "set_threads()" in caplog.text
    caplog.clear()
    torch.set_num_threads(1)  # as set_threads does there
    threads.warn_of_spinning()
    torch.set_num_threads(3)
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    threads.warn_of_spinning()
    assert not caplog.text


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, []),
        ({"cpu.max": "max 100000\n"}, []),
        ({"cpu.max": "250000 100000\n"}, [2]),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, []),
        ({"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}, [0]),
    ],
)
def test_quotas_of_containers(tmp_path, files, expected):
    (tmp_path / "cpu").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert threads._quotas(tmp_path) == expected


def test_at_least_one_core(monkeypatch):
    monkeypatch.setattr(threads, "_quotas", lambda: [0])
    assert available_cores() == 1
    monkeypatch.setattr(threads, "_quotas", list)
    assert available_cores() == len(os.sched_getaffinity(0))


def test_apps_started_here_have_threads_that_sleep_while_they_wait(tmp_path, monkeypatch):
    assert LocalSuperLink(tmp_path).environment["OMP_WAIT_POLICY"] == "passive"
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    assert LocalSuperLink(tmp_path).environment["OMP_WAIT_POLICY"] == "active"
