"""Progress lines: how far, how long still, and not too often."""

import logging

import pytest

from psl_flower.strategy import progress
from psl_flower.strategy.progress import Progress, clock


@pytest.fixture
def lines(monkeypatch, caplog):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    caplog.set_level(logging.INFO, "flwr.psl_flower")

    def run(steps, num_rounds, seconds, first=0.0):
        report = Progress(num_rounds)
        now[0] += first  # connecting, loading
        for server_round in range(1, num_rounds + 1):
            for done in range(1, steps + 1):
                now[0] += seconds
                report.step(server_round, done, steps, 1.5, 0.25)
        return [record.getMessage() for record in caplog.records]

    return run


def test_who_looks_on_hears_when_there_is_a_line(lines, caplog):
    report = Progress(1)
    told = [report.step(1, done, 3, 1.5, 0.25) for done in (1, 2, 3)]
    assert told == [False, False, True]


def test_the_start_does_not_count(lines):
    assert lines(steps=10, num_rounds=2, seconds=1.0, first=1000.0) == [
        "round 1/2  step  6/10  loss 1.5000  accuracy 0.250  ETA 0:14",
        "round 1/2  step 10/10  loss 1.5000  accuracy 0.250  ETA 0:10",
        "round 2/2  step  5/10  loss 1.5000  accuracy 0.250  ETA 0:05",
        "round 2/2  step 10/10  loss 1.5000  accuracy 0.250  ETA 0:00",
    ]


def test_a_round_of_one_step_has_its_line(lines):
    assert lines(steps=1, num_rounds=1, seconds=0.1) == ["round 1/1  step 1/1  loss 1.5000  accuracy 0.250"]


def test_fast_steps_are_not_all_told(lines):
    assert len(lines(steps=1000, num_rounds=1, seconds=0.01)) == 2


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (61, "1:01"), (3600.4, "1:00:00"), (59.6, "1:00")])
def test_clock(seconds, text):
    assert clock(seconds) == text
