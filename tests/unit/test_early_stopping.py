"""A callback ends a run in order, and keeps the model of the best round."""

import logging
import math
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from psl_flower.callbacks import BestModel, Callback, EarlyStopping
from psl_flower.callbacks.base import CallbackGroup
from psl_flower.errors import ConfigError, StopTraining
from psl_flower.monitor import expected_mode, round_values


def a_round(number, loss=1.0, clients=None, server=None, **more):
    """Return as much of a round's record as callbacks look at."""
    return SimpleNamespace(
        round=number,
        metrics=lambda: {"loss": loss, **more},
        evaluate_clientapp=clients or {},
        evaluate_serverapp=server or {},
    )


def last_round(callback, values, make, *, config=None):
    """Return the round after which the run ends, None if it goes on."""
    group = CallbackGroup([callback])
    group.on_run_start(config or {})
    for number, value in enumerate(values, 1):
        group.on_round(make(number, value))
        if group.stopped:
            return number
    return None


def test_the_numbers_of_a_round_have_short_names():
    record = a_round(1, 2.0, {"loss": 3.0, "num_examples": 9}, {"accuracy": 0.5, "names": ["a"]}, accuracy=0.25)
    expected = {"loss": 2.0, "accuracy": 0.25, "val_loss": 3.0, "val_num_examples": 9.0, "server/accuracy": 0.5}
    assert round_values(record) == expected


@pytest.mark.parametrize(
    ("options", "values", "ends"),
    [
        ({"patience": 2}, [3, 2, 2, 2], 4),
        ({"patience": 2}, [3, 2, 2, 1, 1, 1], 6),
        ({"patience": 1}, [3, 2, 1, 0], None),
        ({"patience": 1}, [3, 4], 2),
        ({"patience": 1, "mode": "max"}, [3, 4, 4], 3),
        ({"patience": 1, "min_delta": 1}, [3, 2], 2),
        ({"patience": 1, "min_delta": 0.5}, [3, 2, 1.4], None),
        ({"patience": 3}, [math.nan, 3, 2, math.nan, math.nan, 2.5], 6),
        ({"patience": 2}, [math.nan, math.nan], 2),
    ],
)
def test_patience_is_counted_in_rounds_without_a_better_value(options, values, ends):
    assert last_round(EarlyStopping("loss", **options), values, a_round) == ends


def test_accuracy_is_to_rise_and_rounds_without_evaluation_do_not_count():
    def make(number, value):
        return a_round(number, clients={"accuracy": value} if number % 2 == 0 else None)

    config = {"strategy": {"evaluate_every": 2}}
    stopping = EarlyStopping("val_accuracy", patience=2)
    assert last_round(stopping, [0, 0.5, 0, 0.6, 0, 0.6, 0, 0.4, 0, 0.7], make, config=config) == 8
    assert (stopping.best_round, stopping.best_value) == (4, 0.6)
    assert "val_accuracy has not become better than 0.6 of round 4 for 2 rounds" in stopping.stop
    # a second run begins anew
    assert last_round(stopping, [0, 0.1, 0, 0.2], make, config=config) is None
    assert stopping.best_value == 0.2


@pytest.mark.parametrize(
    ("monitor", "record", "expected"),
    [
        (
            "los",
            a_round(1, accuracy=0.5),
            r"must be one of 'loss', 'accuracy', got 'los' \(did you mean 'loss'",
        ),
        ("val_f1", a_round(1, clients={"loss": 1.0}), "must be one of 'loss', 'val_loss', got 'val_f1'"),
        ("val_loss", a_round(1), "no client has any: let data_fn return .* or monitor one of 'loss'"),
        ("server/f1", a_round(1, server={"acc": 1.0}), "must be one of 'loss', 'server/acc', got 'server/f1'"),
    ],
)
@pytest.mark.parametrize("make", [EarlyStopping, lambda monitor, mode: BestModel("x", monitor=monitor, mode=mode)])
def test_a_metric_that_is_not_there_ends_the_run_with_those_that_are(make, monitor, record, expected):
    group = CallbackGroup([make(monitor, mode="min")])
    group.on_run_start({})
    with pytest.raises(ConfigError, match=expected):
        group.on_round(record)


