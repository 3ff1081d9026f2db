"""Checkpoints of whole runs: what a resumed run ends with is what an uninterrupted one does."""

import json

import pytest
import torch
from flwr.app import ArrayRecord, MetricRecord
from killed import Killed, dying_after
from support import (
    CUT,
    NUM_CLASSES,
    adam,
    largest_difference,
    load_partition_with_test,
    population,
    sgd,
    state_of,
    tiny_resnet,
)

from psl_flower import (
    FaultPolicy,
    InProcessGrid,
    ParallelSplitLearning,
    SplitClient,
    UniformGlobalSampler,
    split_client_app,
)
from psl_flower.errors import ConfigError, MembershipError
from psl_flower.exchange.messages import MessageCarrier
from psl_flower.samplers.registry import SAMPLERS
from psl_flower.stragglers import DelayEstimator, delay_model
from psl_flower.strategy import strategy as strategy_module

K = 5


def make(folder, *, sampler=None, model=None, cut=CUT, optimizer=sgd, **options):
    return ParallelSplitLearning(
        model or tiny_resnet(),
        cut=cut,
        sampler=sampler or UniformGlobalSampler(32, seed=3),
        optimizer=optimizer,
        output_dir=folder,
        min_available_nodes=K,
        **options,
    )


def client_app(client_class=SplitClient):
    return split_client_app(tiny_resnet, cut=CUT, data_fn=load_partition_with_test, client_class=client_class)


def start(strategy, *, num_rounds=2, grid=None, evaluate_fn=None):
    arrays = ArrayRecord(tiny_resnet().state_dict())
    return strategy.start(grid or InProcessGrid(client_app(), K), arrays, num_rounds, evaluate_fn=evaluate_fn)


class KillingGrid(InProcessGrid):
    """Ends the run at the `at`-th push of messages."""

    def __init__(self, at, client_class=SplitClient):
        super().__init__(client_app(client_class), K)
        self.left = at

    def push_messages(self, messages):
        self.left -= 1
        if self.left < 0:
            raise Killed
        return super().push_messages(messages)


def killed(strategy, at, **options):
    with pytest.raises(Killed):
        start(strategy, grid=KillingGrid(at), **options)


def lines(folder):
    kept = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timing = {"seconds_real", "seconds_plan"}
    return [{k: v for k, v in line.items() if k not in timing} for line in kept]


def make_sampler(name):
    return SAMPLERS[name](population(K).num_examples // 12, seed=3)


PLAN = UniformGlobalSampler(32, seed=3).plan(population(K))


def options_for(name):
    return {"sampler": make_sampler(name), "delays": delay_model("slow-fraction", seed=1, fraction=0.4)}


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_a_resumed_run_ends_as_an_uninterrupted_one(name, tmp_path, caplog):
    caplog.set_level("INFO", "flwr.psl_flower")
    options = {**options_for(name), "optimizer": adam, "checkpoint_every": 3}
    whole = start(make(tmp_path / "whole", **options))
    steps = sum(line["kind"] == "step" and line["round"] == 1 for line in lines(tmp_path / "whole"))
    # describing, a round, its evaluation and eight steps: in the second round, between two checkpoints
    killed(make(tmp_path / "cut", **options), 1 + 2 * steps + 1 + 2 * 8)
    resumed = start(make(tmp_path / "cut", **options, resume_from="latest"))
    assert "Resumed in round 2, after step 6." in caplog.text
    assert largest_difference(state_of(resumed), state_of(whole)) == 0
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
    assert resumed.evaluate_metrics_clientapp == whole.evaluate_metrics_clientapp
    assert list(resumed.train_metrics_clientapp) == [1, 2]
    summary = json.loads((tmp_path / "cut" / "summary.json").read_text())
    assert summary["resumed"] == 1
    assert summary["steps_committed"] == sum(line["kind"] == "step" for line in lines(tmp_path / "whole"))


class Absent(SplitClient):
    """Client 1 fails in a few steps of the second round."""

    def draw_batch(self, order):
        if order.client == 1 and order.epoch == 1 and 1 <= order.step < 8:
            raise OSError("not now")
        return super().draw_batch(order)


@pytest.mark.parametrize("name", ["fls", "ugs", "aligned"])
def test_resuming_while_a_client_is_left_out(name, tmp_path, monkeypatch):
    """What it owes, the plan without it and when it is tried again are in the checkpoint."""
    options = {**options_for(name), "checkpoint_every": 3, "faults": FaultPolicy(mistakes="retry")}

    def run(folder, **more):
        return start(make(tmp_path / folder, **options, **more), grid=InProcessGrid(client_app(Absent), K))

    whole = run("whole")
    commits = sum(line["kind"] == "step" and line["round"] == 1 for line in lines(tmp_path / "whole")) + 8

    with monkeypatch.context() as patch:
        patch.setattr(strategy_module, "LocalBackend", dying_after(commits))
        with pytest.raises(Killed):
            run("cut")
    resumed = run("cut", resume_from="latest")
    assert largest_difference(state_of(resumed), state_of(whole)) == 0
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
    faults = [json.loads((tmp_path / folder / "summary.json").read_text()) for folder in ("cut", "whole")]
    assert faults[0]["failures"] == faults[1]["failures"]
    assert faults[1]["failures"]["1"] > 1
    assert faults[0]["replans"] == faults[1]["replans"] > 0


def scheduler(optimizer):
    return torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.3)


