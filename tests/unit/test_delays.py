"""Delay models: what each gives, what stays the same between epochs, and estimates from reply times."""

import json

import numpy as np
import pytest

from psl_flower.errors import ConfigError
from psl_flower.samplers import Population, UniformGlobalSampler
from psl_flower.stragglers import (
    CsvDelays,
    DelayEstimator,
    LognormalDelays,
    NoDelays,
    SlowFractionDelays,
    delay_model,
)

IDS = np.arange(100)


def slow_set(model, ids):
    latency = model.delays(ids).latency
    return {int(client) for client, seconds in zip(ids, latency, strict=True) if seconds > latency.min()}


def test_none_takes_no_time():
    delays = NoDelays().delays([4, 2])
    assert delays.latency.tolist() == delays.per_sample.tolist() == [0, 0]


class TestSlowFraction:
    def test_exactly_the_fraction_is_slower_by_the_factors(self):
        delays = SlowFractionDelays(latency=2, per_sample=0.5, latency_factor=10, per_sample_factor=3).delays(IDS)
        slow = delays.latency > 2
        assert slow.sum() == 10
        assert set(delays.latency[slow]) == {20.0}
        assert set(delays.latency[~slow]) == {2.0}
        assert set(delays.per_sample[slow]) == {1.5}
        assert set(delays.per_sample[~slow]) == {0.5}

    @pytest.mark.parametrize(
        ("fraction", "num_clients", "num_slow"),
        [(0, 10, 0), (0.1, 4, 1), (0.1, 16, 2), (0.1, 64, 6), (0.25, 10, 3), (1, 7, 7), (0.5, 1, 1)],
    )
    def test_rounds_to_whole_clients_but_not_to_none(self, fraction, num_clients, num_slow):
        delays = SlowFractionDelays(fraction=fraction).delays(np.arange(num_clients))
        assert (delays.latency == 10).sum() == num_slow

    def test_depends_on_seed_and_set_alone_not_on_the_order_asked(self):
        model = SlowFractionDelays(seed=3)
        shuffled = np.random.default_rng(0).permutation(IDS)
        assert slow_set(model, IDS) == slow_set(model, shuffled) == slow_set(SlowFractionDelays(seed=3), IDS)
        assert slow_set(model, IDS) != slow_set(SlowFractionDelays(seed=4), IDS)

    def test_a_client_that_leaves_hardly_changes_who_is_slow(self):
        model = SlowFractionDelays(fraction=0.2)
        assert len(slow_set(model, IDS) - slow_set(model, IDS[1:]) - {0}) <= 1

    def test_every_client_is_slow_equally_often(self):
        times = sum((SlowFractionDelays(seed=seed).delays(IDS).latency > 1).astype(int) for seed in range(2000))
        # binomial(2000, 0.1): mean 200, standard deviation 13.4; 100 of them stay within 4.5
        assert times.min() > 140
        assert times.max() < 260
        assert 10 < times.std() < 17

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"fraction": 1.5}, "fraction must be at most 1, got 1.5"),
            ({"fraction": -0.1}, "fraction must be at least 0"),
            ({"latency": -1}, "latency must be at least 0"),
            ({"per_sample": float("nan")}, "per_sample must be finite"),
            ({"latency_factor": -1}, "latency_factor"),
            ({"per_sample_factor": "x"}, "per_sample_factor must be a number"),
            ({"seed": -1}, "seed must be at least 0"),
        ],
    )
    def test_refuses_what_is_out_of_range(self, options, message):
        with pytest.raises(ConfigError, match=message):
            SlowFractionDelays(**options)

    @pytest.mark.parametrize("ids", [[1, 1], [[1, 2]], [0.5]])
    def test_refuses_ids_that_are_none(self, ids):
        with pytest.raises(ConfigError, match="client_ids"):
            SlowFractionDelays().delays(ids)