def test_a_metric_that_will_never_be_there_is_refused_at_the_start():
    group = CallbackGroup([EarlyStopping("val_loss")])
    with pytest.raises(ConfigError, match="'val_loss' is measured on the clients' test data, but evaluate_every is 0"):
        group.on_run_start({"strategy": {"evaluate_every": 0}})


def test_evaluate_fn_may_leave_rounds_out(caplog):
    def make(number, value):
        return a_round(number, server=value and {"accuracy": value})

    with caplog.at_level(logging.WARNING, "flwr.psl_flower"):
        assert last_round(EarlyStopping("server/accuracy", patience=1), [None, None, 0.5, None, 0.5], make) == 5
    assert [r.getMessage() for r in caplog.records] == [
        "EarlyStopping waits for 'server/accuracy', but evaluate_fn returned no metrics in this round: "
        "it waits until there are some"
    ]


@pytest.mark.parametrize(
    ("name", "mode"),
    [("loss", "min"), ("val_loss", "min"), ("server/top5_accuracy", "max"), ("val_f1", "max"), ("rmse", "min")],
)
def test_names_tell_what_is_better(name, mode):
    assert expected_mode(name) == mode


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"monitor": "reward"}, "the name 'reward' does not tell whether less or more is better: pass mode="),
        ({"monitor": "loss", "mode": "least"}, "mode must be one of 'auto', 'min', 'max', got 'least'"),
        ({"monitor": "loss", "patience": 0}, "EarlyStopping: patience must be at least 1"),
        ({"monitor": "loss", "min_delta": -1}, "EarlyStopping: min_delta must be at least 0"),
        ({"monitor": None}, "monitor must be the name of a metric"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, expected):
    with pytest.raises(ConfigError, match=expected):
        EarlyStopping(**arguments)


# --- asking for the end ----------------------------------------------------------------------------------------------
class Raises(Callback):
    def __init__(self, error):
        self.error, self.heard = error, 0

    def on_round(self, record):
        self.heard += 1
        raise self.error


def test_any_callback_may_raise_for_the_end_and_all_others_are_told():
    first, second = Raises(StopTraining("enough")), Raises(ValueError("broken"))
    group = CallbackGroup([first, second])
    group.on_round(a_round(1))
    assert group.stopped == "Raises: enough"
    assert second.heard == 1
    group.on_round(a_round(2))
    assert (first.heard, second.heard) == (2, 1)  # one that fails is dropped, one that asks is not
    group.on_run_start({})
    assert group.stopped is None


# --- the best model --------------------------------------------------------------------------------------------------
def model(number):
    return {"weight": torch.full((2, 3), float(number)).T, "same": torch.full((1,), float(number))}


def run(callback, losses, *, replayed=0):
    group = CallbackGroup([callback])
    group.on_run_start({})
    for number, loss in enumerate(losses, 1):
        group.on_round(a_round(number, loss))
        if number > replayed:
            group.on_model(number, model(number))
    group.on_run_end({})


def test_the_best_rounds_model_is_kept(tmp_path):
    best = BestModel(tmp_path / "new" / "best.safetensors", monitor="loss")
    run(best, [3.0, 1.0, 2.0, math.nan, 1.0])
    state = load_file(best.path)
    assert all(torch.equal(state[name], t) for name, t in model(2).items())
    assert (best.best_round, best.best_value) == (2, 1.0)
    with safe_open(best.path, "pt") as file:
        assert file.metadata() == {"round": "2", "monitor": "loss", "value": "1.0"}
    assert [p.name for p in best.path.parent.iterdir()] == ["best.safetensors"]


def test_rounds_before_a_checkpoint_are_remembered(tmp_path, caplog):
    path = tmp_path / "best.safetensors"
    run(BestModel(path, monitor="loss"), [3.0, 1.0])
    run(BestModel(path, monitor="loss"), [3.0, 1.0, 2.0], replayed=2)
    assert float(load_file(path)["same"]) == 2
    run(BestModel(path, monitor="loss"), [3.0, 1.0, 0.5], replayed=2)
    assert float(load_file(path)["same"]) == 3
    with caplog.at_level(logging.WARNING, "flwr.psl_flower"):
        run(BestModel(tmp_path / "elsewhere", monitor="loss"), [3.0, 1.0, 2.0], replayed=2)
        run(BestModel(tmp_path / "elsewhere", monitor="loss"), [math.nan])
    assert "round 2 was the best, but its model is not at" in caplog.text
    assert "there was no round with loss, so no model was written" in caplog.text
