"""What a run's time was spent on: every moment counts once, as what is innermost."""

import logging

import pytest

from psl_flower.failures import Failure, Kind
from psl_flower.protocol import Reply
from psl_flower.strategy import summary as summary_module
from psl_flower.strategy.summary import SPENT, RunSummary


class Clock:
    def __init__(self):
        self.now = 100.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(summary_module, "time", clock)
    return clock


def spent(summary):
    return {on: seconds for on, seconds in summary.report()["seconds"].items() if seconds}


REPLY = Reply(busy=2.0, seconds={1: 0.5, 2: 1.5})


def step(summary, clock, replies=(REPLY,)):
    """Spend 4 seconds on the server, and 3 on each exchange."""
    with summary.spending("server"):
        clock.now += 1
        for reply in replies:
            with summary.spending("wire"):
                clock.now += 3
            summary.exchanged(reply, 3.0, {1: 4, 2: 4})
        clock.now += 3


def test_every_moment_counts_once(clock):
    summary = RunSummary()
    with summary.spending("start"):
        clock.now += 7
    clock.now += 0.5
    step(summary, clock)
    with summary.spending("evaluation"):
        clock.now += 11
    clock.now += 0.25
    assert spent(summary) == {"start": 7, "server": 4, "clients": 2, "wire": 1, "evaluation": 11, "other": 0.75}
    assert sum(summary.seconds.values()) == clock.now - 100


def test_a_process_worked_at_most_as_long_as_it_was_waited_for(clock):
    summary = RunSummary()
    step(summary, clock, [Reply(busy=99.0)])
    assert spent(summary) == {"server": 4, "clients": 3}


def test_an_exchange_in_which_a_client_is_silent_is_no_matter_of_the_wire(clock):
    summary = RunSummary()
    kinds = (Kind.TIMEOUT, Kind.UNREACHABLE, Kind.SHAPE)
    step(summary, clock, [Reply(busy=2.0, failures={2: Failure(kind, "")}) for kind in kinds])
    assert spent(summary) == {"server": 4, "clients": 6, "waiting": 2, "wire": 1}


def test_a_joint_pass_is_not_divided_among_its_clients(clock):
    summary = RunSummary()
    step(summary, clock, [Reply(busy=2.0, seconds={1: 1.0, 2: 1.0}), Reply(busy=1.0, seconds={1: 1.0})])
    assert spent(summary)["clients"] == 3
    assert summary.client_seconds == {1: 2.0, 2: 1.0}


def test_what_came_to_nothing_was_waiting(clock):
    summary = RunSummary()
    step(summary, clock)
    before = summary.spent()
    step(summary, clock)
    summary.in_vain(before)
    assert spent(summary) == {"server": 4, "clients": 2, "wire": 1, "waiting": 7}


def test_an_error_ends_what_it_was_in(clock):
    summary = RunSummary()
    with pytest.raises(ZeroDivisionError), summary.spending("planning"):
        clock.now = 101.0 / 0
    with summary.spending("planning"):
        clock.now += 1
    clock.now += 2
    assert spent(summary) == {"planning": 1, "other": 2}


def test_what_matters_is_told_first(clock, caplog):
    caplog.set_level(logging.INFO, "flwr.psl_flower")
    summary = RunSummary()
    with summary.spending("planning"):
        clock.now += 0.1
    with summary.spending("start"):
        clock.now += 63
    step(summary, clock, [])
    summary.log()
    assert f"Time: 1:03 {SPENT['start']}, 0:04 {SPENT['server']}\n" in caplog.text