class TestLognormal:
    def test_has_the_moments_asked_for(self):
        delays = LognormalDelays(latency=2, per_sample=0.1, latency_sigma=0.5, per_sample_sigma=1).delays(
            np.arange(10_000)
        )
        for values, median, sigma in ((delays.latency, 2, 0.5), (delays.per_sample, 0.1, 1)):
            logs = np.log(values)
            assert np.median(logs) == pytest.approx(np.log(median), abs=0.05 * sigma)
            assert logs.std() == pytest.approx(sigma, rel=0.03)
            # symmetric with normal tails: 2.3 % beyond two standard deviations on each side
            assert np.mean(logs > np.log(median) + 2 * sigma) == pytest.approx(0.0228, abs=0.006)
            assert np.mean(logs < np.log(median) - 2 * sigma) == pytest.approx(0.0228, abs=0.006)
        assert abs(np.corrcoef(np.log(delays.latency), np.log(delays.per_sample))[0, 1]) < 0.04

    def test_each_client_depends_on_seed_and_id_alone(self):
        model = LognormalDelays(seed=5)
        some = model.delays([70, 3])
        every = model.delays(IDS)
        assert some.latency.tolist() == every.latency[[70, 3]].tolist()
        assert some.per_sample.tolist() == every.per_sample[[70, 3]].tolist()
        assert LognormalDelays(seed=6).delays([3]).latency != some.latency[1]

    def test_without_spread_all_are_at_the_median(self):
        delays = LognormalDelays(latency=3, per_sample=2, latency_sigma=0, per_sample_sigma=0).delays([1, 2])
        assert delays.latency.tolist() == [3, 3]
        assert delays.per_sample.tolist() == [2, 2]

    @pytest.mark.parametrize("option", ["latency", "per_sample", "latency_sigma", "per_sample_sigma", "seed"])
    def test_refuses_negative_values(self, option):
        with pytest.raises(ConfigError, match=option):
            LognormalDelays(**{option: -1})


class TestCsv:
    def write(self, tmp_path, text):
        path = tmp_path / "delays.csv"
        path.write_text(text, encoding="utf-8")
        return path

    def test_reads_by_column_name(self, tmp_path):
        path = self.write(tmp_path, "per_sample, client_id, place, latency\n0.5, 7, here, 1\n0, 2, there, 3.5\n")
        delays = CsvDelays(path).delays([2, 7])
        assert delays.latency.tolist() == [3.5, 1.0]
        assert delays.per_sample.tolist() == [0.0, 0.5]

    def test_refuses_clients_it_does_not_name(self, tmp_path):
        model = CsvDelays(self.write(tmp_path, "client_id,latency,per_sample\n1,1,1\n"))
        with pytest.raises(ConfigError, match=r"no delays of client 2 \(2 missing in all\)"):
            model.delays([1, 2, 3])

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "lacks client_id, latency, per_sample"),
            ("client_id,latency\n1,1\n", "lacks per_sample"),
            ("client_id,latency,per_sample\n1,1\n", "line 2: a client id and two numbers are needed"),
            ("client_id,latency,per_sample\n1,1,1\nx,1,1\n", "line 3: a client id"),
            ("client_id,latency,per_sample\n1,-1,1\n", "line 2: latency must be at least 0"),
            ("client_id,latency,per_sample\n1,1,nan\n", "line 2: per_sample must be finite"),
            ("client_id,latency,per_sample\n1,1,1\n1,2,2\n", "line 3: client 1 is named twice"),
        ],
    )
    def test_refuses_a_broken_file_naming_the_line(self, tmp_path, text, message):
        with pytest.raises(ConfigError, match=message):
            CsvDelays(self.write(tmp_path, text))

    def test_refuses_a_missing_file(self, tmp_path):
        with pytest.raises(ConfigError, match="cannot be read"):
            CsvDelays(tmp_path / "none.csv")


class TestFactory:
    def test_makes_each_by_name(self, tmp_path):
        path = tmp_path / "d.csv"
        path.write_text("client_id,latency,per_sample\n", encoding="utf-8")
        assert delay_model("none") == NoDelays()
        assert delay_model("slow-fraction", fraction=0.2) == SlowFractionDelays(fraction=0.2)
        assert delay_model("lognormal", seed=2) == LognormalDelays(seed=2)
        assert delay_model("csv", path=path) == CsvDelays(path)
        assert isinstance(delay_model("measured", window=8), DelayEstimator)

    @pytest.mark.parametrize(
        ("name", "options", "message"),
        [
            ("slow", {}, "delays must be one of 'none', 'slow-fraction', 'lognormal', 'csv', 'measured', got 'slow'"),
            ("lognormal", {"sigma": 1}, "an option of delays 'lognormal' must be one of 'latency'.*got 'sigma'"),
            ("none", {"latency": 1}, "delays 'none' has no options, got 'latency'"),
            ("csv", {}, "delays 'csv' needs the option 'path'"),
        ],
    )
    def test_refuses_unknown_names_and_options(self, name, options, message):
        with pytest.raises(ConfigError, match=message):
            delay_model(name, **options)


