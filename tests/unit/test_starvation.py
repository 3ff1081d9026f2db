"""Which schedules starve classes: those that keep one away for long, or too often; never uniform sampling."""

import numpy as np
import pytest

from psl_flower.errors import ConfigError
from psl_flower.metrics.starvation import starved_classes


def batches(num_steps, num_classes=10, batch_size=128, seed=0):
    """Return class counts of batches drawn from balanced classes."""
    return np.random.default_rng(seed).multinomial(batch_size, np.full(num_classes, 1 / num_classes), size=num_steps)


@pytest.mark.parametrize("num_classes", [2, 10, 100])
@pytest.mark.parametrize("seed", range(5))
def test_random_batches_starve_nobody(num_classes, seed):
    assert starved_classes(batches(400, num_classes, seed=seed)) == []


def test_a_long_absence_starves_and_its_length_is_told():
    counts = batches(400)
    counts[100:150, 3] = 0
    (found,) = starved_classes(counts)
    assert found.label == 3
    assert 50 <= found.longest <= 62  # the windows of 20 at its edges hold up to a quarter of the usual
    assert found.scarce == pytest.approx(50 / 400, abs=0.03)
    assert str(found) == f"class 3 is (nearly) absent for {found.longest} steps in a row"


def test_a_short_absence_does_not():
    counts = batches(400)
    counts[100:110, 3] = 0
    assert starved_classes(counts) == []


def test_frequent_absence_starves_even_without_a_run():
    counts = batches(400, batch_size=256)
    counts[::2, [1, 7]] = 0
    found = starved_classes(counts)
    assert [each.label for each in found] == [1, 7]
    assert [each.longest for each in found] == [0, 0]
    assert found[0].scarce == pytest.approx(0.5, abs=0.04)
    assert str(found[1]) == f"class 7 is (nearly) absent in {found[1].scarce:.0%} of the steps"


def test_now_and_then_does_not():
    counts = batches(400)
    counts[::5, 1] = 0
    assert starved_classes(counts) == []


def test_rare_classes_are_judged_over_longer_stretches():
    counts = batches(2000, 100)  # 1.28 of each class a step
    assert starved_classes(counts) == []
    counts[500:800, 42] = 0
    assert [each.label for each in starved_classes(counts)] == [42]


def test_classes_too_rare_to_tell_and_absent_ones_are_left_out():
    counts = np.hstack((batches(100), np.zeros((100, 2), dtype=int)))
    counts[:7, 10] = 1  # seven examples in the first steps
    assert starved_classes(counts) == []


@pytest.mark.parametrize(
    ("counts", "message"),
    [([1, 2], "shape"), (np.zeros((0, 3)), "at least a step"), ([[1, 0], [0, 0]], "that of step 1 has none")],
)
def test_refuses_what_are_no_batches(counts, message):
    with pytest.raises(ConfigError, match=message):
        starved_classes(counts)
