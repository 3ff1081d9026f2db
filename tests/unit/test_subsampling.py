"""What steps of examples drawn by chance give away, against the definition, closed forms and another accountant."""

import math

import numpy as np
import pytest
from scipy import optimize, special, stats

from psl_flower.errors import ConfigError
from psl_flower.privacy import DPSGD, accounting
from psl_flower.privacy.subsampling import _ORDERS, _moments, epsilon_of_steps, noise_for_steps

# Of dp-accounting 0.6.0: what its RdpAccountant says, from the same divergences at other orders, and its PLDAccountant,
# which is nearly exact: (noise, rate, steps, delta, RDP's epsilon, PLD's).
OTHERS = [
    (1.1, 256 / 60_000, 14_100, 1e-5, 2.600343, 2.385211),
    (1.0, 0.01, 1_000, 1e-5, 2.101367, 1.828244),
    (2.0, 256 / 1_437, 120, 1e-5, 5.329536, 4.871120),
    (0.7, 0.04, 250, 1e-5, 10.812889, 9.457281),
    (4.0, 0.1, 100, 1e-4, 0.917881, 0.815356),
    (0.6, 0.5, 4, 1e-5, 15.766370, 14.388971),
]


@pytest.mark.parametrize(("noise", "rate", "steps", "delta", "rdp", "least"), OTHERS)
def test_other_accountants_say_the_same(noise, rate, steps, delta, rdp, least):
    found = epsilon_of_steps(noise, {rate: steps}, delta)
    assert least < found <= rdp * (1 + 1e-6)
    assert found > 0.99 * rdp


@pytest.mark.parametrize(("noise", "rate"), [(0.5, 0.3), (1.0, 0.01), (3.0, 0.9), (0.8, 1.0)])
def test_divergences_of_whole_orders_are_the_closed_form(noise, rate):
    """Mironov et al. 2019, section 3.3: a binomial sum."""
    found = _moments(noise, rate)
    for order in (2, 5, 20, 64):
        k = np.arange(order + 1)
        of_k = special.gammaln(order + 1) - special.gammaln(k + 1) - special.gammaln(order - k + 1)
        of_k += k * math.log(rate) + special.xlog1py(order - k, -rate) + (k * k - k) / (2 * noise**2)
        at = int(np.argmin(abs(_ORDERS - order)))
        assert _ORDERS[at] == pytest.approx(order)
        assert found[at] == pytest.approx(special.logsumexp(of_k), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(("noise", "rate"), [(0.7, 0.1), (1.0, 0.3), (2.0, 0.05)])
def test_no_step_gives_away_more_than_is_said(noise, rate):
    """The definition, for one step: the largest difference in probability of any event, either way."""

    def delta_of(epsilon):
        def at(z):  # log of P over Q
            return np.logaddexp(math.log1p(-rate), math.log(rate) + (2 * z - 1) / (2 * noise**2))

        def tail(z, *, shifted):
            return stats.norm.sf(z, loc=shifted, scale=noise)

        more = optimize.brentq(lambda z: at(z) - epsilon, -50, 1000)  # P above e^epsilon Q beyond it
        found = [(1 - rate) * tail(more, shifted=0) + rate * tail(more, shifted=1)]
        found[0] -= math.exp(epsilon) * tail(more, shifted=0)
        if -epsilon > math.log1p(-rate):  # Q above e^epsilon P before it
            less = optimize.brentq(lambda z: at(z) + epsilon, -200, 50)
            q, p = (1 - tail(less, shifted=s) for s in (0, 1))
            found.append(q - math.exp(epsilon) * ((1 - rate) * q + rate * p))
        return max(found)

    delta = 1e-5
    exact = optimize.brentq(lambda e: delta_of(e) - delta, 1e-3, 60)
    found = epsilon_of_steps(noise, {rate: 1}, delta)
    assert exact <= found < 2 * exact + 0.05


def test_chance_gives_away_less_than_each_example_once_a_round():
    """The same noise, batches and rounds, with and without it."""
    once, drawn = (DPSGD(clip=1.0, noise=2.0, batch_size=64, examples=n) for n in (None, 1437))
    assert drawn.steps(5) == {64 / 1437: 115}
    assert drawn.epsilon(5) < 0.4 * once.epsilon(5)
    assert once.epsilon(5) == accounting.epsilon(2.0, 5, 1e-5)
    rates = [epsilon_of_steps(2.0, {rate: 100}, 1e-5) for rate in (0.01, 0.1, 0.5, 1.0)]
    assert rates == sorted(rates)
    assert rates[-1] >= accounting.epsilon(2.0, 100, 1e-5)


def test_steps_of_several_rates_add_up():
    apart = epsilon_of_steps(1.5, {0.1: 30, 0.2: 20}, 1e-5)
    assert epsilon_of_steps(1.5, {0.1: 50}, 1e-5) < apart < epsilon_of_steps(1.5, {0.2: 50}, 1e-5)
    assert epsilon_of_steps(1.5, {}, 1e-5) == 0
    assert epsilon_of_steps(0.0, {0.1: 1}, 1e-5) == math.inf


@pytest.mark.parametrize("target", [0.5, 8.0])
def test_noise_is_found_for_an_epsilon(target):
    private = DPSGD.for_epsilon(target, rounds=10, clip=1.0, batch_size=100, examples=1_000)
    assert private.examples == 1_000
    assert 0.999 * target < private.epsilon(10) <= target
    assert private.noise == round(private.noise, 4)
    assert private.noise < DPSGD.for_epsilon(target, rounds=10, clip=1.0, batch_size=100).noise


def test_what_no_noise_can_promise_is_refused():
    with pytest.raises(ConfigError, match=r"no noise keeps 10 steps within epsilon 1e-06 and delta 1e-12: allow more"):
        noise_for_steps(1e-6, 10, 1.0, 1e-12)
    with pytest.raises(ConfigError, match="examples must be at least 100"):
        DPSGD(clip=1.0, noise=1.0, batch_size=100, examples=99)
