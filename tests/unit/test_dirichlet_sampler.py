"""LDS: the EM, the draw, every known pitfall, and the trade-off that the method's experiments found."""

from functools import cache

import numpy as np
import pytest

from psl_flower.errors import ConfigError
from psl_flower.metrics.deviation import batch_deviation
from psl_flower.metrics.simulate import draw_class_counts
from psl_flower.partition import extended_dirichlet_split
from psl_flower.samplers import Delays, LatentDirichletSampler, Population, UniformGlobalSampler
from psl_flower.samplers.dirichlet import (
    capped_multinomial,
    clients_alike,
    map_mixture,
    prior_strength,
    standardised_delays,
)
from psl_flower.stragglers import SlowFractionDelays, step_times

LABELS = np.repeat(np.arange(10), 5000)


def with_delays(counts, delays=None):
    """Return a population of clients 0, 1, ... with these class counts."""
    counts = np.asarray(counts)
    return Population(np.arange(len(counts)), counts.sum(axis=1), counts, delays)


@cache
def severe(num_clients, seed):
    """Return 50,000 examples in the method's severe split, a tenth of the clients with 10 times the latency."""
    parts = extended_dirichlet_split(LABELS, num_clients, 2, 3.0, np.random.default_rng(seed))
    counts = [np.bincount(LABELS[part], minlength=10) for part in parts]
    return with_delays(counts, SlowFractionDelays(seed=seed).delays(np.arange(num_clients)))


def trade_off(num_clients, **options):
    """Return epoch time relative to UGS, and mean deviation, over five seeds."""
    times, deviations = [], []
    for seed in range(5):
        population = severe(num_clients, seed)
        plan = LatentDirichletSampler(128, seed=seed, **options).plan(population)
        uniform = UniformGlobalSampler(128, seed=seed).plan(population)
        times.append(step_times(plan).sum() / step_times(uniform).sum())
        drawn = draw_class_counts(plan, np.random.default_rng(seed))
        deviations.append(batch_deviation(drawn, np.bincount(LABELS)).mean())
    return np.mean(times), np.mean(deviations)


class TestTradeOff:
    @pytest.mark.parametrize(
        ("num_clients", "delta", "time", "deviation"),
        [
            (64, 0.25, 0.56, 0.222),
            (64, 0.5, 0.36, 0.235),
            (64, 1.0, 0.22, 0.259),
            (64, 2.0, 0.18, 0.279),
            (16, 0.25, 0.66, 0.251),
            (16, 0.5, 0.46, 0.297),
            (16, 1.0, 0.29, 0.374),
        ],
    )
    def test_is_the_one_measured_with_the_method(self, num_clients, delta, time, deviation):
        found_time, found_deviation = trade_off(num_clients, delta=delta)
        assert found_time == pytest.approx(time, abs=0.03)
        assert found_deviation == pytest.approx(deviation, abs=0.02)

    def test_less_confidence_in_the_prior_lets_labels_decide_more(self):
        time, deviation = trade_off(64, delta=1.0, c=0.1)
        assert time == pytest.approx(0.257, abs=0.03)
        assert deviation == pytest.approx(0.226, abs=0.012)
        assert deviation < trade_off(64, delta=1.0)[1] - 0.015

    def test_without_delta_it_is_close_to_uniform_sampling(self):
        time, deviation = trade_off(64, delta=0.0)
        assert time == pytest.approx(1.0, abs=0.02)
        assert 0.205 < deviation < 0.222  # UGS: .21

    def test_per_example_delays_alone_gain_next_to_nothing(self):
        times = []
        for seed in range(3):
            population = severe(64, seed)
            delays = SlowFractionDelays(seed=seed, latency=0, per_sample=1).delays(population.client_ids)
            population = Population(population.client_ids, population.sizes, population.label_counts, delays)
            plans = [s(128, seed=seed).plan(population) for s in (LatentDirichletSampler, UniformGlobalSampler)]
            times.append(step_times(plans[0]).sum() / step_times(plans[1]).sum())
        assert np.mean(times) > 0.9


