"""Largest-remainder rounding: exact sums, shares kept, ties fair."""

import numpy as np
import pytest

from psl_flower.errors import ConfigError
from psl_flower.samplers import round_to_sum


@pytest.mark.parametrize("total", [0, 1, 7, 1000, 10**12])
@pytest.mark.parametrize(
    "weights", [[1], [1, 2, 3], [0, 5, 0, 1e-9], [1e300, 1e300], [1e-300, 2e-300], np.arange(1000)]
)
def test_sums_exactly_and_stays_within_one_of_the_share(weights, total):
    weights = np.asarray(weights, dtype=float)
    result = round_to_sum(weights, total, np.random.default_rng(0))
    assert result.dtype == np.int64
    assert result.sum() == total
    shares = weights / weights.max() / (weights / weights.max()).sum() * total
    assert (np.abs(result - shares) < 1 + 1e-6).all()
    assert not result[weights == 0].any()


def test_whole_shares_are_kept_as_they_are():
    weights = np.random.default_rng(0).multinomial(1000, np.full(37, 1 / 37))
    assert round_to_sum(weights, 1000, np.random.default_rng(0)).tolist() == weights.tolist()


def test_largest_fractions_are_rounded_up():
    # shares 0.5, 1.8, 2.7: two of the three get one more, never the first
    for seed in range(50):
        assert round_to_sum([0.5, 1.8, 2.7], 5, np.random.default_rng(seed)).tolist() == [0, 2, 3]


@pytest.mark.parametrize("weights", [[1, 1, 1, 1, 1], [0.1 + 0.2, 0.3, 0.3, 0.15 * 2, 0.3]])
def test_ties_are_broken_at_random_and_fairly(weights):
    rng = np.random.default_rng(0)
    counts = sum(round_to_sum(weights, 2, rng) for _ in range(5000))
    # each of five is rounded up with probability 2/5: 2000 times, standard deviation 35
    assert np.abs(counts - 2000).max() < 4 * 35


@pytest.mark.parametrize(
    ("weights", "total", "message"),
    [
        ([], 1, r"weights must be 1-D and not empty, got shape \(0,\)"),
        ([[1.0]], 1, r"weights must be 1-D and not empty, got shape \(1, 1\)"),
        ([1, -0.5], 1, "weights must be finite and not negative, got -0.5"),
        ([1, np.nan], 1, "weights must be finite and not negative, got nan"),
        ([1, np.inf], 1, "weights must be finite and not negative, got inf"),
        ([0, 0], 1, "weights must not all be 0"),
        ([1], -1, "total must be at least 0, got -1"),
        ([1], 1.5, "total must be a whole number, got 1.5"),
    ],
)
def test_refuses(weights, total, message):
    with pytest.raises(ConfigError, match=message):
        round_to_sum(weights, total, np.random.default_rng(0))
