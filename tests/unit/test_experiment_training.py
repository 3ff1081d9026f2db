import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord

from psl_flower.app.task import central_test
from psl_flower.config import RunConfig
from psl_flower.errors import ConfigError, DivergenceError
from psl_flower.experiments import ALGORITHMS, Setting, Training, open_training
from psl_flower.experiments.data import load_data
from psl_flower.experiments.training import _Batches
from psl_flower.records import RoundRecord, StepRecord

NUM_CLIENTS = 4


def setting(algorithm="psl", config=None, **options):
    config = RunConfig(**{"num_server_rounds": 1, "batch_size": 64, "device": "cpu", **(config or {})})
    return Setting(**{"config": config, "num_clients": NUM_CLIENTS, "algorithm": algorithm, "examples": 200, **options})


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_what_every_algorithm_leaves_behind(algorithm):
    training = open_training(setting(algorithm, {"num_server_rounds": 2}))
    before = training.evaluate()
    records = list(training.records())
    assert list(training.records()) == []  # all is read
    rounds = [r for r in records if isinstance(r, RoundRecord)]
    assert [r.round for r in rounds] == [1, 2]
    assert records[-1] is rounds[1]
    for record in rounds:
        steps = [r for r in records if isinstance(r, StepRecord) and r.round == record.round]
        assert [s.step for s in steps] == list(range(record.num_steps))
        assert sum(s.batch_size for s in steps) == record.num_examples == 200
        assert record.loss == pytest.approx(np.average([s.loss for s in steps], weights=[s.batch_size for s in steps]))
        assert record.deviation_mean == pytest.approx(np.mean([s.deviation for s in steps]))
        assert record.bytes_sent is record.bytes_received is None
        assert record.num_clients == (1 if algorithm == "centralised" else NUM_CLIENTS)
    assert rounds[1].evaluate_serverapp == training.evaluate()
    assert rounds[1].evaluate_serverapp["loss"] < before["loss"]


def test_evaluation_is_the_default_apps():
    training = open_training(setting())
    expected = central_test(setting().config)(0, ArrayRecord(training.model.state_dict()))
    assert training.evaluate() == pytest.approx(dict(expected), abs=1e-6)
    table = training.confusion()
    assert table.dtype == np.int64
    assert table.sum(axis=1).tolist() == np.bincount(load_data(setting()).test.targets).tolist()
    assert np.trace(table) / table.sum() == pytest.approx(expected["accuracy"])


def test_a_look_in_between_changes_nothing():
    results = []
    for look in (False, True):
        training = open_training(setting(config={"batch_size": 2}))
        for record in training.records():
            if look and isinstance(record, StepRecord) and record.step == 60:
                training.evaluate()
                training.confusion()
        results.append(training.model.state_dict())
    assert all(map(torch.equal, results[0].values(), results[1].values()))


def test_a_reader_may_stop_and_go_on():
    whole, parts = (open_training(setting(config={"num_server_rounds": 2})) for _ in range(2))
    expected = [r.loss for r in whole.records()]
    got = []
    while len(got) < len(expected):
        got.append(next(parts.records()).loss)
    assert got == expected


def test_a_subset_is_the_same_for_all_algorithms_of_a_seed():
    subsets = [np.sort(np.concatenate(load_data(setting(a)).shares)) for a in ("psl", "fedavg")]
    assert np.array_equal(*subsets)
    assert len(np.unique(subsets[0])) == 200
    other = np.sort(np.concatenate(load_data(setting(config={"seed": 1})).shares))
    assert not np.array_equal(subsets[0], other)


def test_a_subset_larger_than_the_data_is_refused():
    with pytest.raises(ConfigError, match="examples must be at most 1437"):
        load_data(setting(examples=1438))


def test_divergence_is_told_with_its_step():
    with pytest.raises(DivergenceError, match=r"round 1, step [1-3]: the loss is (nan|inf)"):
        list(open_training(setting(config={"learning_rate": 1e30})).records())


def test_other_precisions_and_formats_learn_the_same():
    state = {}
    for name, precision, options in (("", "full", {}), ("last", "full", {"channels_last": True}), ("half", "bf16", {})):
        training = open_training(setting(config={"augment": "crop-flip", "precision": precision}, **options))
        list(training.records())
        state[name] = torch.cat([p.detach().flatten() for p in training.model.parameters()])
        assert state[name].dtype == torch.float32
    assert torch.allclose(state[""], state["last"], atol=1e-4)
    assert 1e-5 < (state[""] - state["half"]).abs().max() < 0.1


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_no_step_waits_for_the_device(algorithm):
    """Nothing can be read from the meta device: a step that looked at what it computed would fail."""
    config = {"device": "meta", "augment": "crop-flip"}
    training = open_training(setting(algorithm, config, channels_last=True))
    schedule = training._algorithm.schedule(0)
    steps = range(len(schedule.plan))
    seen = training._train_steps(steps, _Batches(training._data, schedule, 0, 0).load(steps))
    training._algorithm.end_round()
    assert seen.shape == (2, len(steps))
    with pytest.raises(NotImplementedError, match="meta"):
        seen.tolist()


def test_a_batch_larger_than_the_data_is_refused_at_once():
    with pytest.raises(ConfigError, match="batch-size must be at most 1437, the examples trained on, got 1438"):
        open_training(setting(config={"batch_size": 1438}, examples=0))


def test_a_batch_of_one_example_leaves_batch_norm_its_statistics():
    """As in the split run: batch norm has none of one value a channel, which the rest of an epoch may come to."""
    one = setting(config={"batch_size": 1}, examples=20)
    norm = torch.nn.BatchNorm1d(64)
    model = torch.nn.Sequential(torch.nn.Flatten(), norm, torch.nn.Linear(64, 10))
    before = model[2].weight.detach().clone()
    records = list(Training(one, load_data(one), model).records())
    assert len(records) == 21
    assert norm.running_mean.abs().max() == norm.num_batches_tracked == 0
    assert not torch.equal(model[2].weight, before)
