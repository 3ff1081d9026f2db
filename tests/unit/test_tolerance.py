"""Who is left out until when, and when to give up."""

from itertools import pairwise

import pytest

from psl_flower.failures import Failure, Kind
from psl_flower.flower import ERROR_CLIENT_APP, error_kind
from psl_flower.strategy import tolerance
from psl_flower.strategy.summary import RunSummary
from psl_flower.strategy.tolerance import Backoff, Retries


def attempts(backoff, failing, number):
    """Return the attempts (0-based) that client 7 takes part in; it fails in those that `failing` says."""
    taken = []
    for attempt in range(number):
        out = backoff.left_out()
        backoff.next_attempt()
        if 7 in out:
            continue
        taken.append(attempt)
        (backoff.failed if failing(attempt) else backoff.succeeded)([7])
    return taken


def test_intervals_grow_twofold_to_a_limit():
    taken = attempts(Backoff(), lambda attempt: True, 600)
    gaps = [b - a - 1 for a, b in pairwise(taken)]
    assert gaps[:9] == [0, 1, 2, 4, 8, 16, 32, 64, 64]
    assert max(gaps) == 64


def test_a_success_forgets_failures():
    backoff = Backoff()
    assert attempts(backoff, lambda attempt: attempt in (0, 1, 4, 5), 9) == [0, 1, 3, 4, 5, 7, 8]
    assert backoff.failing() == set()


def test_others_are_not_left_out():
    backoff = Backoff()
    for _ in range(5):
        backoff.next_attempt()
        backoff.failed([1, 2])
        backoff.succeeded([3])
    assert backoff.left_out() == {1, 2}
    assert backoff.failing() == {1, 2}


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 100.0

        def monotonic(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(tolerance, "time", clock)
    return clock


def test_patience_is_counted_from_the_first_of_the_attempts_in_vain(clock):
    retries = Retries()
    waited = 0.0
    while not retries.exhausted(20.0):
        pause = retries.pause(20.0)
        assert 0 <= pause <= 5
        waited += pause
        clock.now += pause
    assert waited == pytest.approx(20.0)
    retries.succeeded()
    clock.now += 1000
    assert not retries.exhausted(20.0)


def test_without_patience_everyone_is_still_tried_thrice(clock):
    retries = Retries()
    assert [retries.exhausted(0.0) for _ in range(3)] == [False, False, True]
    assert retries.pause(0.0) == 0


def test_an_outage_is_nobodys_fault_and_a_mistake_somebodys():
    outages = {kind for kind in Kind if kind.is_outage}
    mistakes = {kind for kind in Kind if kind.is_mistake}
    assert outages == {Kind.TIMEOUT, Kind.UNREACHABLE}
    others = {Kind.UNREADABLE, Kind.LEFT_OUT, Kind.OUTLIER, Kind.KEY, Kind.RANGE}
    assert set(Kind) - outages - mistakes == others
    assert outages.isdisjoint(mistakes)


def test_an_error_reply_is_a_mistake_only_if_code_raised():
    assert error_kind(ERROR_CLIENT_APP).is_mistake
    assert all(error_kind(code).is_outage for code in (0, 3, 99))  # the node is gone, say


TIMEOUT, RAISED = Failure(Kind.TIMEOUT, "no reply within 5 s"), Failure(Kind.RAISED, "OSError: x")


def test_a_summary_goes_on_where_it_was():
    summary = RunSummary(steps_committed=3)
    summary.seconds["wire"] += 0.25
    summary.refuse({3: TIMEOUT, 12: RAISED})
    summary.refuse_in_evaluation({4: TIMEOUT})
    summary.examples_unseen.update({3: 10})
    summary.excluded[12] = "OSError: x"
    summary.client_seconds[12] += 0.5
    summary.client_examples[12] += 4
    other = RunSummary()
    for _ in range(2):  # what it had does not add up with what is loaded
        other.load_state_dict(summary.state_dict())
    assert other == summary
    other.refuse({3: TIMEOUT})
    assert other.refused == {"timeout": 2, "client error": 1}
    assert other.failures == {3: 2, 12: 1}
    assert other.slowest() == {12: 0.125}