class TestPlan:
    def test_batches_are_nearly_equal_and_none_is_short(self):
        for seed in range(3):
            plan = LatentDirichletSampler(128, seed=seed).plan(severe(16, seed))
            plan.validate()
            assert len(plan) == 391
            assert set(plan.batch_sizes().tolist()) == {127, 128}

    def test_stragglers_come_first_in_natural_order_and_anywhere_when_shuffled(self):
        population = severe(64, 0)
        slow = np.flatnonzero(population.delays.latency > 1)
        halves = {}
        for order in ("natural", "shuffled"):
            dense = LatentDirichletSampler(128, order=order).plan(population).dense()[:, slow]
            halves[order] = dense[:195].sum() / dense.sum()
        assert halves["natural"] == 1.0
        assert 0.3 < halves["shuffled"] < 0.7

    def test_orders_differ_in_nothing_but_order(self):
        natural, shuffled = (LatentDirichletSampler(128, order=o).plan(severe(16, 1)) for o in ("natural", "shuffled"))
        rows = lambda plan: sorted(map(tuple, plan.dense().tolist()))  # noqa: E731
        assert rows(natural) == rows(shuffled)
        assert natural.dense().tolist() != shuffled.dense().tolist()

    def test_epochs_and_seeds_differ_and_repeat(self):
        population = severe(16, 0)
        plan = LatentDirichletSampler(128, seed=1).plan(population, 3).dense()
        assert (plan == LatentDirichletSampler(128, seed=1).plan(population, 3).dense()).all()
        assert (plan != LatentDirichletSampler(128, seed=1).plan(population, 4).dense()).any()
        assert (plan != LatentDirichletSampler(128, seed=2).plan(population, 3).dense()).any()

    def test_only_a_positive_delta_needs_delays(self):
        population = with_delays([[10, 0], [0, 10]])
        LatentDirichletSampler(4, delta=0).plan(population).validate()
        with pytest.raises(ConfigError, match="needs the population's delays"):
            LatentDirichletSampler(4).plan(population)

    def test_needs_label_counts(self):
        with pytest.raises(ConfigError, match="label_counts"):
            LatentDirichletSampler(4, delta=0).plan(Population([0, 1], [4, 4]))

    def test_leaves_classes_to_chance(self):
        assert LatentDirichletSampler(128).plan(severe(16, 0)).class_quotas is None

    def test_who_holds_what_matters_not_under_which_id(self):
        """Renumbering clients leaves the distribution of plans alone: compare slow clients' mean share of each step."""
        population = severe(16, 0)
        renumbered = Population(
            population.client_ids[::-1], population.sizes, population.label_counts, population.delays
        )
        profiles = []
        for case in (population, renumbered):
            slow = case.delays.latency > 1
            tables = [
                LatentDirichletSampler(128, seed=seed, order="natural").plan(case).dense()[:, slow].sum(axis=1)
                for seed in range(20)
            ]
            profiles.append(np.mean(tables, axis=0)[:40])
        np.testing.assert_allclose(profiles[0], profiles[1], atol=6)  # of 128; standard error of a difference: 1.7


