"""What a run does when clients fail: it goes on, every example is used once, and everything is counted."""

import json
import logging
import time

import numpy as np
import pytest
import torch
from faulty import (
    BACKWARD,
    CHANGES,
    FORWARD,
    FakeTime,
    FaultyGrid,
    RecordingRunner,
    assert_each_used_once,
    is_training,
    recording_app,
)
from flwr.app import ArrayRecord
from support import (
    CUT,
    client_data,
    client_sizes,
    largest_difference,
    load_partition,
    load_partition_with_test,
    planned_batches,
    population,
    sgd,
    tiny_resnet,
    train_centralised,
)
from torch.nn import functional as F

from psl_flower import InProcessGrid, ParallelSplitLearning, SplitClient, UniformGlobalSampler, split_client_app
from psl_flower.errors import ConfigError, MembershipError, StepError
from psl_flower.exchange import clients, messages
from psl_flower.faults import FaultPolicy
from psl_flower.samplers.registry import SAMPLERS
from psl_flower.stragglers import DelayEstimator, delay_model
from psl_flower.strategy import meeting as meeting_module
from psl_flower.strategy import run, tolerance
from psl_flower.strategy import strategy as strategy_module
from psl_flower.strategy.summary import SPENT

K = 6


@pytest.fixture(autouse=True)
def _no_time_passes(monkeypatch):
    clock = FakeTime()
    for module in (messages, clients, run, tolerance):
        monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(strategy_module, "StepRunner", RecordingRunner)


def make(*, num_clients=K, sampler=None, output_dir=None, optimizer=sgd, **options):
    policy = {k: options.pop(k) for k in FaultPolicy.__dataclass_fields__ if k in options}
    return ParallelSplitLearning(
        tiny_resnet(),
        cut=CUT,
        sampler=sampler or UniformGlobalSampler(24, seed=3),
        optimizer=optimizer,
        output_dir=output_dir,
        min_available_nodes=options.pop("min_available_nodes", 1),
        faults=FaultPolicy(**{"step_timeout": 5.0, "mistakes": "retry", **policy}),
        evaluate_every=options.pop("evaluate_every", 0),
        **options,
    )


def start(strategy, grid, num_rounds=1):
    return strategy.start(grid, ArrayRecord(tiny_resnet().state_dict()), num_rounds)


class OneFault(FaultyGrid):
    """One fault, or some, in replies of a kind of one client: the `at`-th and following (0-based)."""

    def __init__(self, kind, message_type, client=1, at=2, times=1, app=None):
        super().__init__(app or recording_app(), K)
        self.kind, self.message_type, self.client, self.at, self.times = kind, message_type, client, at, times
        self.seen = 0

    def fault(self, message, context):
        if (message.metadata.message_type, context.node_config["partition-id"]) != (self.message_type, self.client):
            return None
        self.seen += 1
        return self.kind if self.at < self.seen <= self.at + self.times else None


KINDS = [*(kind for kind in CHANGES if kind != "label range"), "client error", "timeout", "late", "duplicate"]


def summary_of(tmp_path):
    return json.loads((tmp_path / "summary.json").read_text())


@pytest.mark.parametrize("message_type", [FORWARD, BACKWARD])
@pytest.mark.parametrize("kind", KINDS)
def test_a_fault_of_any_kind_is_survived_and_counted(kind, message_type, tmp_path):
    grid = OneFault(kind, message_type)
    result = start(make(output_dir=tmp_path), grid)
    assert_each_used_once(RecordingRunner.latest, K, 1)
    summary = summary_of(tmp_path)
    assert summary["refused"] == +grid.injected
    assert summary["ignored"] == +grid.ignorable
    # a client that fails before its backward pass is tried again: once is enough
    lost = message_type == FORWARD and kind != "duplicate"
    assert summary["steps_short"] == lost
    assert (summary["examples_redone"] > 0) == lost
    assert result.train_metrics_clientapp[1]["num_examples"] == sum(client_sizes(K))
    assert result.train_metrics_clientapp[1]["examples_unseen"] == 0