def cosine(optimizer):
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=5)


@pytest.mark.parametrize("scheduler", [scheduler, cosine])
def test_killed_again_and_again(scheduler, tmp_path):
    options = {"checkpoint_every": 4, "scheduler": scheduler}
    whole = start(make(tmp_path / "whole", **options))
    for at in (9, 30, 12):
        killed(make(tmp_path / "cut", **options, resume_from="latest"), at)
    resumed = start(make(tmp_path / "cut", **options, resume_from="latest"))
    assert largest_difference(state_of(resumed), state_of(whole)) == 0
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")


def test_an_error_in_evaluate_fn_loses_nothing(tmp_path):
    def evaluate(server_round, arrays):
        if server_round == 2:
            raise OSError("disk full")
        return MetricRecord({"accuracy": 0.5})

    def evaluate_well(server_round, arrays):
        assert server_round != 0  # was done before
        return MetricRecord({"accuracy": 0.5})

    with pytest.raises(OSError, match="disk full"):
        start(make(tmp_path / "cut"), evaluate_fn=evaluate)
    strategy = make(tmp_path / "cut", resume_from="latest")
    grid = KillingGrid(10**6)
    resumed = start(strategy, evaluate_fn=evaluate_well, grid=grid)
    assert 10**6 - grid.left == 2  # describing and the clients' evaluation: nothing was trained again
    whole = start(make(tmp_path / "whole"), evaluate_fn=lambda r, a: MetricRecord({"accuracy": 0.5}))
    assert largest_difference(state_of(resumed), state_of(whole)) == 0
    assert resumed.evaluate_metrics_serverapp == whole.evaluate_metrics_serverapp
    rounds = [line["round"] for line in lines(tmp_path / "cut") if line["kind"] == "round"]
    assert rounds == [1, 2]


def test_a_finished_run_can_be_prolonged(tmp_path):
    start(make(tmp_path / "two"), num_rounds=2)
    longer = start(make(tmp_path / "two", resume_from="latest"), num_rounds=3)
    whole = start(make(tmp_path / "three"), num_rounds=3)
    assert largest_difference(state_of(longer), state_of(whole)) == 0


def test_from_a_path_into_another_folder(tmp_path, caplog):
    whole = start(make(tmp_path / "a"), num_rounds=2)
    first = start(make(tmp_path / "one"), num_rounds=1)
    (path,) = (tmp_path / "one" / "checkpoints").iterdir()
    resumed = start(make(tmp_path / "b", resume_from=path), num_rounds=2)
    assert largest_difference(state_of(resumed), state_of(whole)) == 0
    assert largest_difference(state_of(first), state_of(whole)) > 0
    assert "The metrics before the checkpoint are not in" in caplog.text


def test_latest_without_a_checkpoint_starts_from_the_beginning(tmp_path, caplog):
    start(make(tmp_path, resume_from="latest"), num_rounds=1)
    assert "There is no checkpoint in" in caplog.text
    assert (tmp_path / "model.safetensors").exists()


def test_the_last_few_are_kept_and_a_new_run_puts_all_that_is_there_aside(tmp_path, caplog):
    start(make(tmp_path, checkpoint_every=2, keep_checkpoints=3), num_rounds=2)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert len(names) == 3
    assert all(name.startswith("round-00002") for name in names)
    (tmp_path / "notes.txt").write_text("mine")
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    for runs in (1, 2):
        start(make(tmp_path), num_rounds=1)
        assert [p.name[:11] for p in (tmp_path / "checkpoints").iterdir()] == ["round-00001"]
        assert len(list(tmp_path.glob("earlier-*"))) == runs
    aside = min(tmp_path.glob("earlier-*"), key=lambda path: path.name)
    assert sorted(path.name for path in (aside / "checkpoints").iterdir()) == names
    assert files.pop("notes.txt") == (tmp_path / "notes.txt").read_bytes()
    assert {path.name: path.read_bytes() for path in aside.iterdir() if path.is_file()} == files
    assert {"metrics.jsonl", "model.safetensors", "config.json", "summary.json"} <= files.keys()
    assert f"What an earlier run has left in {tmp_path} is now in {aside.name}" in caplog.text


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, caplog):
    options = {"checkpoint_every": 4}
    whole = start(make(tmp_path / "whole", **options))
    killed(make(tmp_path / "cut", **options), 30)
    last = max((tmp_path / "cut" / "checkpoints").iterdir())
    last.write_bytes(last.read_bytes()[:-100])
    resumed = start(make(tmp_path / "cut", **options, resume_from="latest"))
    assert f"{last} is no checkpoint, or damaged" in caplog.text
    assert largest_difference(state_of(resumed), state_of(whole)) == 0
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")


