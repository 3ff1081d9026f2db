"""Clients that move from one process to another, however many they are: the line to a process is short."""

from collections import Counter

import pytest

from psl_flower.exchange.frames import Frame
from psl_flower.exchange.streams import StreamCarrier
from psl_flower.exchange.streams.connection import Connection
from psl_flower.exchange.streams.under_way import Home


@pytest.fixture
def carrier():
    with StreamCarrier(grid=None) as carrier:
        yield carrier


def waiting(connection):
    """Return the headers of the frames on their way to a process that reads none of them."""
    return [job().header for job in connection._jobs]


def test_a_hundred_clients_move_in_one_frame(carrier):
    full, empty = Connection("full"), Connection("empty")
    carrier._homes = {node: Home(full, True, {"partition-id": node}) for node in range(200)}
    carrier._homes[200] = Home(empty, True, {"partition-id": 200})
    carrier._balance(set(carrier._homes))
    assert Counter(home.connection for home in carrier._homes.values()) == {full: 101, empty: 100}
    (header,) = waiting(empty)
    assert header["kind"] == "adopt"
    assert len(header["clients"]) == 99
    assert all(config == {"partition-id": node} for node, config in header["clients"])


def test_survivors_take_over_a_hundred_clients(carrier):
    dead, *survivors = (Connection(name) for name in "dab")
    carrier._homes = {node: Home(dead, True, {}) for node in range(200)}
    carrier._homes |= {200 + i: Home(each, True, {}) for i, each in enumerate(survivors)}
    dead.close("gone")
    carrier._lost(dead, "gone")
    assert Counter(home.connection for home in carrier._homes.values()) == dict.fromkeys(survivors, 101)
    assert [len(each._jobs) for each in survivors] == [1, 1]
    assert not carrier._homeless


def test_clients_stay_where_the_other_process_reads_nothing(carrier):
    full, stuck = Connection("full"), Connection("stuck")
    carrier._homes = {node: Home(full, True, {}) for node in range(4)}
    carrier._homes[4] = Home(stuck, True, {})
    while stuck.send(lambda: Frame({})):
        pass
    carrier._balance(set(carrier._homes))
    assert Counter(home.connection for home in carrier._homes.values()) == {full: 4, stuck: 1}
    full.close("gone")
    carrier._lost(full, "gone")
    assert set(carrier._homes) == {4}
    assert set(carrier._homeless) == {0, 1, 2, 3}