class TestPitfalls:
    def test_equal_delays_favour_nobody(self):
        counts = severe(16, 0).label_counts
        plans = [
            LatentDirichletSampler(128, delta=delta).plan(
                with_delays(counts, Delays(np.full(16, 0.1), np.full(16, 0.3)))
            )
            for delta in (0.0, 5.0)
        ]
        assert (plans[0].dense() == plans[1].dense()).all()

    def test_one_client(self):
        plan = LatentDirichletSampler(4, delta=3).plan(with_delays([[7, 6]], Delays([1], [1])))
        assert plan.dense().ravel().tolist() in ([4, 3, 3, 3], [3, 4, 3, 3], [3, 3, 4, 3], [3, 3, 3, 4])

    @pytest.mark.parametrize("counts", [[[1]], [[1], [1]], [[1, 0], [0, 1]], [[2, 0], [0, 1], [0, 1]]])
    @pytest.mark.parametrize("delta", [0.0, 1.0])
    def test_tiny_populations(self, counts, delta):
        delays = Delays(np.arange(len(counts)), np.zeros(len(counts)))
        for batch_size in range(1, np.sum(counts) + 1):
            LatentDirichletSampler(batch_size, delta=delta).plan(with_delays(counts, delays)).validate()

    def test_an_absurd_delta_packs_the_straggler_and_stays_finite(self):
        latency = np.ones(30)
        latency[4] = 1e6
        counts = np.full((30, 2), 20)
        counts[::2, 0] = 1  # not alike
        plan = LatentDirichletSampler(10, delta=1e4, order="natural").plan(
            with_delays(counts, Delays(latency, 0 * latency))
        )
        plan.validate()
        assert (plan.dense()[:2, 4] == plan.batch_sizes()[:2]).all()

    def test_a_prior_that_leaves_nothing_falls_back_to_the_clients_shares(self):
        # alpha is far below 1 and the histogram sums to 1: every numerator is negative
        start = np.array([0.5, 0.3, 0.2])
        found = map_mixture(start, np.full(3, 1e-3), np.eye(3), np.array([0.5, 0.3, 0.2]), 1e-6)
        assert found.tolist() == start.tolist()

    def test_identical_clients_take_the_prior_s_mean(self):
        """Labels cannot tell them apart, so without delta quotas are proportional to sizes, small clients included."""
        counts = np.outer([400, 200, 100, 20, 2], [1, 1, 2])
        first = np.array(
            [
                LatentDirichletSampler(36, seed=seed, delta=0, c=0.01, order="natural")
                .plan(with_delays(counts))
                .dense()[:20]
                for seed in range(40)
            ]
        ).sum(axis=(0, 1))
        expected = 40 * 20 * 36 * counts.sum(axis=1) / counts.sum()
        np.testing.assert_allclose(first, expected, atol=5 * np.sqrt(expected.max()))
        assert first[-1] > 0

    def test_iid_clients_with_little_confidence_do_not_collapse_to_one_a_step(self):
        rng = np.random.default_rng(0)
        sizes = rng.integers(200, 600, 128)
        counts = np.array([rng.multinomial(size, np.full(10, 0.1)) for size in sizes])
        plan = LatentDirichletSampler(128, delta=0, c=0.1).plan(with_delays(counts))
        uniform = UniformGlobalSampler(128).plan(with_delays(counts))
        assert plan.active_clients().mean() > 0.9 * uniform.active_clients().mean()

    def test_many_clients_still_take_part(self):
        """With 1,000 clients the prior's mode is on the border; stopping the EM early keeps most of them in."""
        population = severe(1000, 0)
        plan = LatentDirichletSampler(128, delta=0).plan(population)
        plan.validate()
        assert plan.active_clients().mean() > 60
        assert batch_deviation(draw_class_counts(plan, np.random.default_rng(0)), np.bincount(LABELS)).mean() < 0.23


class TestMapMixture:
    def test_finds_the_maximum_of_the_posterior(self):
        """No random point of the simplex is more probable, and the gradient is the same for all clients."""
        rng = np.random.default_rng(3)
        beta = rng.dirichlet(np.full(4, 0.5), size=6)
        alpha = rng.uniform(2, 30, 6)
        histogram = rng.multinomial(200, np.full(4, 0.25)).astype(float)
        found = map_mixture(np.full(6, 1 / 6), alpha, beta, histogram, 1e-12)

        def log_posterior(pi):
            return histogram @ np.log(pi @ beta) + (alpha - 1) @ np.log(pi)

        assert found.sum() == pytest.approx(1)
        others = np.concatenate((rng.dirichlet(np.ones(6), 300), rng.dirichlet(found * 1e4, 300)))
        assert all(log_posterior(found) > log_posterior(other) for other in others)
        gradient = beta @ (histogram / (found @ beta)) + (alpha - 1) / found
        np.testing.assert_allclose(gradient, gradient.mean(), rtol=1e-4)

    def test_separate_labels_add_to_the_prior(self):
        # each client has a class of its own: pi ∝ h + alpha - 1
        found = map_mixture(np.full(3, 1 / 3), np.array([2.0, 3.0, 4.0]), np.eye(3), np.array([1.0, 5.0, 2.0]), 1e-12)
        np.testing.assert_allclose(found, np.array([2, 7, 5]) / 14)

    def test_classes_that_nobody_with_probability_holds_are_ignored(self):
        found = map_mixture(np.array([1.0, 0.0]), np.array([2.0, 1.0]), np.eye(2), np.array([3.0, 3.0]), 1e-9)
        assert found.tolist() == [1.0, 0.0]

    def test_a_larger_prior_never_lowers_a_client(self):
        beta, histogram = np.array([[0.8, 0.2], [0.5, 0.5], [0.1, 0.9]]), np.array([40.0, 60.0])
        shares = [
            map_mixture(np.full(3, 1 / 3), np.array([a, 10.0, 10.0]), beta, histogram, 1e-12)[0]
            for a in (5, 10, 20, 80)
        ]
        assert shares == sorted(shares)
        assert shares[0] < shares[-1]


