"""What a process keeps between messages: bounded, and never anything stale."""

import pytest

from psl_flower.client import process
from psl_flower.client.process import ContextCache, forget_runs, run_state


class Kept:
    """Stands in for the context of a step."""

    def __init__(self, size):
        self.size = size

    def num_bytes(self):
        return self.size


def work(who, step=1):
    return (("weights", step), who)


# --- what the stages of a step kept ----------------------------------------------------------------------------------
def test_what_was_kept_is_found_once():
    cache, kept = ContextCache(1000), Kept(40)
    cache.put(work("a"), kept)
    assert cache.pop(work("a")) is kept
    assert cache.pop(work("a")) is None
    assert len(cache) == 0


def test_other_work_is_not_found():
    cache, kept = ContextCache(1000), Kept(40)
    cache.put(work("a"), kept)
    assert cache.pop(work("b")) is None
    assert cache.pop(work("a", step=2)) is None
    assert cache.pop(work("a")) is kept


def test_all_work_of_a_step_is_kept():
    cache, kept = ContextCache(10_000), [Kept(40) for _ in range(3)]
    for who, each in zip("abc", kept, strict=True):
        cache.put(work(who), each)
    assert [cache.pop(work(who)) for who in "abc"] == kept


def test_the_latest_of_the_same_work_is_kept():
    cache, kept = ContextCache(100), Kept(40)
    cache.put(work("a"), Kept(40))
    cache.put(work("a"), kept)
    assert len(cache) == 1
    assert cache.pop(work("a")) is kept


def test_what_belongs_to_an_earlier_step_is_dropped():
    """Its next stage went to another process: it would sit there for ever."""
    cache = ContextCache(100)
    for who in "ab":
        cache.put(work(who), Kept(40))
    cache.put(work("c", step=2), Kept(40))
    assert len(cache) == 1
    assert cache.pop(work("a")) is None
    cache.put(work("d", step=2), Kept(40))  # and its bytes do not count any more
    assert len(cache) == 2


def test_the_oldest_make_room():
    cache = ContextCache(100)
    for who in "abc":
        cache.put(work(who), Kept(40))
    assert [cache.pop(work(who)) is not None for who in "abc"] == [False, True, True]


def test_renewing_makes_the_youngest():
    cache = ContextCache(100)
    for who in "aba":
        cache.put(work(who), Kept(40))
    cache.put(work("c"), Kept(40))
    assert [cache.pop(work(who)) is not None for who in "abc"] == [True, False, True]


def test_what_is_larger_than_the_cache_is_not_kept():
    cache = ContextCache(100)
    cache.put(work("a"), Kept(40))
    cache.put(work("b"), Kept(104))
    assert len(cache) == 0
    cache.put(work("a"), Kept(100))  # and its bytes do not count any more
    assert len(cache) == 1


# --- runs ------------------------------------------------------------------------------------------------------------
@pytest.fixture(autouse=True)
def _fresh_process():
    forget_runs()
    yield
    forget_runs()


def test_a_run_keeps_its_state_and_only_few_runs_are_kept():
    first = run_state(1)
    assert run_state(1) is first
    run_state(2)
    assert run_state(1) is first  # used last
    run_state(3)
    assert run_state(1) is first
    assert run_state(2) is not None
    assert len(process._runs) == 2
    forget_runs()
    assert run_state(1) is not first