def test_a_client_lost_between_forward_and_backward_is_dropped_and_the_step_recomputed(tmp_path):
    """The step equals one that the client never took part in, the server half's buffers included."""
    grid = OneFault("client error", BACKWARD, client=2, at=0, times=2)
    strategy = make(output_dir=tmp_path, sampler=UniformGlobalSampler(sum(client_sizes(K)), seed=3))
    result = start(strategy, grid)
    assert_each_used_once(RecordingRunner.latest, K, 1)
    model, optimizer = tiny_resnet(), None
    optimizer = sgd(model.parameters())
    for chosen in ([k for k in range(K) if k != 2], [2]):  # two steps: the others, then client 2
        orders = [np.random.default_rng([3, 0, k]).permutation(client_sizes(K)[k]) for k in chosen]
        data = [client_data(k, K).tensors for k in chosen]
        x, y = (torch.cat([d[i][order] for d, order in zip(data, orders, strict=True)]) for i in (0, 1))
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert largest_difference(result.arrays.to_torch_state_dict(), model.state_dict()) < 1e-5
    summary = summary_of(tmp_path)
    assert (summary["steps_recomputed"], summary["refused"]) == (1, {"client error": 2})
    assert summary["examples_redone"] == client_sizes(K)[2]


def test_labels_out_of_range_cost_their_client_the_step(tmp_path):
    start(make(output_dir=tmp_path), OneFault("label range", FORWARD))
    assert summary_of(tmp_path)["refused"] == {"label range": 1}
    assert_each_used_once(RecordingRunner.latest, K, 1)