def replies(estimator, latency, per_sample, *, steps, noise=0.0, outliers=0.0, batch_size=64, seed=0):
    """Let clients reply to the first steps of a uniform plan, with noise and some replies 10 times as slow."""
    rng = np.random.default_rng(seed)
    num_clients = len(latency)
    plan = UniformGlobalSampler(batch_size).plan(Population(np.arange(num_clients), [1000] * num_clients))
    for step in plan[:steps]:
        for client, quota in zip(step.clients.tolist(), step.quotas.tolist(), strict=True):
            seconds = (latency[client] + per_sample[client] * quota) * np.exp(noise * rng.standard_normal())
            estimator.observe(client, quota, seconds * (10 if rng.random() < outliers else 1))


class TestEstimator:
    LATENCY = np.array([0.02, 0.02, 0.3, 0.02, 0.02, 0.3, 0.02, 0.02])
    PER_SAMPLE = np.array([0.002, 0.002, 0.002, 0.002, 0.002, 0.002, 0.002, 0.01])

    def test_separates_latency_from_time_an_example_where_quotas_vary(self):
        estimator = DelayEstimator()
        replies(estimator, self.LATENCY, self.PER_SAMPLE, steps=30)
        delays = estimator.delays(np.arange(8))
        np.testing.assert_allclose(delays.latency, self.LATENCY, rtol=0.05)
        np.testing.assert_allclose(delays.per_sample, self.PER_SAMPLE, rtol=0.25)

    @pytest.mark.parametrize("seed", range(5))
    def test_noise_and_outliers_hardly_move_what_a_usual_quota_takes(self, seed):
        estimator = DelayEstimator()
        replies(estimator, self.LATENCY, self.PER_SAMPLE, steps=30, noise=0.1, outliers=0.1, seed=seed)
        delays = estimator.delays(np.arange(8))
        true = self.LATENCY + 8 * self.PER_SAMPLE
        np.testing.assert_allclose(delays.latency + 8 * delays.per_sample, true, rtol=0.12)
        assert set(np.argsort(delays.latency)[-2:]) == {2, 5}

    def test_a_few_replies_are_enough_to_tell_who_is_slow(self):
        estimator = DelayEstimator()
        replies(estimator, self.LATENCY, self.PER_SAMPLE, steps=4, noise=0.1)
        delays = estimator.delays(np.arange(8))
        seconds = delays.latency + 8 * delays.per_sample
        assert set(np.argsort(seconds)[-2:]) == {2, 5}
        np.testing.assert_allclose(seconds, self.LATENCY + 8 * self.PER_SAMPLE, rtol=0.3)

    def test_equal_quotas_leave_the_split_to_the_prior_and_the_sum_right(self):
        estimator = DelayEstimator()
        for _ in range(20):
            estimator.observe(0, 10, 2.0)
        delays = estimator.delays([0])
        assert delays.latency[0] + 10 * delays.per_sample[0] == pytest.approx(2.0)
        assert delays.latency[0] == pytest.approx(1.0)
        assert delays.per_sample[0] == pytest.approx(0.1)

    def test_equal_quotas_take_the_split_of_clients_whose_quotas_vary(self):
        estimator = DelayEstimator()
        for i in range(30):
            estimator.observe(0, 1 + i % 10, 0.1 * (1 + i % 10))  # no latency at all
            estimator.observe(1, 10, 2.0)
        delays = estimator.delays([1])
        assert delays.per_sample[0] == pytest.approx(0.2, rel=0.02)
        assert delays.latency[0] == pytest.approx(0.0, abs=0.04)

    def test_one_odd_quota_with_an_odd_reply_does_not_decide_the_slope(self):
        estimator = DelayEstimator()
        for _ in range(20):
            estimator.observe(0, 10, 1.0)
        estimator.observe(0, 3, 30.0)
        delays = estimator.delays([0])
        assert delays.latency[0] + 10 * delays.per_sample[0] == pytest.approx(1.0)
        assert delays.per_sample[0] <= 0.1

    def test_slope_and_latency_are_never_negative(self):
        estimator = DelayEstimator()
        for i in range(32):
            estimator.observe(0, 1 + i, 10.0 - 0.1 * i)  # less for more
        for quota, seconds in ((6, 0.4), (11, 1.9), (9, 1.7)):  # a line through (6, 0.4) with a negative intercept
            estimator.observe(1, quota, seconds)
        delays = estimator.delays([0, 1])
        assert delays.per_sample[0] == pytest.approx(0, abs=0.01)
        assert delays.latency[1] == 0

    def test_a_window_not_yet_full_is_enough(self):
        estimator = DelayEstimator()
        for quota in (2, 14, 4, 12, 6, 10, 8):
            estimator.observe(0, quota, 1.0 + 0.1 * quota)
        delays = estimator.delays([0])
        assert delays.latency[0] == pytest.approx(1.0, rel=0.03)
        assert delays.per_sample[0] == pytest.approx(0.1, rel=0.03)

    def test_slow_first_reply_is_forgotten_at_the_second(self):
        estimator = DelayEstimator()
        estimator.observe(0, 8, 60.0)
        estimator.observe(0, 8, 1.0)
        delays = estimator.delays([0])
        assert delays.latency[0] + 8 * delays.per_sample[0] == pytest.approx(1.0)

    def test_lasting_change_takes_over_within_the_window(self):
        estimator = DelayEstimator(window=10)
        for seconds in [1.0] * 50 + [3.0] * 6:
            estimator.observe(0, 8, seconds)
        delays = estimator.delays([0])
        assert delays.latency[0] + 8 * delays.per_sample[0] == pytest.approx(3.0)

    def test_unheard_clients_get_the_median_of_the_others(self):
        estimator = DelayEstimator()
        for client, seconds in enumerate([1.0, 2.0, 9.0]):
            for quota in (2, 2, 2):
                estimator.observe(client, quota, seconds)
        delays = estimator.delays([7, 1])
        assert delays.latency[0] == delays.latency[1] == pytest.approx(1.0)
        assert delays.per_sample[0] == delays.per_sample[1] == pytest.approx(0.5)

    def test_before_any_reply_all_are_equal(self):
        delays = DelayEstimator(latency=0.5, per_sample=0.1).delays([2, 9])
        assert delays.latency.tolist() == [0.5, 0.5]
        assert delays.per_sample.tolist() == [0.1, 0.1]

    def test_replies_that_took_no_time_are_possible(self):
        estimator = DelayEstimator()
        for quota in (1, 2, 3):
            estimator.observe(0, quota, 0.0)
        assert estimator.delays([0]).latency.tolist() == [0.0]

    def test_memory_a_client_does_not_grow(self):
        estimator = DelayEstimator(window=4)
        for _ in range(100):
            estimator.observe(3, 1, 1.0)
        assert len(estimator.state_dict()["clients"]["3"]["seconds"]) == 4

    def test_survives_a_checkpoint(self):
        estimator = DelayEstimator(window=5, latency=0.2)
        for i in range(13):
            estimator.observe(i % 3, 1 + i, 0.1 * i)
        restored = DelayEstimator(window=5, latency=0.2)
        restored.load_state_dict(json.loads(json.dumps(estimator.state_dict())))
        for quota in (4, 9):  # and goes on in the same way
            estimator.observe(1, quota, 2.0)
            restored.observe(1, quota, 2.0)
        expected, found = estimator.delays([0, 1, 2, 3]), restored.delays([0, 1, 2, 3])
        assert found.latency.tolist() == expected.latency.tolist()
        assert found.per_sample.tolist() == expected.per_sample.tolist()

    def test_its_own_window_holds_after_a_checkpoint(self):
        estimator, shorter = DelayEstimator(window=5), DelayEstimator(window=2)
        for seconds in (1.0, 2.0, 3.0):
            estimator.observe(0, 4, seconds)
        shorter.load_state_dict(estimator.state_dict())
        assert shorter.state_dict() == {"clients": {"0": {"quotas": [4, 4], "seconds": [2.0, 3.0]}}}

    @pytest.mark.parametrize("state", [{}, {"clients": [1]}, {"clients": {"0": {"quotas": [1], "seconds": []}}}])
    def test_refuses_a_broken_checkpoint_and_stays_as_it_was(self, state):
        estimator = DelayEstimator()
        estimator.observe(0, 4, 1.0)
        before = estimator.state_dict()
        with pytest.raises(ConfigError, match="not the state of a DelayEstimator"):
            estimator.load_state_dict(state)
        assert estimator.state_dict() == before

    @pytest.mark.parametrize(
        ("reply", "message"),
        [
            ((-1, 1, 1.0), "client_id"),
            ((0, 0, 1.0), "quota must be at least 1"),
            ((0, 1, -1.0), "seconds must be at least 0"),
            ((0, 1, float("nan")), "seconds must be finite"),
        ],
    )
    def test_refuses_impossible_replies_and_forgets_them(self, reply, message):
        estimator = DelayEstimator()
        with pytest.raises(ConfigError, match=message):
            estimator.observe(*reply)
        assert estimator.state_dict()["clients"] == {}

    @pytest.mark.parametrize("options", [{"window": 1}, {"latency": -1}, {"per_sample": -1}])
    def test_refuses_arguments_out_of_range(self, options):
        with pytest.raises(ConfigError, match=next(iter(options))):
            DelayEstimator(**options)
