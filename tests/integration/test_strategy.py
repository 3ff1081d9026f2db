"""The whole strategy on InProcessGrid: FedAvg's contract, what a run leaves behind, what happens when clients fail."""

import copy
import inspect
import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from faulty import (
    BACKWARD,
    EVALUATE,
    FORWARD,
    change_reply,
    changed_output,
    changed_parts,
    changed_tensor,
    poisoned,
)
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from flwr.serverapp.strategy import FedAvg, Strategy
from safetensors.torch import load_file
from support import (
    CUT,
    NUM_CLASSES,
    client_data,
    client_sizes,
    largest_difference,
    load_partition,
    load_partition_with_test,
    planned_batches,
    population,
    sgd,
    state_of,
    tiny_resnet,
    train_centralised,
)
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from psl_flower import (
    InProcessGrid,
    ParallelSplitLearning,
    SplitClient,
    SplitModel,
    UniformGlobalSampler,
    split_client_app,
)
from psl_flower.callbacks import EarlyStopping
from psl_flower.errors import ConfigError, MembershipError, ProtocolError, StepError
from psl_flower.exchange import frames
from psl_flower.exchange.records import content_to_frame, frame_to_content
from psl_flower.faults import FaultPolicy
from psl_flower.server import LocalBackend
from psl_flower.strategy import strategy as strategy_module

K = 3
STRICT = FaultPolicy(tolerate=False)
SAMPLER = UniformGlobalSampler(40, seed=3)
STEPS = len(SAMPLER.plan(population(K)))


def make(
    model=None, model_fn=tiny_resnet, cut=CUT, data_fn=load_partition, num_nodes=K, client_class=SplitClient, **options
):
    """Return a strategy and the grid it runs on."""
    app = split_client_app(model_fn, cut=cut, data_fn=data_fn, client_class=client_class)
    strategy = ParallelSplitLearning(
        model or model_fn(),
        cut=cut,
        **{"sampler": SAMPLER, "optimizer": sgd, "min_available_nodes": num_nodes, **options},
    )
    return strategy, InProcessGrid(app, num_nodes)


def run(model=None, *, model_fn=tiny_resnet, arrays=None, num_rounds=1, start=None, **options):
    strategy, grid = make(model, model_fn, **options)
    arrays = arrays or ArrayRecord((model or model_fn()).state_dict())
    return strategy.start(grid, arrays, num_rounds=num_rounds, **(start or {}))


# --- FedAvg's contract -----------------------------------------------------------------------------------------------
def test_is_a_strategy_with_fedavgs_start():
    assert issubclass(ParallelSplitLearning, Strategy)
    ours = inspect.signature(ParallelSplitLearning.start).parameters
    theirs = inspect.signature(FedAvg.start).parameters
    assert {n: (p.kind, p.default) for n, p in ours.items()} == {n: (p.kind, p.default) for n, p in theirs.items()}


def test_result_has_the_fields_of_every_round():
    result = run(num_rounds=2, data_fn=load_partition_with_test)
    assert list(result.train_metrics_clientapp) == [1, 2]
    assert list(result.evaluate_metrics_clientapp) == [1, 2]
    assert result.evaluate_metrics_serverapp == {}
    metrics = result.train_metrics_clientapp[1]
    assert isinstance(metrics, MetricRecord)
    assert metrics["num_examples"] == sum(client_sizes(K))
    assert (metrics["num_steps"], metrics["num_clients"]) == (STEPS, K)
    assert 0 <= metrics["accuracy"] <= 1
    assert metrics["loss"] > result.train_metrics_clientapp[2]["loss"]  # it learns
    assert metrics["bytes_sent"] > 0
    assert metrics["bytes_received"] > 0
    str(result)  # Flower prints it


def test_arrays_out_are_the_models_state_dict():
    result, template = run(), tiny_resnet().state_dict()
    state = state_of(result)
    assert list(state) == list(template)
    assert {n: (t.dtype, t.shape) for n, t in state.items()} == {n: (t.dtype, t.shape) for n, t in template.items()}
    assert state["layer2.norm1.num_batches_tracked"] == STEPS
    assert not torch.equal(state["layer2.norm1.running_mean"], template["layer2.norm1.running_mean"])
    tiny_resnet().load_state_dict(state)


def test_evaluate_fn_is_called_before_the_first_round_and_after_each():
    calls = []

    def evaluate(server_round, arrays):
        calls.append((server_round, arrays.to_torch_state_dict()))
        return MetricRecord({"accuracy": server_round / 10}) if server_round != 1 else None

    initial = ArrayRecord(tiny_resnet(seed=5).state_dict())
    result = run(arrays=initial, num_rounds=2, start={"evaluate_fn": evaluate})
    assert [r for r, _ in calls] == [0, 1, 2]
    assert largest_difference(calls[0][1], initial.to_torch_state_dict()) == 0
    assert largest_difference(calls[2][1], state_of(result)) == 0
    assert largest_difference(calls[1][1], calls[2][1]) > 0
    assert {r: dict(m) for r, m in result.evaluate_metrics_serverapp.items()} == {
        0: {"accuracy": 0.0},
        2: {"accuracy": 0.2},
    }


def test_training_starts_from_the_arrays_given():
    model = tiny_resnet(seed=9)
    result = run(tiny_resnet(seed=1), arrays=ArrayRecord(model.state_dict()))
    batches = planned_batches(SAMPLER.plan(population(K)), K, seed=3, epoch=0, dtype=torch.float32)
    assert largest_difference(state_of(result), train_centralised(model, batches, sgd)) < 1e-5