@pytest.mark.parametrize(("sample_size", "total"), [(1000, 50_000), (5, 12), (1, 7), (11, 12)])
def test_prior_varies_as_a_draw_without_replacement(sample_size, total):
    strength, share = prior_strength(sample_size, total), 0.25
    dirichlet = share * (1 - share) / (strength + 1)
    hypergeometric = share * (1 - share) / sample_size * (total - sample_size) / (total - 1)
    assert dirichlet == pytest.approx(hypergeometric)


class TestStandardisedDelays:
    def test_is_the_formula(self):
        delays = Delays([1.0, 2.0, 3.0, 6.0], [0.5, 0.0, 0.25, 0.0])
        seconds = np.array([1 + 0.5 * 2, 2, 3 + 0.25 * 2, 6])  # B / K = 8 / 4
        np.testing.assert_allclose(standardised_delays(delays, 8), (seconds - seconds.mean()) / seconds.std())

    @pytest.mark.parametrize("value", [0.0, 0.1, 1e-9, 1e9])
    def test_equal_delays_are_zero_not_rounding_noise(self, value):
        assert not standardised_delays(Delays(np.full(7, value), np.full(7, value / 3)), 128).any()


class TestClientsAlike:
    def test_rejects_about_one_in_a_hundred_iid_populations(self):
        rng = np.random.default_rng(0)
        found = sum(clients_alike(rng.multinomial(300, np.full(10, 0.1), size=20)) for _ in range(1000))
        assert 970 <= found <= 999

    def test_tells_skewed_clients_apart(self):
        assert not clients_alike(severe(64, 0).label_counts)

    @pytest.mark.parametrize("counts", [[[3, 5]], [[3, 0], [9, 0]], [[2, 4], [1, 2]]])
    def test_one_client_one_class_or_one_proportion_are_alike(self, counts):
        assert clients_alike(np.array(counts))


class TestCappedMultinomial:
    def test_without_caps_it_is_a_multinomial(self):
        pi, room = np.array([0.5, 0.3, 0.2]), np.full(3, 100)
        rng = np.random.default_rng(0)
        mean = np.mean([capped_multinomial(rng, 50, pi, room, pi) for _ in range(4000)], axis=0)
        np.testing.assert_allclose(mean, 50 * pi, atol=0.25)  # standard error .056

    def test_shortfall_goes_to_the_others_in_proportion(self):
        pi, room = np.array([0.8, 0.15, 0.05]), np.array([10, 100, 100])
        rng = np.random.default_rng(0)
        fallback = np.array([0.1, 0.1, 0.8])  # has no say while kinds of positive probability have room
        draws = np.array([capped_multinomial(rng, 50, pi, room, fallback) for _ in range(2000)])
        assert (draws.sum(axis=1) == 50).all()
        assert (draws[:, 0] == 10).all()
        assert draws[:, 1].mean() == pytest.approx(30, abs=0.3)

    def test_kinds_of_probability_zero_fill_up_by_the_fallback(self):
        pi, room, fallback = np.array([1.0, 0.0, 0.0]), np.array([2, 50, 50]), np.array([0.2, 0.6, 0.2])
        rng = np.random.default_rng(0)
        draws = np.array([capped_multinomial(rng, 42, pi, room, fallback) for _ in range(500)])
        assert (draws[:, 0] == 2).all()
        assert draws[:, 1].mean() == pytest.approx(30, abs=0.7)

    def test_takes_everything_when_everything_is_asked_for(self):
        room = np.array([3, 0, 4])
        drawn = capped_multinomial(np.random.default_rng(0), 7, np.array([0.0, 0.5, 0.5]), room, np.full(3, 1 / 3))
        assert drawn.tolist() == room.tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"delta": -0.1}, "delta must be at least 0"),
        ({"delta": float("nan")}, "delta must be finite"),
        ({"c": 0}, "c must be greater than 0"),
        ({"sample_size": 0}, "sample_size must be at least 1"),
        ({"sample_size": 2.5}, "sample_size must be a whole number"),
        ({"tolerance": 0}, "tolerance must be greater than 0"),
        ({"order": "random"}, "order must be one of 'shuffled', 'natural', got 'random'"),
        ({"seed": -1}, "seed"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_refuses_arguments_out_of_range(options, message):
    with pytest.raises(ConfigError, match=message):
        LatentDirichletSampler(**{"batch_size": 8, **options})