def test_no_checkpoints_on_request(tmp_path):
    start(make(tmp_path, keep_checkpoints=0), num_rounds=1)
    assert not (tmp_path / "checkpoints").exists()


def wider():
    model = tiny_resnet()
    model.head = torch.nn.Linear(4, NUM_CLASSES + 1)
    return model


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        ({"model": wider()}, r"model: head.weight: the checkpoint has 'torch.float32 \(4, 4\)', this run .*\(5, 4\)'"),
        ({"cut": "layer1"}, "cut: the checkpoint has 'layer2', this run 'layer1'"),
        ({"sampler": UniformGlobalSampler(8, seed=3)}, "sampler: batch_size: the checkpoint has 32, this run 8"),
        ({"sampler": UniformGlobalSampler(32, seed=4)}, "sampler: seed: the checkpoint has 3, this run 4"),
        ({"optimizer": adam}, "optimizer: class: the checkpoint has 'SGD', this run 'Adam'"),
        ({"scheduler": scheduler}, "scheduler: class: the checkpoint has None, this run 'StepLR'"),
        ({"classification": False}, "classification: the checkpoint has True, this run False"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_with_the_difference(options, difference, tmp_path):
    start(make(tmp_path), num_rounds=1)
    model = options.get("model") or tiny_resnet()
    with pytest.raises(ConfigError, match=f"the checkpoint is not of this run: {difference}"):
        make(tmp_path, **options, resume_from="latest").start(None, ArrayRecord(model.state_dict()), 2)
    assert (tmp_path / "model.safetensors").exists()  # nothing was touched


def with_rate(rate):
    return lambda parameters: torch.optim.SGD(parameters, lr=rate)


@pytest.mark.parametrize("schedule", [None, scheduler])
def test_another_learning_rate_is_used_and_told(schedule, tmp_path, caplog):
    """The first round is trained with one rate and the second with the other, as in two runs of one round each."""
    start(make(tmp_path, optimizer=with_rate(0.1), scheduler=schedule), num_rounds=1)
    resumed = make(tmp_path, optimizer=with_rate(0.02), scheduler=schedule, resume_from="latest")
    second = start(resumed)
    assert "new ones are used:\n  num_rounds was 1, now 2\n  optimizer: group 0: lr was 0.1, now 0.02" in caplog.text
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["strategy"]["optimizer"]["group 0"]["lr"] == 0.02
    (change,) = config["changes"]
    assert (change["round"], change["step"]) == (1, len(PLAN))
    assert change["changes"] == {"num_rounds": [1, 2], "optimizer: group 0: lr": [0.1, 0.02]}

    class Switched(torch.optim.SGD):
        """SGD that has the second rate from the second epoch on."""

        steps = 0

        def step(self, closure=None):
            factor = 0.3 if schedule else 1.0
            self.param_groups[0]["lr"] = 0.1 if self.steps < len(PLAN) else 0.02 * factor
            self.steps += 1
            return super().step(closure)

    whole = start(make(tmp_path / "whole", optimizer=lambda p: Switched(p, lr=0.1)), num_rounds=2)
    assert largest_difference(state_of(second), state_of(whole)) == pytest.approx(0, abs=1e-6)


def test_settings_that_did_not_change_are_not_told(tmp_path, caplog):
    start(make(tmp_path, **options_for("aligned"), scheduler=cosine))
    start(make(tmp_path, **options_for("aligned"), scheduler=cosine, resume_from="latest"))
    assert "changed since" not in caplog.text
    assert json.loads((tmp_path / "config.json").read_text())["changes"] == []


def test_fewer_rounds_than_done_give_the_checkpoints_model(tmp_path, caplog):
    whole = start(make(tmp_path), num_rounds=2)
    resumed = start(make(tmp_path, resume_from="latest"), num_rounds=1)
    assert largest_difference(state_of(resumed), state_of(whole)) == 0
    assert f"num_rounds is 1, but the checkpoint is of round 2, after step {len(PLAN)}: nothing" in caplog.text
    assert list(resumed.train_metrics_clientapp) == [1]


def test_newer_checkpoints_of_another_branch_are_kept(tmp_path):
    start(make(tmp_path, checkpoint_every=4, keep_checkpoints=100))
    first, *others = sorted((tmp_path / "checkpoints").iterdir())
    newer = {path.name: path.read_bytes() for path in others}
    start(make(tmp_path, checkpoint_every=4, keep_checkpoints=2, resume_from=first), num_rounds=1)
    assert {path.name: path.read_bytes() for path in (tmp_path / "checkpoints.aside").iterdir()} == newer
    assert first.name not in {path.name for path in (tmp_path / "checkpoints").iterdir()}  # as many as are kept


def test_two_runs_do_not_write_to_one_folder(tmp_path):
    refused = []

    def begin_another(server_round, arrays):
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        with pytest.raises(ConfigError, match=r"another run writes to .*: process \d+ on "):
            start(make(tmp_path, resume_from="latest"))
        refused.append(before == {path: path.read_bytes() for path in before})

    start(make(tmp_path), num_rounds=1, evaluate_fn=begin_another)
    assert refused == [True, True]
    start(make(tmp_path, resume_from="latest"), num_rounds=1)


class Shrunk(SplitClient):
    def __init__(self, train, test=None, **options):
        super().__init__(torch.utils.data.Subset(train.dataset, range(7)), test, **options)


def test_clients_with_other_data_are_refused(tmp_path):
    killed(make(tmp_path, checkpoint_every=2), 9)
    strategy = make(tmp_path, resume_from="latest")
    with pytest.raises(MembershipError, match="client 0 held 80 examples when the checkpoint was written, now it hol"):
        start(strategy, grid=InProcessGrid(client_app(Shrunk), K))


def test_measured_delays_are_remembered(tmp_path, caplog):
    killed(make(tmp_path, delays=DelayEstimator(window=1000), checkpoint_every=3), 15)
    strategy = make(tmp_path, delays=DelayEstimator(window=1000), resume_from="latest")
    caplog.set_level("INFO", "flwr.psl_flower")
    start(strategy, num_rounds=1)
    assert "Resumed in round 1, after step 6." in caplog.text  # steps whose deviation is not known yet count, too
    replies = sum(len(client["quotas"]) for client in strategy._stragglers.planned.state_dict()["clients"].values())
    assert replies == sum(line["clients"] for line in lines(tmp_path) if line["kind"] == "step")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"checkpoint_every": -1}, "checkpoint_every must be at least 0"),
        ({"keep_checkpoints": -1}, "keep_checkpoints must be at least 0"),
        (
            {"checkpoint_every": 5, "folder": None},
            "keep_checkpoints of at least 1, got None and 2",
        ),
        ({"checkpoint_every": 5, "keep_checkpoints": 0}, "need an output_dir and keep_checkpoints of at least 1"),
        ({"resume_from": "latest", "folder": None}, "need an output_dir"),
    ],
)
def test_options_are_checked_at_construction(options, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        make(**{"folder": tmp_path, **options})


def test_a_path_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"resume_from: there is no checkpoint .*nowhere"):
        start(make(tmp_path, resume_from=tmp_path / "nowhere"))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "round-00001-step-0000012.safetensors").touch()
    for folder in (tmp_path, tmp_path / "checkpoints"):
        with pytest.raises(
            ConfigError, match=rf"no checkpoint {folder}: one in that folder is .*-0000012\.safetensors"
        ):
            start(make(tmp_path, resume_from=folder))


# --- the end of a run, however it comes ------------------------------------------------------------------------------
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_whatever_ends_a_run_closes_the_carrier_and_leaves_a_valid_checkpoint(error, tmp_path, monkeypatch):
    closed = []

    class Watched(MessageCarrier):
        def close(self):
            closed.append(True)
            super().close()

    def evaluate(server_round, arrays):
        if server_round == 1:
            raise error

    monkeypatch.setattr(strategy_module, "open_carrier", lambda grid, *options: Watched(grid))
    with pytest.raises(error):
        start(make(tmp_path / "cut"), evaluate_fn=evaluate)
    assert closed == [True]
    assert (tmp_path / "cut" / "summary.json").exists()
    monkeypatch.undo()
    resumed = start(make(tmp_path / "cut", resume_from="latest"))
    whole = start(make(tmp_path / "whole"))
    assert largest_difference(state_of(resumed), state_of(whole)) == 0
