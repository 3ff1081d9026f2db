"""Everything fails and somebody lies; see tests/mayhem for what must hold, `make chaos` for more of it."""

from collections import Counter

import pytest
from mayhem import Scenario, play

from psl_flower.methods import METHODS

SHORT = range(8)
LONG = [range(begin, begin + 7) for begin in range(8, 50, 7)]  # of 3 epochs each


@pytest.mark.parametrize("seed", SHORT)
def test_chaos(seed, tmp_path):
    play(Scenario.draw(seed, epochs=2), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("seeds", LONG, ids=str)
def test_chaos_at_length(seeds, tmp_path):
    for seed in seeds:
        play(Scenario.draw(seed), tmp_path / str(seed))


def test_what_is_drawn_covers_every_method_carrier_and_lie():
    drawn = [Scenario.draw(seed) for seed in range(400)]
    assert {(s.method, s.transport) for s in drawn} == {(m, t) for m in METHODS for t in ("messages", "streams")}
    assert {s.stop[0] for s in drawn if s.stop} == {
        "server killed",
        "disk full at a checkpoint",
        "disk full at the metrics",
    }
    lies = Counter(s.lie[1] for s in drawn if s.lie)
    assert len(lies) == 8
    assert min(lies.values()) >= 5
    assert any(s.secure and s.lie for s in drawn)
