"""Norms far above all others are refused, whatever honest clients send is not."""

import numpy as np
import pytest
import torch

from psl_flower.exchange.outliers import SPREAD_OF_ROWS, NormBounds, row_norms, sum_norm


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def check(bounds, values, name="activations"):
    """Return who is refused, of a list of each sender's norms."""
    senders = np.repeat(np.arange(len(values)), [len(each) for each in values])
    return sorted(bounds.outliers(name, np.concatenate(values), senders, SPREAD_OF_ROWS))


def honest(rng, clients=8, rows=16):
    return [np.exp(rng.normal(size=rows) * 0.3) for _ in range(clients)]


@pytest.mark.parametrize("rows", ["one", "all"])
def test_whoever_sends_a_million_times_the_others_is_named_at_the_first_step(rng, rows):
    values = honest(rng)
    values[3][slice(None) if rows == "all" else slice(1)] *= 1e6
    assert check(NormBounds(10.0), values) == [3]


def test_one_of_two_is_named_by_what_both_have_sent_before(rng):
    bounds = NormBounds(10.0)
    values = honest(rng, clients=2)
    values[0] = values[0] * 1e6
    assert check(NormBounds(10.0), values) == []  # whose word counts is not to be told
    assert check(bounds, honest(rng, clients=2)) == []
    assert check(bounds, values) == [0]
    assert check(bounds, values) == [0]  # what was refused is not remembered


def test_several_are_named_and_one_does_not_hide_behind_another(rng):
    values = honest(rng)
    values[2] = values[2] * 1e6
    values[5] = values[5] * 1e12
    assert check(NormBounds(10.0), values) == [2, 5]


def test_what_most_do_is_the_model(rng):
    bounds = NormBounds(10.0)
    check(bounds, honest(rng))
    grown = [each * 1e6 for each in honest(rng)]
    assert check(bounds, grown) == []
    assert check(bounds, grown) == []


def test_infinite_norms_are_named_and_zeros_are_nothing(rng):
    values = honest(rng)
    values[1][0] = np.inf
    values[6][:] = 0.0
    assert check(NormBounds(10.0), values) == [1]
    assert check(NormBounds(10.0), [np.zeros(4)] * 4) == []


def test_the_bound_adapts_to_wide_distributions(rng):
    wide = [np.exp(rng.normal(size=64) * 3.0) for _ in range(8)]  # over ten orders of magnitude
    assert check(NormBounds(10.0), wide) == []


def test_skewed_scales_of_honest_clients_are_let_in(rng):
    """Each client's data have a unit of their own, up to 1 : 255 as of pictures not divided by 255."""
    bounds = NormBounds(10.0)
    for _ in range(50):
        values = honest(rng)
        values[0] = values[0] * 255
        assert check(bounds, values) == []


def test_norms_of_rows_and_sums():
    tensor = torch.arange(24.0).reshape(2, 3, 4)
    assert np.allclose(row_norms(tensor), [np.linalg.norm(np.arange(12)), np.linalg.norm(np.arange(12, 24))])
    assert np.isfinite(row_norms(torch.full((1, 4), 6e4, dtype=torch.float16))).all()
    assert sum_norm([torch.full((9,), 1e30), torch.zeros(2)])[0] == pytest.approx(3e30)
    assert sum_norm([]).tolist() == [0.0]


def test_what_is_usual_is_known_after_a_restart():
    before, after = NormBounds(10.0), NormBounds(10.0)
    for client in range(3):
        assert before.outliers("head", np.array([1.0 + client]), np.array([client]), 1.0) == {}
    after.load_state_dict(before.state_dict())
    assert after.knows("head")
    assert "far above" in after.outliers("head", np.array([1e30]), np.array([4]), 1.0)[4]
    assert NormBounds(10.0).outliers("head", np.array([1e30]), np.array([4]), 1.0) == {}
