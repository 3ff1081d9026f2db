"""The limit of open files is raised where many connect, and named where the system allows too few."""

import logging

import pytest

from psl_flower.exchange.streams import open_files
from psl_flower.exchange.streams.open_files import make_room, most_connections, most_memories

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
        ((1024, 4096), 672, (1024, 4096), False),
        ((1024, 4096), 673, (1026, 4096), False),
        ((1024, 4096), 3360, (4096, 4096), False),
        ((1024, 4096), 10_000, (4096, 4096), True),
        ((1024, resource.RLIM_INFINITY), 10_000, (11_280, resource.RLIM_INFINITY), False),
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
    assert ("LimitNOFILE of the service) to 11280" in caplog.text) is warned


@pytest.mark.parametrize(
    ("before", "after", "connections", "memories"),
    [
        ((1024, 4096), (4096, 4096), 3360, 120),
        ((1024, resource.RLIM_INFINITY), (65_536, resource.RLIM_INFINITY), 64_256, 256),
        ((100_000, 200_000), (100_000, 200_000), 98_720, 256),
        ((100, 100), (100, 100), 64, 0),
        ((resource.RLIM_INFINITY, resource.RLIM_INFINITY), (resource.RLIM_INFINITY,) * 2, 64_256, 256),
    ],
)
def test_connections_and_their_memories_leave_files_for_all_else(limits, before, after, connections, memories):
    limits["now"] = before
    assert most_connections() == connections
    assert most_memories() == memories
    assert limits["now"] == after
    assert connections == 64 or connections + open_files._OF_MEMORY * memories + 256 <= max(65_536, after[0])


@pytest.mark.parametrize("connections", [10, 672, 673, 5000, 7168, 7169, 60_000])
def test_room_is_made_for_as_many_as_connect(limits, connections, monkeypatch):
    monkeypatch.setattr(open_files, "_MOST_FILES", 0)  # nothing is raised without need
    limits["now"] = (300, 100_000)
    make_room(connections)
    assert connections <= most_connections() <= max(64, connections + 4)


def test_a_system_that_allows_fewer_than_it_says_keeps_its_limit(limits, monkeypatch):
    def refuse(which, wanted):
        raise ValueError("current limit exceeds maximum limit")

    monkeypatch.setattr(resource, "setrlimit", refuse)
    assert most_connections() == 1024 - 256 - 4 * 24
    assert limits["now"] == (1024, 4096)
