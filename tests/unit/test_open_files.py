"""The limit of open files is raised where many connect, and named where the system allows too few."""

import logging

import pytest

from psl_flower.exchange.streams.open_files import make_room

resource = pytest.importorskip("resource")


@pytest.fixture
def limits(monkeypatch):
    held = {"now": (1024, 4096)}
    monkeypatch.setattr(resource, "getrlimit", lambda which: held["now"])
    monkeypatch.setattr(resource, "setrlimit", lambda which, limits: held.update(now=limits))
    return held


@pytest.mark.parametrize(
    ("before", "connections", "after", "warned"),
    [
        ((1024, 4096), 100, (1024, 4096), False),
        ((1024, 4096), 768, (1024, 4096), False),
        ((1024, 4096), 769, (1025, 4096), False),
        ((1024, 4096), 3840, (4096, 4096), False),
        ((1024, 4096), 10_000, (4096, 4096), True),
        ((1024, resource.RLIM_INFINITY), 10_000, (10_256, resource.RLIM_INFINITY), False),
        ((resource.RLIM_INFINITY, resource.RLIM_INFINITY), 10_000, (resource.RLIM_INFINITY,) * 2, False),
    ],
)
def test_as_many_files_as_connections_need(limits, before, connections, after, warned, caplog):
    limits["now"] = before
    with caplog.at_level(logging.WARNING, "flwr.psl_flower"):
        make_room(connections)
    assert limits["now"] == after
    text = "10000 clients connect, but this process may have only 4096 files open"
    assert (text in caplog.text) is warned
    assert ("LimitNOFILE of the service) to 10256" in caplog.text) is warned