def test_a_strategy_can_be_started_again():
    strategy, grid = make()
    arrays = ArrayRecord(tiny_resnet().state_dict())
    first, second = (strategy.start(grid, arrays, num_rounds=1) for _ in range(2))
    assert largest_difference(state_of(first), state_of(second)) == 0
    on_another_grid = strategy.start(make()[1], arrays, num_rounds=1)
    assert largest_difference(state_of(first), state_of(on_another_grid)) == 0


class CountsForItself(nn.Module):
    """Its server half keeps a buffer that is not part of the state dict."""

    def __init__(self):
        super().__init__()
        self.net = tiny_resnet()
        self.out = ScaledByCalls()

    def forward(self, x):
        return self.out(self.net(x))


class ScaledByCalls(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.ones(1), persistent=False)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        self.calls += self.training
        return x * self.scale / self.calls


def test_nothing_of_a_run_is_left_for_the_next():
    strategy, grid = make(model_fn=CountsForItself, cut="net.layer2")
    arrays = ArrayRecord(CountsForItself().state_dict())
    first, second = (strategy.start(grid, arrays, num_rounds=1) for _ in range(2))
    assert largest_difference(state_of(first), state_of(second)) == 0


def test_the_model_given_and_torchs_generator_are_left_alone():
    model = tiny_resnet()
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    run(model, data_fn=load_partition_with_test)
    assert largest_difference(model.state_dict(), before) == 0
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        ("configure_train", (1, ArrayRecord(), ConfigRecord(), None)),
        ("aggregate_train", (1, [])),
        ("configure_evaluate", (1, ArrayRecord(), ConfigRecord(), None)),
        ("aggregate_evaluate", (1, [])),
    ],
)
def test_message_based_methods_name_start(method, arguments):
    with pytest.raises(ConfigError, match=r"call strategy\.start\(grid, initial_arrays, num_rounds=\.\.\.\) instead"):
        getattr(make()[0], method)(*arguments)


def without(name):
    state = tiny_resnet().state_dict()
    del state[name]
    return state


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (without("stem.weight"), "1 names differ: 'stem.weight' is missing from the arrays"),
        (nn.DataParallel(tiny_resnet()).state_dict(), "take the prefix 'module.' off"),
        ({**tiny_resnet().state_dict(), "more": torch.ones(1)}, "1 names differ: 'more' is not in the model"),
        (
            {**tiny_resnet().state_dict(), "head.bias": torch.ones(5)},
            r"'head.bias' must have shape \(4,\), got \(5,\)",
        ),
    ],
)
def test_arrays_of_another_model_are_refused(state, message):
    with pytest.raises(ConfigError, match=f"initial_arrays.*{message}"):
        run(arrays=ArrayRecord(state))


def test_arrays_come_from_where_people_have_them():
    """From a result or a state dict too; whoever evaluates sees Flower's all the same."""
    first, seen = run(), []
    options = {"start": {"evaluate_fn": lambda _, arrays: seen.append(type(arrays))}}
    ends = [state_of(run(arrays=arrays, **options)) for arrays in (first.arrays, first, state_of(first))]
    assert [largest_difference(end, ends[0]) for end in ends] == [0, 0, 0]
    assert set(seen) == {ArrayRecord}


@pytest.mark.parametrize(
    ("start", "message"),
    [
        ({"num_rounds": 0}, "num_rounds must be at least 1, got 0"),
        ({"timeout": 0}, "timeout must be greater than 0, got 0"),
        ({"timeout": float("nan")}, "timeout must be finite, got nan"),
        ({"grid": None}, "grid must be the Grid that Flower gives main, or an InProcessGrid, got None"),
        ({"initial_arrays": None}, r"initial_arrays must be an ArrayRecord: pass .*, got None"),
        ({"initial_arrays": [np.ones(2)]}, r"initial_arrays must be an ArrayRecord: pass .*, got \[array"),
        ({"evaluate_fn": {"loss": 1.0}}, r"evaluate_fn must be a function of \(server_round, arrays\).*, got {'loss'"),
        ({"evaluate_fn": lambda r, parameters, config: None}, "evaluate_fn must be .* missing .* argument: 'config'"),
        ({"train_config": ["lr"]}, r"train_config must be a dict, got \['lr'\]"),
        ({"train_config": {"lr": torch.ones(1)}}, "train_config must hold numbers, strings, .* got 'lr': tensor"),
        ({"evaluate_config": {"a": {"b": 1}}}, "evaluate_config must hold numbers, strings, .* got 'a': {'b': 1}"),
    ],
)
def test_arguments_of_start_are_checked(start, message):
    strategy, grid = make()
    arguments = {"grid": grid, "initial_arrays": ArrayRecord(tiny_resnet().state_dict()), **start}
    with pytest.raises(ConfigError, match=message):
        strategy.start(**arguments)


