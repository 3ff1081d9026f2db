"""Step times of a plan and the virtual clock, against times worked out by hand."""

import subprocess
import sys

import numpy as np
import pytest

from psl_flower.errors import ConfigError
from psl_flower.samplers import BatchPlan, Delays, Population, UniformGlobalSampler
from psl_flower.stragglers import VirtualClock, step_times

IDS = [3, 5, 9]
DELAYS = Delays([1.0, 0.0, 10.0], [0.5, 2.0, 0.0])
# steps: {3: 2, 5: 1} -> max(2.0, 2.0); {3: 1, 9: 2} -> max(1.5, 10.0); {5: 1} -> 2.0
PLAN = BatchPlan(Population(IDS, [3, 2, 2], delays=DELAYS), [0, 2, 4, 5], [3, 5, 3, 9, 5], [2, 1, 1, 2, 1])


class TestStepTimes:
    def test_slowest_participant_decides(self):
        assert step_times(PLAN).tolist() == [2.0, 10.0, 2.0]

    def test_given_delays_replace_the_population_s(self):
        assert step_times(PLAN, Delays([0, 0, 0], [1, 10, 100])).tolist() == [10.0, 200.0, 10.0]

    def test_order_of_the_population_does_not_matter(self):
        population = Population(IDS[::-1], [2, 2, 3], delays=Delays([10.0, 0.0, 1.0], [0.0, 2.0, 0.5]))
        plan = BatchPlan(population, PLAN.offsets, PLAN.clients, PLAN.quotas)
        assert step_times(plan).tolist() == [2.0, 10.0, 2.0]

    def test_equals_the_formula_on_a_dense_plan(self):
        rng = np.random.default_rng(0)
        population = Population(np.arange(20), rng.integers(1, 40, 20), delays=Delays(rng.random(20), rng.random(20)))
        plan = UniformGlobalSampler(16).plan(population)
        dense = plan.dense()
        busy = population.delays.latency + population.delays.per_sample * dense
        np.testing.assert_allclose(step_times(plan), np.where(dense > 0, busy, 0).max(axis=1))

    def test_plan_without_steps_takes_no_time(self):
        assert step_times(BatchPlan(PLAN.population, [0], [], [])).tolist() == []

    def test_refuses_a_plan_without_delays(self):
        plan = BatchPlan(Population([0], [1]), [0, 1], [0], [1])
        with pytest.raises(ConfigError, match="population has none"):
            step_times(plan)

    def test_refuses_delays_of_other_clients(self):
        with pytest.raises(ConfigError, match="3 clients of the plan's population, got 2"):
            step_times(PLAN, Delays([1, 1], [0, 0]))


class TestVirtualClock:
    def test_adds_up_what_step_times_says(self):
        clock = VirtualClock(IDS, DELAYS)
        taken = [clock.advance(step.clients, step.quotas) for step in PLAN]
        np.testing.assert_allclose(taken, step_times(PLAN))
        assert clock.elapsed == pytest.approx(sum(taken))

    def test_ids_may_come_in_any_order(self):
        clock = VirtualClock([9, 3, 5], Delays([10.0, 1.0, 0.0], [0.0, 0.5, 2.0]))
        assert clock.advance([9, 3], [2, 1]) == 10.0
        assert clock.reply_times([5, 3], [1, 4]).tolist() == [2.0, 3.0]
        assert clock.elapsed == 10.0  # asking does not move it

    def test_update_changes_clients_and_keeps_the_time(self):
        clock = VirtualClock(IDS, DELAYS)
        clock.advance([5], [1])
        clock.update([4], Delays([7.0], [0.0]))
        assert clock.advance([4], [1]) == 7.0
        assert clock.elapsed == 9.0
        with pytest.raises(ConfigError, match="no delay of client 5"):
            clock.advance([5], [1])

    @pytest.mark.parametrize("client", [0, 4, 10])
    def test_refuses_an_unknown_client_and_does_not_move(self, client):
        clock = VirtualClock(IDS, DELAYS)
        with pytest.raises(ConfigError, match=f"no delay of client {client}: call update"):
            clock.advance([client], [1])
        assert clock.elapsed == 0

    def test_refuses_a_step_without_clients(self):
        with pytest.raises(ConfigError, match="at least one client"):
            VirtualClock(IDS, DELAYS).advance([], [])

    def test_refuses_clients_and_quotas_of_different_length(self):
        with pytest.raises(ConfigError, match="one length"):
            VirtualClock(IDS, DELAYS).advance([3, 5], [1])

    @pytest.mark.parametrize(
        ("ids", "message"),
        [([3, 5], "all 2 clients, got 3"), ([3, 5, 5], "got 5 more than once"), ([], "at least one"), ([[3]], "1-D")],
    )
    def test_refuses_ids_that_do_not_fit(self, ids, message):
        with pytest.raises(ConfigError, match=message):
            VirtualClock(ids, DELAYS)


@pytest.mark.parametrize("module", ["psl_flower.stragglers", "psl_flower.samplers", "psl_flower.plan"])
def test_can_be_imported_first_and_needs_neither_torch_nor_flwr(module):
    """Samplers use the clock and delays use samplers' types, so each order of import must work."""
    code = f"import {module}, sys; sys.exit(bool({{'torch', 'flwr'}} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)
