"""The ServerApp of a simulation starts while another thread imports Ray: a module that is not whole is no Ray yet."""

import sys
from types import ModuleType

import pytest

from psl_flower.flower import cluster_host, outlives_messages


class InMemoryGrid:
    """Stands for that of Flower's simulation."""


InMemoryGrid.__module__ = "flwr.somewhere"


@pytest.mark.parametrize("whole", [False, True])
def test_ray_is_waited_for(monkeypatch, whole):
    ray = ModuleType("ray")
    monkeypatch.setitem(sys.modules, "ray", ray)
    if whole:
        ray.is_initialized = lambda: False
    assert cluster_host(InMemoryGrid(), patience=0.0) == ""
    assert not outlives_messages()


def test_two_machines_have_an_address(monkeypatch):
    ray = ModuleType("ray")
    ray.is_initialized, ray.nodes = (lambda: True), (lambda: [{"Alive": True}, {"Alive": True}])
    ray.util = ModuleType("ray.util")
    ray.util.get_node_ip_address = lambda: "fe80::1"
    monkeypatch.setitem(sys.modules, "ray", ray)
    assert cluster_host(InMemoryGrid()) == "[fe80::1]"