def batch_norm_in_front():
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(32, NUM_CLASSES))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": "ugs"}, r"sampler must be a Sampler, UniformGlobalSampler\(batch_size=128\), got 'ugs'"),
        (
            {"optimizer": 0.1},
            "optimizer must be a function that takes parameters and returns .*, got float: pass lambda",
        ),
        ({"loss": None}, "loss must be callable, got None"),
        ({"min_available_nodes": 0}, "min_available_nodes must be at least 1"),
        ({"evaluate_every": -1}, "evaluate_every must be at least 0"),
        ({"callbacks": [EarlyStopping]}, "callbacks must be psl_flower.callbacks.Callback objects, got <class"),
        ({"callbacks": 3}, "callbacks must be psl_flower.callbacks.Callback objects, got 3"),
        ({"run_config": ["lr=0.1"]}, "run_config must be a dict, got"),
        ({"output_dir": 5}, "output_dir must be a path, got 5"),
        ({"resume_from": True}, "resume_from must be a path, got True"),
        ({"device": "tpu9"}, "device must be 'auto' or one that torch has here, such as 'cpu' or 'cuda:0', got 'tpu9'"),
        ({"device": "cuda:99"}, "device must be 'auto' or one that torch has here.*, got 'cuda:99'"),
        ({"cut": "layer9"}, "layer9"),
        ({"model_fn": batch_norm_in_front, "cut": "3"}, "replace_batch_norm"),
    ],
)
def test_arguments_are_checked_at_construction(options, message):
    with pytest.raises(ConfigError, match=message):
        make(**options)


def test_too_few_nodes():
    with pytest.raises(MembershipError, match=r"min_available_nodes is 5, 3 connected within 0\.01 s"):
        run(min_available_nodes=5, start={"timeout": 0.01})


def test_a_batch_larger_than_the_data():
    with pytest.raises(ConfigError, match="batch_size must not exceed the number of examples, got 1000"):
        run(sampler=UniformGlobalSampler(1000))


# --- models ----------------------------------------------------------------------------------------------------------
class WithExtras(nn.Module):
    """A TinyResNet with a layer that is never used, a frozen one in each half, and a buffer of its own."""

    def __init__(self):
        super().__init__()
        self.net = tiny_resnet()
        self.unused = nn.Linear(2, 2)
        self.net.stem.weight.requires_grad_(False)
        self.net.head.bias.requires_grad_(False)
        self.register_buffer("note", torch.tensor(3))

    def forward(self, x):
        return self.net(x)


def test_unused_and_frozen_parameters_pass_through_unchanged():
    model = WithExtras()
    initial = {n: t + 1 if n.startswith(("unused", "note")) else t for n, t in model.state_dict().items()}
    state = state_of(run(WithExtras(), model_fn=WithExtras, cut="net.layer2", arrays=ArrayRecord(initial)))
    assert list(state) == list(initial)
    changed = {name for name in state if not torch.equal(state[name], initial[name])}
    fixed = {"unused.weight", "unused.bias", "note", "net.stem.weight", "net.head.bias"}
    assert fixed.isdisjoint(changed)
    assert {"net.stem.bias", "net.head.weight", "net.layer1.conv1.weight"} <= changed


def by_hand():
    torch.manual_seed(0)
    client = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(inplace=True), nn.GroupNorm(2, 4))
    server = nn.Sequential(nn.ReLU(inplace=True), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, NUM_CLASSES))
    return SplitModel(client=client, server=server)


def test_a_model_cut_by_hand():
    model = by_hand()
    result = run(by_hand(), model_fn=by_hand, cut=None)
    state = state_of(result)
    assert {name.split(".")[0] for name in state} == {"client", "server"}
    batches = planned_batches(SAMPLER.plan(population(K)), K, seed=3, epoch=0, dtype=torch.float32)
    assert largest_difference(state, train_centralised(model, batches, sgd)) < 1e-5


@pytest.mark.parametrize("transport", ["messages", "streams"])
def test_a_request_too_long_is_told_once_and_ends_no_process(transport, monkeypatch, caplog):
    monkeypatch.setattr(frames, "MAX_HEADER_BYTES", 20_000)
    config = ConfigRecord({"notes": "x" * 20_000})
    with pytest.raises(
        ProtocolError, match=r"'describe' cannot be asked for: a header of 2\d+ bytes is too long"
    ) as told:
        run(transport=transport, start={"train_config": config})
    assert "send less of them" in str(told.value)
    assert "is gone" not in caplog.text


def test_what_building_a_model_draws_is_not_seen_in_the_users_numbers():
    def seeding():
        torch.manual_seed(5)
        np.random.seed(5)  # noqa: NPY002
        return tiny_resnet()

    strategy, grid = make(tiny_resnet(), seeding)
    torch.manual_seed(7)
    np.random.seed(7)  # noqa: NPY002
    expected = torch.rand(3), np.random.rand(3)  # noqa: NPY002
    torch.manual_seed(7)
    np.random.seed(7)  # noqa: NPY002
    strategy.start(grid, tiny_resnet().state_dict(), num_rounds=1)
    assert torch.equal(torch.rand(3), expected[0])
    assert np.array_equal(np.random.rand(3), expected[1])  # noqa: NPY002


def tiny_resnet_16():
    return tiny_resnet().bfloat16()


def load_partition_16(context):
    images, labels = load_partition(context).tensors
    return TensorDataset(images.bfloat16(), labels)


def test_a_bfloat16_model():
    initial = tiny_resnet_16().state_dict()
    with pytest.raises(TypeError, match="BFloat16"):
        ArrayRecord(initial)  # Flower's arrays have none, but a state dict may be given as it is
    result = run(model_fn=tiny_resnet_16, data_fn=load_partition_16, arrays=initial, num_rounds=2)
    state = state_of(result)
    assert all(t.dtype == torch.float32 for t in state.values() if t.is_floating_point())
    assert all(torch.equal(t, t.bfloat16().float()) for t in state.values() if t.is_floating_point())
    losses = [m["loss"] for m in result.train_metrics_clientapp.values()]
    assert losses[1] < losses[0]