def options_for(name, num_clients=K):
    sampler = SAMPLERS[name](population(num_clients).num_examples // 14, seed=3)
    return {"sampler": sampler, "delays": delay_model("slow-fraction", seed=1, fraction=0.4)}


class Flaky(FaultyGrid):
    """Every message may meet a fault; clients go down for a while, leave, and come back on other nodes."""

    def __init__(self, seed, share=0.03, app=None):
        super().__init__(app or recording_app(), K)
        self.rng, self.share = np.random.default_rng(seed), share

    def fault(self, message, context):
        return self.rng.choice(KINDS) if self.rng.random() < self.share else None

    def push_messages(self, pushed):
        pushed = list(pushed)
        if all(map(is_training, pushed)):
            self._move_on()
        return super().push_messages(pushed)

    def _move_on(self):
        """Freeze, kill or restart a node now and then, for some exchanges."""
        self.come_back()
        here = [n for n in self._contexts if n not in self.gone and n not in self.down]
        if self.rng.random() < 0.06 and len(here) > 2:
            node, what = self.rng.choice(here), self.rng.integers(3)
            if what == 2:
                self.restart(int(node))
            else:
                (self.down, self.gone)[what].add(int(node))
                self.back[int(node)] = int(self.rng.integers(1, 12))


@pytest.mark.parametrize("name", list(SAMPLERS))
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_chaos(name, seed, tmp_path):
    """Nothing hangs, nothing is lost, nothing is used twice, with any sampler."""
    grid = Flaky(seed)
    result = start(make(**options_for(name), output_dir=tmp_path, patience=100.0), grid, num_rounds=3)
    assert_each_used_once(RecordingRunner.latest, K, 3)
    summary = summary_of(tmp_path)
    assert summary["refused"] == +grid.injected
    assert summary["ignored"] == +grid.ignorable
    assert sum(grid.injected.values()) > 10
    assert summary["examples_unseen"] == {}
    assert summary["replans"] > 3
    for metrics in result.train_metrics_clientapp.values():
        assert metrics["num_examples"] == sum(client_sizes(K))


def test_chaos_on_class_targets_keeps_the_classes():
    """Steps of plans made anew meet their class quotas: the labels that arrive are those that were planned."""
    sampler = options_for("aligned")["sampler"]
    wrong = []

    class CheckingClient(SplitClient):
        def draw_batch(self, order):
            batch = super().draw_batch(order)
            counts = np.bincount(batch.target.numpy(), minlength=len(order.class_counts))
            wrong.append(not np.array_equal(counts, order.class_counts))
            return batch

    app = split_client_app(
        tiny_resnet, cut=CUT, data_fn=lambda c: load_partition_with_test(c)[0], client_class=CheckingClient
    )
    start(make(sampler=sampler, delays=DelayEstimator(), patience=100.0), Flaky(4, app=app))
    assert len(wrong) > 50
    assert not any(wrong)


@pytest.mark.slow
def test_accuracy_after_chaos_is_that_of_undisturbed_runs():
    """Within three standard deviations of their mean."""

    def accuracy(grid, seed):
        strategy = make(patience=100.0, sampler=UniformGlobalSampler(24, seed=seed))
        return start(strategy, grid, num_rounds=4).train_metrics_clientapp[4]["accuracy"]

    undisturbed = [accuracy(InProcessGrid(recording_app(), K), seed) for seed in range(5)]
    disturbed = [accuracy(Flaky(seed), seed) for seed in (5, 6)]
    assert np.std(undisturbed) < 0.05  # else the interval says nothing
    assert np.abs(np.array(disturbed) - np.mean(undisturbed)).max() <= 3 * np.std(undisturbed, ddof=1)


# --- clients that go and come ----------------------------------------------------------------------------------------
class Outage(FaultyGrid):
    """A client does not answer from one exchange of training on, up to another."""

    def __init__(self, client=0, begin=4, end=10**9, app=None):
        super().__init__(app or recording_app(), K)
        self.client, self.begin, self.end, self.count, self.asked = client, begin, end, 0, []

    def push_messages(self, pushed):
        pushed = list(pushed)
        if all(map(is_training, pushed)):
            self.count += 1
            node = next(n for n, c in self._contexts.items() if c.node_config["partition-id"] == self.client)
            (self.down.add if self.begin <= self.count < self.end else self.down.discard)(node)
            if any(m.metadata.dst_node_id == node for m in pushed):
                self.asked.append(self.count)
        return super().push_messages(pushed)


def test_a_client_gone_for_good_is_reported_with_what_was_not_seen(tmp_path, caplog):
    result = start(make(output_dir=tmp_path), Outage(), num_rounds=2)
    used = RecordingRunner.latest.used()
    seen = [len(used[epoch, 0]) for epoch in range(2)]
    unseen = [client_sizes(K)[0] - n for n in seen]
    assert seen[0] > 0
    assert seen[1] == 0
    assert_each_used_once(RecordingRunner.latest, K, 2, but=[(0, 0), (1, 0)])
    for r in (1, 2):
        assert result.train_metrics_clientapp[r]["examples_unseen"] == unseen[r - 1]
        assert f"round {r} went without {unseen[r - 1]} examples of client 0" in caplog.text
    assert summary_of(tmp_path)["examples_unseen"] == {"0": sum(unseen)}


def test_a_client_that_left_between_epochs_may_be_back_in_the_next(caplog):
    class Leaves(FaultyGrid):
        def push_messages(self, pushed):
            steps = len(RecordingRunner.latest.committed)
            self.gone = {3} if 12 <= steps < 24 else set()
            return super().push_messages(pushed)

    start(make(), Leaves(recording_app(), K), num_rounds=3)
    assert_each_used_once(RecordingRunner.latest, K, 3, but=[(0, 1)])
    assert "clients that left: 1" in caplog.text


def test_a_client_that_left_and_is_not_back_for_an_epoch_is_dropped(caplog):
    class Leaves(FaultyGrid):
        def push_messages(self, pushed):
            self.gone = {3} if len(RecordingRunner.latest.committed) >= 12 else set()
            return super().push_messages(pushed)

    result = start(make(), Leaves(recording_app(), K), num_rounds=3)
    size = client_sizes(K)[1]
    metrics = result.train_metrics_clientapp
    assert [metrics[r]["num_clients"] for r in (1, 2, 3)] == [5, 5, 4]  # one has no data
    assert 0 < metrics[1]["examples_unseen"] < size
    assert metrics[2]["examples_unseen"] == size or metrics[2]["num_clients"] == 4
    assert metrics[3]["examples_unseen"] == 0


def test_a_client_that_fails_again_and_again_is_asked_ever_more_rarely():
    grid = Outage(client=0, begin=1)
    start(make(sampler=UniformGlobalSampler(8, seed=3), patience=0.0), grid)
    assert grid.count > 60  # exchanges; without growing intervals it would be in most
    assert 5 <= len(grid.asked) <= 10


def test_a_client_that_is_back_late_in_the_epoch_still_gives_everything():
    grid = Outage(client=0, begin=1, end=20)
    start(make(), grid)
    assert_each_used_once(RecordingRunner.latest, K, 1)


def test_a_client_back_on_another_node_is_found_there(caplog):
    class Restarting(FaultyGrid):
        count = 0

        def push_messages(self, pushed):
            pushed = list(pushed)
            self.count += 1
            if self.count == 6:
                self.restart(3)
            return super().push_messages(pushed)

    grid = Restarting(recording_app(), K)
    start(make(), grid, num_rounds=2)
    assert_each_used_once(RecordingRunner.latest, K, 2)
    assert f"client 1 is back, on node {max(grid._contexts)}" in caplog.text


class Joining(FaultyGrid):
    """Two of the nodes connect during the first epoch only."""

    def __init__(self):
        super().__init__(recording_app(), K)
        self.count, self.gone = 0, {2, 7}

    def push_messages(self, pushed):
        self.count += 1
        if self.count == 8:
            self.gone.clear()
        return super().push_messages(pushed)


@pytest.mark.parametrize("name", ["ugs", "lds", "aligned"])
@pytest.mark.parametrize("join", ["epoch", "step"])
def test_new_clients_enter_with_the_next_epoch_or_at_once(join, name):
    strategy = make(**options_for(name), join=join)
    start(strategy, Joining(), num_rounds=2)
    late = [(0, 0), (0, 5)]
    assert_each_used_once(RecordingRunner.latest, K, 2, but=late if join == "epoch" else ())
    used = RecordingRunner.latest.used()
    assert all(used[key] == [] for key in late) == (join == "epoch")


def test_too_little_of_a_batch_is_not_applied(tmp_path):
    class Half(FaultyGrid):
        """At the third step, half the clients fail."""

        count = 0

        def fault(self, message, context):
            self.count += message.metadata.message_type == FORWARD and context.node_config["partition-id"] == 0
            failing = self.count == 3 and message.metadata.message_type == FORWARD
            return "client error" if failing and context.node_config["partition-id"] < 4 else None

    grid = Half(recording_app(), K)
    start(make(output_dir=tmp_path, min_batch_fraction=0.7), grid)
    assert_each_used_once(RecordingRunner.latest, K, 1)
    summary = summary_of(tmp_path)
    assert (summary["steps_redone"], summary["steps_short"]) == (1, 0)


# --- when nothing can be done ----------------------------------------------------------------------------------------
class Broken(SplitClient):
    def forward(self, half, inputs):
        raise ZeroDivisionError("a bug in every client")


def test_a_bug_in_all_clients_ends_the_run_at_once():
    app = split_client_app(tiny_resnet, cut=CUT, data_fn=lambda c: load_partition_with_test(c)[0], client_class=Broken)
    grid = FaultyGrid(app, K)
    with pytest.raises(StepError, match=r"round 1, step 0: all \d clients failed(?s:.*)ZeroDivisionError: a bug in"):
        start(make(), grid)
    assert grid._pushes == 2  # describing, and one exchange


def test_clients_that_fail_one_after_the_other_at_the_start_are_no_bug_of_all(tmp_path):
    class Unlucky(FaultyGrid):
        """In the first attempt all but one fail, in the second all."""

        count = 0

        def push_messages(self, pushed):
            pushed = list(pushed)
            self.count += all(map(is_training, pushed))
            return super().push_messages(pushed)

        def fault(self, message, context):
            fails = self.count == 2 or (self.count == 1 and context.node_config["partition-id"] != 0)
            return "client error" if fails else None

    start(make(output_dir=tmp_path), Unlucky(recording_app(), K))
    assert_each_used_once(RecordingRunner.latest, K, 1)
    assert summary_of(tmp_path)["steps_redone"] >= 2


class SendsAnotherShape(SplitClient):
    """The first client that is asked sends what the server half cannot take."""

    first = None

    def forward(self, half, inputs):
        (activations,) = super().forward(half, inputs)
        if SendsAnotherShape.first is None:
            SendsAnotherShape.first = self.partition_id
        return (activations[:, :1] if SendsAnotherShape.first == self.partition_id else activations,)


def test_one_client_does_not_settle_alone_what_crosses_the_cut(tmp_path):
    SendsAnotherShape.first = None
    strategy = make(sampler=UniformGlobalSampler(1), num_clients=3, output_dir=tmp_path, patience=1.0)
    app = split_client_app(tiny_resnet, cut=CUT, data_fn=load_partition, client_class=SendsAnotherShape)
    start(strategy, InProcessGrid(app, 3))
    bad = SendsAnotherShape.first
    summary = summary_of(tmp_path)
    assert set(summary["examples_unseen"]) == {str(bad)}
    assert summary["steps_committed"] == sum(client_sizes(3)) - client_sizes(3)[bad]
    assert summary["refused"].keys() == {"shape"}


def test_a_first_step_of_few_clients_that_fail_differently_is_no_bug_of_all(tmp_path):
    class Unlucky(FaultyGrid):
        asked = ()

        def push_messages(self, pushed):
            pushed = list(pushed)
            if not self.asked and all(map(is_training, pushed)):
                self.asked = [m.metadata.dst_node_id for m in pushed]
            return super().push_messages(pushed)

        def fault(self, message, context):
            if self.asked and message.metadata.dst_node_id in self.asked[:2]:
                return ("client error", "timeout")[self.asked.index(message.metadata.dst_node_id)]
            return None

    grid = Unlucky(recording_app(), K)
    strategy = make(sampler=UniformGlobalSampler(2), output_dir=tmp_path, patience=1.0)
    start(strategy, grid)
    assert len(grid.asked) == 2
    assert len(summary_of(tmp_path)["examples_unseen"]) == 2
    assert summary_of(tmp_path)["steps_committed"]


def test_when_all_clients_go_the_run_ends_with_what_happened():
    class AllDown(FaultyGrid):
        def push_messages(self, pushed):
            if self._pushes == 9:
                self.down = set(self._contexts)
            return super().push_messages(pushed)

    with pytest.raises(
        StepError, match=r"round 1, step 4: no step could be .*, all clients fail(?s:.*)client 0 \(node 2\).*: no reply"
    ):
        start(make(), AllDown(recording_app(), K), num_rounds=3)


def test_evaluation_goes_on_without_a_client_but_not_without_all(tmp_path, caplog):
    class FailsToEvaluate(SplitClient):
        failing = ()

        def draw_batch(self, order):
            if order.test and self.partition_id in self.failing:
                raise OSError("no test data today")
            return super().draw_batch(order)

    app = split_client_app(tiny_resnet, cut=CUT, data_fn=load_partition_with_test, client_class=FailsToEvaluate)
    FailsToEvaluate.failing = (1,)
    result = start(make(evaluate_every=1, output_dir=tmp_path), InProcessGrid(app, K))
    others = sum(n // 2 for k, n in enumerate(client_sizes(K)) if k != 1)
    assert result.evaluate_metrics_clientapp[1]["num_examples"] == others
    assert "evaluation goes on without client 1 (node 3): test_faults.py:" in caplog.text
    assert "OSError: no test data today" in caplog.text
    assert "Failures in evaluation: client error 1; of clients: 1 (1)" in caplog.text
    summary = summary_of(tmp_path)
    assert (summary["evaluation_refused"], summary["refused"]) == ({"client error": 1}, {})
    assert summary["evaluation_failures"] == {"1": 1}
    FailsToEvaluate.failing = range(K)
    with pytest.raises(StepError, match=r"round 1, evaluation: .* clients failed"):
        start(make(evaluate_every=1), InProcessGrid(app, K))


def test_a_node_that_does_not_describe_itself_is_left_out(caplog):
    def load(context):
        if context.node_config["partition-id"] == 2:
            raise OSError("no data here")
        return load_partition_with_test(context)[0]

    result = start(make(), InProcessGrid(recording_app(load), K))
    assert result.train_metrics_clientapp[1]["num_examples"] == sum(client_sizes(K)) - client_sizes(K)[2]
    assert "going on without it: client 2 (node 4): test_faults.py:" in caplog.text
    with pytest.raises(MembershipError, match=r"(?s)every client must describe itself.*no data here"):
        start(make(min_available_nodes=K), InProcessGrid(recording_app(load), K))


# --- mistakes: code that raises, and replies that are not what was asked for -----------------------------------------
MISTAKES = [*(kind for kind in CHANGES if kind != "label range"), "client error"]


@pytest.mark.parametrize("message_type", [FORWARD, BACKWARD])
@pytest.mark.parametrize("kind", MISTAKES)
def test_the_first_mistake_ends_a_run_in_process(kind, message_type, tmp_path):
    stage = message_type.removeprefix("train.")
    grid = OneFault(kind, message_type)
    with pytest.raises(StepError, match=rf"round 1, step 2: a mistake of client 1 \(node 3\) in {stage}.*") as e:
        start(make(output_dir=tmp_path, mistakes=None), grid)
    (failure,) = e.value.failures.values()
    assert failure.kind.value == kind
    assert "FaultPolicy(mistakes='exclude')" in str(e.value)
    assert f"\n  client 1 (node 3): {failure.detail}" in str(e.value)
    assert len(RecordingRunner.latest.committed) == 2
    assert summary_of(tmp_path)["refused"] == {kind: 1} == +grid.injected


def test_labels_that_are_no_classes_end_a_run_in_process(tmp_path):
    message = r"a mistake of client 1 \(node 3\) in forward(?s:.*)client 1 \(node 3\): .*labels must be class indices"
    with pytest.raises(StepError, match=message):
        start(make(output_dir=tmp_path, mistakes=None), OneFault("label range", FORWARD))


@pytest.mark.parametrize("kind", ["timeout", "late", "duplicate"])
def test_an_outage_is_no_mistake(kind, tmp_path):
    grid = OneFault(kind, FORWARD)
    start(make(output_dir=tmp_path, mistakes=None), grid)
    assert_each_used_once(RecordingRunner.latest, K, 1)
    assert summary_of(tmp_path)["refused"] == +grid.injected
    assert summary_of(tmp_path)["excluded"] == {}


@pytest.mark.parametrize("message_type", [FORWARD, BACKWARD])
@pytest.mark.parametrize("kind", MISTAKES)
def test_whoever_makes_a_mistake_is_excluded_for_the_run(kind, message_type, tmp_path, caplog):
    # in a backward pass a client has a second chance
    grid = OneFault(kind, message_type, times=1 if message_type == FORWARD else 2)
    result = start(make(output_dir=tmp_path, mistakes="exclude"), grid, num_rounds=2)
    used = RecordingRunner.latest.used()
    assert 0 < len(used[0, 1]) < client_sizes(K)[1]
    assert used[1, 1] == []
    assert_each_used_once(RecordingRunner.latest, K, 2, but=[(0, 1), (1, 1)])
    assert grid.seen <= 4 + (message_type == BACKWARD)  # and not asked again
    summary = summary_of(tmp_path)
    assert list(summary["excluded"]) == ["1"]
    assert summary["refused"] == +grid.injected
    which = f"client 1 (node 3): {summary['excluded']['1']}"
    assert f"left out for the rest of the run, for a mistake: {which}" in caplog.text
    assert f"The run went without clients that made a mistake: {which}" in caplog.text
    assert result.train_metrics_clientapp[1]["examples_unseen"] == client_sizes(K)[1] - len(used[0, 1])
    assert result.train_metrics_clientapp[2]["num_clients"] == 4  # one has no data


def test_in_a_deployment_mistakes_exclude_unless_told_otherwise(tmp_path, monkeypatch):
    monkeypatch.setattr(meeting_module, "is_deployment", lambda grid: True)
    start(make(output_dir=tmp_path, mistakes=None), OneFault("client error", FORWARD))
    assert list(summary_of(tmp_path)["excluded"]) == ["1"]
    with pytest.raises(StepError, match=r"a mistake of client 1 \(node 3\) in forward"):
        start(make(mistakes="stop"), OneFault("client error", FORWARD))


def test_once_nobody_is_left_the_run_ends(tmp_path):
    """One client holds no examples, and is never asked."""

    class AllErr(FaultyGrid):
        def fault(self, message, context):
            return "client error" if len(RecordingRunner.latest.committed) > 2 else None

    with pytest.raises(StepError, match=r"every client made a mistake, nobody is left(?s:.*)OSError: disk on fire"):
        start(make(output_dir=tmp_path, mistakes="exclude"), AllErr(recording_app(), K), num_rounds=3)
    holders = [str(k) for k, size in enumerate(client_sizes(K)) if size]
    assert sorted(summary_of(tmp_path)["excluded"]) == holders


class RefusesOneHalf:
    """A loss that finds labels wrong and cannot tell which."""

    def __call__(self, outputs, labels):
        return F.cross_entropy(outputs[:, :2], (labels + 1) % 4)


@pytest.mark.parametrize("mistakes", ["stop", "exclude", "retry"])
def test_labels_that_are_nobodys_end_the_run(mistakes):
    with pytest.raises(StepError, match="labels must be class indices from 0 to 1"):
        start(make(mistakes=mistakes, loss=RefusesOneHalf()), InProcessGrid(recording_app(), K))


# --- the server half -------------------------------------------------------------------------------------------------
class DivergesOnce:
    """A loss that is NaN at one call."""

    def __init__(self, at, times=1):
        self.at, self.times, self.calls = at, times, 0

    def __call__(self, outputs, labels):
        self.calls += 1
        factor = float("nan") if self.at <= self.calls < self.at + self.times else 1.0
        return F.cross_entropy(outputs, labels) * factor


def test_a_step_that_is_not_finite_may_be_skipped(tmp_path):
    sampler = UniformGlobalSampler(24, seed=3)
    strategy = make(sampler=sampler, output_dir=tmp_path, non_finite_loss="skip", loss=DivergesOnce(4))
    result = start(strategy, InProcessGrid(recording_app(), K))
    batches = list(planned_batches(sampler.plan(population(K)), K, seed=3, epoch=0, dtype=torch.float32))
    skipped = len(batches.pop(3)[1])
    state = result.arrays.to_torch_state_dict()
    assert largest_difference(state, train_centralised(tiny_resnet(), batches, sgd)) < 1e-5
    summary = summary_of(tmp_path)
    assert (summary["steps_skipped"], summary["examples_skipped"]) == (1, skipped)


def test_many_steps_in_a_row_that_are_not_finite_end_the_run():
    with pytest.raises(StepError, match="10 steps in a row are not finite: training diverges"):
        start(make(non_finite_loss="skip", loss=DivergesOnce(2, times=99)), InProcessGrid(recording_app(), K))
    with pytest.raises(StepError, match="round 1, step 1: the loss is nan: training diverges"):
        start(make(loss=DivergesOnce(2)), InProcessGrid(recording_app(), K))


class Exaggerates(SplitClient):
    """Client 1's gradients are a million times too large."""

    def forward(self, half, inputs):
        (activations,) = super().forward(half, inputs)
        factor = 1e6 if self.partition_id == 1 else 1.0
        return ((activations - activations.detach()) * factor + activations.detach(),)


@pytest.mark.parametrize("transport", ["messages", "streams"])
def test_contributions_are_bounded_on_request(transport, tmp_path):
    app = split_client_app(
        tiny_resnet, cut=CUT, data_fn=lambda c: load_partition_with_test(c)[0], client_class=Exaggerates
    )

    def train(most):
        strategy = make(output_dir=tmp_path, max_gradient_norm=most, transport=transport, optimizer=plain_sgd)
        return start(strategy, InProcessGrid(app, K)).arrays.to_torch_state_dict()

    state = train(1.0)
    summary = summary_of(tmp_path)
    assert 1 <= summary["clipped"] <= 2 * summary["steps_committed"]
    initial = tiny_resnet().state_dict()
    moved = (
        sum(float((state[n] - t).norm() ** 2) for n, t in initial.items() if n.startswith(("stem", "layer1"))) ** 0.5
    )
    assert moved < 0.1 * summary["steps_committed"]  # the learning rate times the norm, a step


def plain_sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


# --- the summary -----------------------------------------------------------------------------------------------------
def test_a_faultless_run_says_so(tmp_path, caplog):
    caplog.set_level(logging.INFO, "flwr.psl_flower")
    begin = time.monotonic()
    start(make(output_dir=tmp_path), InProcessGrid(recording_app(), K))
    wall = time.monotonic() - begin
    summary = summary_of(tmp_path)
    steps = summary.pop("steps_committed")
    assert f"Faults: none in {steps} steps" in caplog.text
    seconds = summary.pop("seconds")
    assert set(seconds) == set(SPENT)
    assert all(spent > 0 for on, spent in seconds.items() if on != "waiting")
    assert seconds["waiting"] == 0
    assert sum(seconds.values()) <= wall  # each moment counts once
    slowest = summary.pop("slowest_clients_seconds_per_example")
    assert len(slowest) == 5
    assert list(slowest.values()) == sorted(slowest.values(), reverse=True)
    assert not any(summary.values()), summary


def test_a_failed_run_leaves_its_summary(tmp_path):
    with pytest.raises(StepError):
        start(make(output_dir=tmp_path, tolerate=False), OneFault("client error", FORWARD))
    assert summary_of(tmp_path)["refused"] == {"client error": 1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tolerate": 1}, "tolerate must be True or False, got 1"),
        ({"mistakes": "ignore"}, "mistakes must be one of 'stop', 'exclude', 'retry', got 'ignore'"),
        ({"step_timeout": 0}, "step_timeout must be greater than 0"),
        ({"min_batch_fraction": 1.5}, "min_batch_fraction must be at most 1, got 1.5"),
        ({"min_batch_fraction": -1}, "min_batch_fraction must be at least 0"),
        ({"patience": -1}, "patience must be at least 0"),
        ({"join": "now"}, "join must be one of 'epoch', 'step', got 'now'"),
        ({"non_finite_loss": "ignore"}, "non_finite_loss must be one of 'stop', 'skip'"),
        ({"max_gradient_norm": 0}, "max_gradient_norm must be greater than 0"),
    ],
)
def test_policies_are_checked(options, message):
    with pytest.raises(ConfigError, match=message):
        FaultPolicy(**options)