class Dropping(nn.Module):
    """Functional dropout in both halves."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(36, 20), nn.Linear(20, NUM_CLASSES)

    def forward(self, x):
        x = F.dropout(torch.relu(self.stem(x.flatten(1))), 0.5, training=self.training)
        return self.head(F.dropout(x, 0.3, training=self.training))


class Augmenting(TensorDataset):
    """Random noise, drawn from torch's generator at every fetch."""

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return image + 0.1 * torch.randn(image.shape), label

    def __getitems__(self, indices):
        return [self[i] for i in indices]


class FetchesOneByOne(SplitClient):
    def batch(self, dataset, indices):
        images, labels = zip(*(dataset[i] for i in indices.tolist()), strict=True)
        return torch.stack(images), torch.stack(labels)


def dropping():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Dropping()


def load_augmented(context):
    return Augmenting(*load_partition(context).tensors)


def test_dropout_and_augmentation_repeat_exactly():
    options = {"model_fn": dropping, "cut": "head", "data_fn": load_augmented, "client_class": FetchesOneByOne}
    torch.manual_seed(1)
    first = run(**options, num_rounds=2)
    torch.manual_seed(2)
    second = run(**options, num_rounds=2)
    assert largest_difference(state_of(first), state_of(second)) == 0
    other = run(**options, num_rounds=2, sampler=UniformGlobalSampler(SAMPLER.batch_size, seed=4))
    assert largest_difference(state_of(first), state_of(other)) > 1e-3


def test_functional_dropout_is_on_in_training_and_off_in_evaluation():
    batches = list(planned_batches(SAMPLER.plan(population(K)), K, seed=3, epoch=0, dtype=torch.float32))
    without_dropout = train_centralised(dropping().eval(), [], sgd)
    model = dropping()
    optimizer = sgd(model.parameters())
    model.eval()
    for x, y in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    without_dropout = model.state_dict()
    result = run(model_fn=dropping, cut="head", data_fn=load_partition_with_test)
    assert largest_difference(state_of(result), without_dropout) > 1e-3
    expected = evaluate_merged(dropping(), result)
    assert result.evaluate_metrics_clientapp[1]["loss"] == pytest.approx(expected["loss"], rel=1e-5)


def test_a_regression():
    def regressor():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.Tanh(), nn.Linear(8, 1))

    def load(context):
        images, labels = load_partition(context).tensors
        targets = labels[:, None].float()
        return TensorDataset(images, targets), TensorDataset(images[:5], targets[:5])

    options = {"loss": F.mse_loss, "classification": False, "model_fn": regressor, "cut": "3", "data_fn": load}
    result = run(**options, num_rounds=3)
    metrics = list(result.train_metrics_clientapp.values())
    assert metrics[2]["loss"] < metrics[0]["loss"]
    assert "accuracy" not in metrics[0]
    assert "deviation_mean" not in metrics[0]
    assert set(result.evaluate_metrics_clientapp[1]) == {"loss", "num_examples"}


def test_a_scheduler_steps_after_every_round():
    rates = []

    def scheduler(optimizer):
        class Recording(torch.optim.lr_scheduler.StepLR):
            def step(self, *arguments):
                super().step(*arguments)
                rates.append(optimizer.param_groups[0]["lr"])

        return Recording(optimizer, step_size=1, gamma=0.5)

    run(num_rounds=3, scheduler=scheduler)
    assert rates[-3:] == [0.01, 0.005, 0.0025]  # torch steps once itself, at construction


# --- evaluation ------------------------------------------------------------------------------------------------------
def test_data_of_all_test_sets():
    images, labels = zip(*(test_data(k).tensors for k in range(K)), strict=True)
    return torch.cat(images), torch.cat(labels)


def test_data(k):
    whole = client_data(k, K).tensors
    return TensorDataset(*(t[: len(t) // 2] for t in whole))


test_data_of_all_test_sets.__test__ = test_data.__test__ = False


def evaluate_merged(model, result):
    model.load_state_dict(state_of(result))
    x, y = test_data_of_all_test_sets()
    with torch.no_grad():
        outputs = model.eval()(x)
    return {
        "loss": F.cross_entropy(outputs, y).item(),
        "num_examples": len(y),
        "accuracy": (outputs.argmax(1) == y).float().mean().item(),
    }


@pytest.mark.parametrize("evaluate_batch_size", [1, 7, 1024])
def test_split_evaluation_equals_evaluating_the_merged_model(evaluate_batch_size):
    result = run(data_fn=load_partition_with_test, evaluate_batch_size=evaluate_batch_size)
    metrics = dict(result.evaluate_metrics_clientapp[1])
    assert metrics == pytest.approx(evaluate_merged(tiny_resnet(), result), rel=1e-5)


def test_evaluation_gives_the_share_of_those_that_are_done_to_the_others():
    def load(context):
        k = context.node_config["partition-id"]
        return client_data(k, K), TensorDataset(*(t[: [10, 2, 2][k]] for t in client_data(k, K).tensors))

    class Counting(SplitClient):
        def draw_batch(self, order):
            if order.test:
                asked.append((self.partition_id, order.start, order.count))
            return super().draw_batch(order)

    asked = []
    run(data_fn=load, client_class=Counting, evaluate_batch_size=12)
    assert asked == [(0, 0, 4), (1, 0, 2), (2, 0, 2), (0, 4, 6)]


def test_evaluation_does_not_change_training():
    with_evaluation = run(data_fn=load_partition_with_test, num_rounds=2)
    without_evaluation = run(num_rounds=2)
    assert largest_difference(state_of(with_evaluation), state_of(without_evaluation)) == 0


@pytest.mark.parametrize(("every", "rounds"), [(0, []), (1, [1, 2, 3, 4]), (2, [2, 4]), (3, [3])])
def test_evaluate_every(every, rounds):
    result = run(
        data_fn=load_partition_with_test, num_rounds=4, evaluate_every=every, sampler=UniformGlobalSampler(200)
    )
    assert list(result.evaluate_metrics_clientapp) == rounds


def test_clients_without_test_data_are_left_out():
    def load(context):
        k = context.node_config["partition-id"]
        return load_partition_with_test(context) if k == 1 else load_partition(context)

    result = run(data_fn=load)
    assert result.evaluate_metrics_clientapp[1]["num_examples"] == client_sizes(K)[1] // 2
    assert run().evaluate_metrics_clientapp == {}


# --- configuration of the clients ------------------------------------------------------------------------------------
SEEN = []


class Recording(SplitClient):
    def draw_batch(self, order):
        SEEN.append(("evaluate" if order.test else "train", dict(self.config)))
        return super().draw_batch(order)

    def forward(self, half, inputs):
        SEEN.append(("forward", dict(self.config)))
        return super().forward(half, inputs)


def recording_data(context, config):
    SEEN.append(("data", dict(config)))
    return load_partition_with_test(context)


def test_train_config_reaches_data_and_handlers():
    SEEN.clear()
    config, more = {"augment": True, "size": 6}, {"tta": 2}
    start = {"train_config": ConfigRecord(config), "evaluate_config": ConfigRecord(more)}
    run(data_fn=recording_data, client_class=Recording, start=start, num_rounds=2)
    assert SEEN.count(("data", config)) == K  # once a client, not once a message or a round
    assert ("train", config) in SEEN
    assert ("forward", config) in SEEN
    assert ("evaluate", {**config, **more}) in SEEN
    assert ("forward", {**config, **more}) in SEEN
    assert all(seen == config for what, seen in SEEN if what in ("data", "train"))


# --- what a run leaves behind ----------------------------------------------------------------------------------------
def read_metrics(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [m for m in lines if m["kind"] == "step"], [m for m in lines if m["kind"] == "round"]


def expected_deviations(plan, epoch):
    pooled = np.bincount(np.concatenate([client_data(k, K).tensors[1] for k in range(K)]), minlength=NUM_CLASSES)
    batches = planned_batches(plan, K, seed=3, epoch=epoch, dtype=torch.float32)
    counts = np.array([np.bincount(y, minlength=NUM_CLASSES) for _, y in batches])
    return np.abs(counts / counts.sum(axis=1, keepdims=True) - pooled / pooled.sum()).sum(axis=1)


class AsksForLabels(UniformGlobalSampler):
    needs_label_counts = True


@pytest.mark.parametrize("sampler_class", [UniformGlobalSampler, AsksForLabels])
def test_metrics_of_every_step_and_round_are_written(tmp_path, sampler_class):
    folder, sampler = tmp_path / "new" / "folder", sampler_class(SAMPLER.batch_size, seed=3)
    options = {"output_dir": folder, "data_fn": load_partition_with_test, "sampler": sampler}
    evaluate = {"evaluate_fn": lambda server_round, arrays: MetricRecord({"accuracy": 0.5, "loss": 1.0})}
    result = run(**options, num_rounds=2, start=evaluate)
    steps, rounds = read_metrics(folder)
    assert [(s["round"], s["step"]) for s in steps] == [(r, t) for r in (1, 2) for t in range(STEPS)]
    assert [r["round"] for r in rounds] == [1, 2]
    for epoch, of_round in enumerate(rounds):
        plan = sampler.plan(population(K, sampler), epoch)
        mine = [s for s in steps if s["round"] == epoch + 1]
        assert [s["batch_size"] for s in mine] == plan.batch_sizes().tolist()
        assert [s["clients"] for s in mine] == plan.active_clients().tolist()
        deviations = expected_deviations(plan, epoch)
        np.testing.assert_allclose([s["deviation"] for s in mine], deviations)
        assert of_round["deviation_mean"] == pytest.approx(deviations.mean())
        assert of_round["deviation_p95"] == pytest.approx(np.percentile(deviations, 95))
        weights = plan.batch_sizes()
        assert of_round["deviation_weighted"] == pytest.approx(np.average(deviations, weights=weights))
        for name in ("loss", "accuracy"):
            assert of_round[name] == pytest.approx(np.average([s[name] for s in mine], weights=weights))
        for name in ("bytes_sent", "bytes_received"):
            assert of_round[name] == sum(s[name] for s in mine)
        assert of_round["evaluate_clientapp"] == pytest.approx(dict(result.evaluate_metrics_clientapp[epoch + 1]))
        assert of_round["evaluate_serverapp"] == {"accuracy": 0.5, "loss": 1.0}
        assert of_round["seconds_real"] > 0


def test_bytes_are_those_of_the_tensors(tmp_path):
    run(output_dir=tmp_path)
    steps, _ = read_metrics(tmp_path)
    half = sum(p.numel() * 4 for n, p in tiny_resnet().named_parameters() if n.startswith(("stem", "layer1")))
    for step in steps:
        activations = step["batch_size"] * 4 * 36 * 4  # 4 channels of 6x6, in float32
        assert step["bytes_sent"] == 2 * step["clients"] * half + activations
        assert step["bytes_received"] == activations + step["batch_size"] * 8 + step["clients"] * half


def test_losses_are_those_of_centralised_training(tmp_path):
    run(output_dir=tmp_path)
    steps, _ = read_metrics(tmp_path)
    model, losses = tiny_resnet(), []
    optimizer = sgd(model.parameters())
    for x, y in planned_batches(SAMPLER.plan(population(K)), K, seed=3, epoch=0, dtype=torch.float32):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
    np.testing.assert_allclose([s["loss"] for s in steps], losses, rtol=1e-4)


@pytest.mark.curves
def test_model_curves_and_configuration_are_written(tmp_path):
    result = run(output_dir=tmp_path, run_config={"dataset": "digits", "path": tmp_path})
    saved = load_file(tmp_path / "model.safetensors")
    state = state_of(result)
    assert set(saved) == set(state)
    assert largest_difference({n: saved[n] for n in state}, state) == 0
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG\r\n")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["dataset"] == "digits"
    assert config["strategy"]["cut"] == CUT
    assert config["strategy"]["num_rounds"] == 1
    assert config["strategy"]["sampler"] == {
        "class": "UniformGlobalSampler",
        "batch_size": SAMPLER.batch_size,
        "seed": 3,
    }
    assert config["changes"] == []


def test_a_second_run_into_the_same_folder_replaces_the_first(tmp_path):
    run(output_dir=tmp_path, num_rounds=2)
    run(output_dir=tmp_path)
    _, rounds = read_metrics(tmp_path)
    assert len(rounds) == 1


def test_a_folder_that_cannot_be_written_to_is_refused_before_anything_is_sent(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "inside"):
        with pytest.raises(ConfigError, match=f"output_dir: {folder} cannot be written to .*: give a folder that can"):
            run(output_dir=folder)


def test_a_folder_that_is_lost_on_the_way_costs_the_files_not_the_training(tmp_path, caplog):
    """As when a disk is full: said once a file, and the result is that of a run that writes nothing."""
    folder = tmp_path / "out"

    def lose(server_round, arrays):
        if server_round == 1:
            shutil.rmtree(folder)
            folder.touch()

    result = run(output_dir=folder, num_rounds=3, start={"evaluate_fn": lose})
    assert largest_difference(state_of(result), state_of(run(num_rounds=3))) == 0
    told = [record.getMessage() for record in caplog.records if "the run goes on" in record.getMessage()]
    assert len(told) == len(set(told)) == 5
    for what in ("round 2: no checkpoint", "round 3: no checkpoint", "rounds.csv", "summary", "model"):
        assert sum(what in text for text in told) == 1, what


def test_the_folder_of_a_run_stays_where_it_was(tmp_path, monkeypatch):
    """Whatever becomes of the working directory; and a ~ is the home."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for folder in ("out", "~/out"):
        run(output_dir=folder, start={"evaluate_fn": lambda *_: os.chdir(tmp_path / "elsewhere")})
        os.chdir(tmp_path)
    for folder in (tmp_path / "out", tmp_path / "home" / "out"):
        assert (folder / "model.safetensors").exists()
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_nothing_is_written_without_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run()
    assert list(tmp_path.iterdir()) == []


# --- failures --------------------------------------------------------------------------------------------------------
class Watched(LocalBackend):
    """Remembers the state after every commit."""

    latest = None

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        Watched.latest, self.committed = self, [self.everything()]

    def commit(self, gradients):
        super().commit(gradients)
        self.committed.append(self.everything())

    def everything(self):
        optimizer = [
            s["momentum_buffer"].clone() for s in self.optimizer.state.values() if s.get("momentum_buffer") is not None
        ]
        return self.state(), {n: b.clone() for n, b in self.parts["body"].named_buffers()}, optimizer


class TamperingGrid(InProcessGrid):
    """Changes one reply of one client on its way: the `at`-th of a message type (0-based)."""

    def __init__(self, app, num_nodes, message_type, client, at, change):
        super().__init__(app, num_nodes)
        self.wanted, self.at, self.change, self.seen = (message_type, client), at, change, 0

    def _answer(self, message, context):
        reply = super()._answer(message, context)
        if (message.metadata.message_type, context.node_config["partition-id"]) == self.wanted:
            self.seen += 1
            if self.seen == self.at + 1:
                return self.change(message, reply)
        return reply

    def pull_messages(self, message_ids):
        return [reply for reply in super().pull_messages(message_ids) if reply is not None]


def nothing(message, answer):
    return None


def of_reply(change):
    return lambda message, answer: change_reply(message, answer, change)


def of_output(change, name=None):
    return of_reply(changed_output(change, name))


def of_tensor(change, name=None):
    return of_reply(changed_tensor(change, name))


def of_step(step):
    return of_reply(changed_parts(lambda part: replace(part, step=step)))


def no_record(message, answer):
    del answer.content["frame"]
    return answer


def step_as_text(message, answer):
    frame = content_to_frame(answer.content)
    frame.header["parts"][0]["step"] = "2"
    answer.content = frame_to_content(frame)
    return answer


def without_bias(gradients):
    return {name: g for name, g in gradients.items() if name != "stem.bias"}


def of_bias(change):
    return of_output(lambda gradients: {**gradients, "stem.bias": change(gradients["stem.bias"])})


NO_RECORD = "bad reply: expected a frame, got records named nothing"
FAULTS = {
    "forward: missing": (FORWARD, nothing, "no reply within"),
    "forward: no record": (FORWARD, no_record, NO_RECORD),
    "forward: count": (
        FORWARD,
        of_tensor(lambda t: t[1:]),
        r"bad reply: activations\[0\]: expected \d+ rows, got shape: \(\d+, 4, 6, 6\)",
    ),
    "forward: shape": (
        FORWARD,
        of_tensor(lambda t: t[:, 1:]),
        r"activations\[0\]: shape: expected \(4, 6, 6\) a row, got \(3, 6, 6\)",
    ),
    "forward: dtype": (
        FORWARD,
        of_tensor(lambda t: t.double()),
        r"activations\[0\]: dtype: expected torch.float32, got torch.float64",
    ),
    "forward: NaN": (FORWARD, of_tensor(poisoned(float("nan"))), "expected finite values, got 1 NaN or infinite"),
    "forward: infinite": (FORWARD, of_tensor(poisoned(float("inf"))), "expected finite values"),
    "forward: label": (
        FORWARD,
        of_tensor(lambda t: t + 4, "labels"),
        r"labels must be class indices from 0 to 3, .*, got",
    ),
    "forward: negative label": (
        FORWARD,
        of_tensor(lambda t: t - 9, "labels"),
        r"labels must be class indices from 0 to 3, .*, got -",
    ),
    "forward: label count": (
        FORWARD,
        of_tensor(lambda t: t[1:], "labels"),
        r"bad reply: labels: expected \d+ rows, got shape: \(\d+,\)",
    ),
    "forward: label dtype": (
        FORWARD,
        of_tensor(lambda t: t.float(), "labels"),
        "labels: dtype: expected torch.int64, got torch.float32",
    ),
    "forward: step": (FORWARD, of_step(77), "reply to another step: expected step 2, got 77"),
    "forward: step type": (FORWARD, step_as_text, "bad reply: expected 'step' to be of type int"),
    "backward: missing": (BACKWARD, nothing, "no reply within"),
    "backward: no record": (BACKWARD, no_record, NO_RECORD),
    "backward: count": (BACKWARD, of_output(without_bias), "head: 1 missing, the first is 'stem.bias'"),
    "backward: unknown": (
        BACKWARD,
        of_output(lambda gradients: {**gradients, "head.bias": None}),
        "head: 1 of unknown name, the first is 'head.bias'",
    ),
    "backward: shape": (BACKWARD, of_bias(lambda t: t[1:]), r"shape: expected \(4,\), got \(3,\)"),
    "backward: dtype": (BACKWARD, of_bias(lambda t: t.half()), "dtype: expected torch.float32"),
    "backward: NaN": (
        BACKWARD,
        of_bias(lambda t: t * float("nan")),
        "head of 'stem.bias': expected finite values, got 4 NaN or infinite",
    ),
    "backward: step": (BACKWARD, of_step(1), "reply to another step: expected step 2, got 1"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_reply_ends_its_step_and_nothing_of_it_is_applied(fault, monkeypatch, tmp_path):
    message_type, change, difference = FAULTS[fault]
    monkeypatch.setattr(strategy_module, "LocalBackend", Watched)
    strategy, _ = make(output_dir=tmp_path, faults=STRICT)
    grid = TamperingGrid(split_client_app(tiny_resnet, cut=CUT, data_fn=load_partition), K, message_type, 1, 2, change)
    with pytest.raises(StepError, match=f"round 1, step 2: (?s:.*)client 1 \\(node 3\\): .*{difference}") as caught:
        strategy.start(grid, ArrayRecord(tiny_resnet().state_dict()), num_rounds=1, timeout=0.3)
    assert list(caught.value.failures) == [1]
    backend = Watched.latest
    assert len(backend.committed) == 3  # the first state, and after steps 0 and 1
    now, before = backend.everything(), backend.committed[-1]
    for mine, theirs in zip(now[:2], before[:2], strict=True):
        assert largest_difference(mine, theirs) == 0
    assert all(torch.equal(a, b) for a, b in zip(now[2], before[2], strict=True))
    assert all(p.grad is None for part in backend.parts.values() for p in part.parameters())
    steps, rounds = read_metrics(tmp_path)
    assert ([s["step"] for s in steps], rounds) == ([0, 1], [])
    assert not (tmp_path / "model.safetensors").exists()


class Failing(SplitClient):
    """Client 2 fails in the method and step named."""

    where, step = "", 0

    def draw_batch(self, order):
        self.fails_in = None
        if self.partition_id == 2 and (order.test or order.step == Failing.step):
            self.fails_in = self.where
        if self.fails_in == ("evaluate" if order.test else "forward"):
            fail()
        return super().draw_batch(order)

    def forward(self, half, inputs):
        (activations,) = super().forward(half, inputs)
        if self.fails_in == "backward" and activations.requires_grad:
            activations.register_hook(fail)
        return (activations,)


def fail(*_):
    raise OSError("disk on fire")


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("forward", "round 1, step 1: 1 of 3 clients failed in forward"),
        ("backward", "round 1, step 1: 1 of 3 clients failed in backward"),
        ("evaluate", "round 1, evaluation: 1 of 3 clients failed"),
    ],
)
def test_a_client_that_raises_is_named_with_its_error(where, message, monkeypatch):
    monkeypatch.setattr(strategy_module, "LocalBackend", Watched)
    monkeypatch.setattr(Failing, "where", where)
    monkeypatch.setattr(Failing, "step", 1)
    with pytest.raises(
        StepError, match=message + r"(?s:.*)client 2 \(node 4\): test_strategy.py:.* in fail: OSError: disk on fire"
    ) as caught:
        run(client_class=Failing, data_fn=load_partition_with_test, faults=STRICT)
    assert list(caught.value.failures) == [2]
    committed = STEPS if where == "evaluate" else 1
    assert len(Watched.latest.committed) == committed + 1
    assert largest_difference(Watched.latest.state(), Watched.latest.committed[-1][0]) == 0


EVALUATION_FAULTS = {
    "missing": (nothing, "no reply within"),
    "count": (of_tensor(lambda t: t[1:]), r"activations\[0\]: expected \d+ rows, got shape: "),
    "NaN": (of_tensor(poisoned(float("nan"))), "expected finite values"),
    "label": (of_tensor(lambda t: t + 4, "labels"), r"labels must be class indices from 0 to 3, .*, got"),
    "step": (of_step(77), "reply to another step: expected step 0, got 77"),
}


@pytest.mark.parametrize("fault", EVALUATION_FAULTS)
def test_a_bad_reply_in_evaluation_is_named(fault):
    change, difference = EVALUATION_FAULTS[fault]
    strategy, _ = make(faults=STRICT)
    app = split_client_app(tiny_resnet, cut=CUT, data_fn=load_partition_with_test)
    grid = TamperingGrid(app, K, EVALUATE, 0, 0, change)
    with pytest.raises(StepError, match=f"round 1, evaluation: (?s:.*)client 0 \\(node 2\\): .*{difference}") as caught:
        strategy.start(grid, ArrayRecord(tiny_resnet().state_dict()), num_rounds=1, timeout=0.3)
    assert list(caught.value.failures) == [0]


def test_several_failures_are_all_named():
    class AllFail(SplitClient):
        def forward(self, half, inputs):
            raise ValueError(f"I am {self.partition_id}")

    with pytest.raises(StepError) as caught:
        run(client_class=AllFail)
    assert set(caught.value.failures) == {0, 1, 2}
    assert all(f"I am {k}" in str(why) for k, why in caught.value.failures.items())


def test_the_first_step_is_all_or_nothing_too(monkeypatch):
    monkeypatch.setattr(strategy_module, "LocalBackend", Watched)
    monkeypatch.setattr(Failing, "where", "backward")
    monkeypatch.setattr(Failing, "step", 0)
    with pytest.raises(StepError):
        run(client_class=Failing, faults=STRICT)
    assert len(Watched.latest.committed) == 1
    state, initial = Watched.latest.state(), tiny_resnet().state_dict()
    assert set(state) == set(initial)
    assert all(torch.equal(state[name], initial[name]) for name in initial)


def test_diverging_training_names_the_step():
    with pytest.raises(
        StepError, match=r"round 1, step 0: the loss is nan: training diverges, lower the learning rate"
    ):
        run(loss=lambda outputs, labels: F.cross_entropy(outputs, labels) * float("nan"))


def test_another_cut_on_the_client_is_refused():
    app = split_client_app(tiny_resnet, cut="layer1", data_fn=load_partition)
    strategy, _ = make()
    message = r"client 0 \(node 2\) and 2 others likewise: the server cuts at 'layer2', client 0 at 'layer1': give both"
    with pytest.raises(MembershipError, match=message):
        strategy.start(InProcessGrid(app, K), ArrayRecord(tiny_resnet().state_dict()), num_rounds=1)


def test_batch_norm_in_the_clients_half_is_refused_by_the_client():
    app = split_client_app(batch_norm_in_front, cut="3", data_fn=load_partition)
    strategy, _ = make()
    with pytest.raises(MembershipError, match=r"(?s)every client must describe itself.*replace_batch_norm"):
        strategy.start(InProcessGrid(app, K), ArrayRecord(tiny_resnet().state_dict()), num_rounds=1)


# --- scale -----------------------------------------------------------------------------------------------------------
def linear_model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2))


def one_or_two_examples(context):
    rng = np.random.default_rng(context.node_config["partition-id"])
    size = 1 + context.node_config["partition-id"] % 2
    return TensorDataset(
        torch.tensor(rng.normal(size=(size, 5)), dtype=torch.float32), torch.tensor(rng.integers(0, 2, size))
    )


@pytest.mark.parametrize("number", [200, pytest.param(1000, marks=pytest.mark.slow)])
def test_an_epoch_with_many_clients(number):
    sampler = UniformGlobalSampler(number // 2, seed=0)
    result = run(model_fn=linear_model, cut="2", data_fn=one_or_two_examples, num_nodes=number, sampler=sampler)
    metrics = result.train_metrics_clientapp[1]
    assert (metrics["num_clients"], metrics["num_examples"], metrics["num_steps"]) == (number, 3 * number // 2, 3)
    assert 0.4 * number < metrics["clients_per_step"] < 0.5 * number
