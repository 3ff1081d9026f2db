"""What the functions that make the optimizer and the scheduler may return, and when schedulers step."""

import logging

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam
from torch.optim import lr_scheduler as lrs

from psl_flower.errors import ConfigError
from psl_flower.server import accumulate, make_optimizer, make_scheduler


def named(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    return dict(model.named_parameters())


def sgd(lr=1.0):
    return SGD(named().values(), lr=lr)


# --- optimizer -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("factory", [Adam, torch.optim.Adagrad, lambda p: SGD(p, lr=0.1)])
def test_what_torch_makes_is_taken(factory, caplog):
    parameters = named()
    optimizer = make_optimizer(factory, parameters)
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in parameters.values()]
    assert not caplog.records


def test_parameters_can_be_chosen_by_name():
    def factory(named_parameters):
        decayed = [p for name, p in named_parameters if name.endswith("weight")]
        rest = [p for name, p in named_parameters if not name.endswith("weight")]
        return SGD([{"params": decayed, "weight_decay": 0.1}, {"params": rest}], lr=0.1)

    parameters = named()
    groups = make_optimizer(factory, parameters).param_groups
    assert [id(p) for p in groups[0]["params"]] == [id(parameters["0.weight"]), id(parameters["1.weight"])]
    assert len(groups[1]["params"]) == 2


@pytest.mark.parametrize("own", [0, 2])
def test_parameters_of_another_model_are_refused(own):
    others = list(named(1).values())

    def factory(parameters):
        return SGD(parameters[:own] + others, lr=0.1)

    expected = rf"4 of its {4 + own} are others \(shapes \(4, 3\), \(4,\), \(2, 4\), \(2,\)\): .* another model's"
    with pytest.raises(ConfigError, match=expected):
        make_optimizer(factory, named())


def test_parameters_left_out_are_named_in_one_line(caplog):
    with caplog.at_level(logging.WARNING, "flwr.psl_flower"):
        make_optimizer(lambda p: SGD(p[2:], lr=0.1), named())
    (record,) = caplog.records
    assert "leaves out 2 of 4 parameters, which will not train: 0.weight, 0.bias (" in record.getMessage()


class Misses:
    step = zero_grad = print
    param_groups = ()


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (None, "got None: is its return statement missing"),
        ([sgd(), sgd()], r"got a list \(SGD, SGD\): .* parameter groups"),
        (([sgd()], []), r"got a tuple \(list, list\): .* scheduler="),
        ({"optimizer": sgd()}, r"got a dict \(SGD\)"),
        (SGD, "got the class SGD: call it with"),
        (lrs.StepLR(sgd(), 1), "got StepLR, which has no zero_grad, param_groups"),
        (Misses(), "got Misses, which has no state_dict, load_state_dict"),
    ],
)
def test_what_is_no_optimizer_is_refused(made, expected):
    with pytest.raises(ConfigError, match=f"optimizer must return one torch optimizer, {expected}"):
        make_optimizer(lambda p: made, named())


def test_an_optimizer_that_needs_a_closure_is_refused():
    with pytest.raises(ConfigError, match=r"LBFGS computes .* needs a closure.*Adam"):
        make_optimizer(torch.optim.LBFGS, named())


class ScheduleFree(SGD):
    train = eval = print


@pytest.mark.parametrize("factory", [ScheduleFree, accumulate(ScheduleFree, 2)])
def test_an_optimizer_with_other_weights_for_evaluation_is_refused(factory):
    with pytest.raises(ConfigError, match="ScheduleFree has other weights for evaluation than for training"):
        make_optimizer(factory, named())


def test_what_is_no_function_and_a_model_without_parameters_are_refused():
    with pytest.raises(ConfigError, match=r"must be a function that takes parameters .* got SGD: pass lambda"):
        make_optimizer(sgd(), named())
    with pytest.raises(ConfigError, match="no parameter to train"):
        make_optimizer(Adam, {})


# --- scheduler -------------------------------------------------------------------------------------------------------
def rates(factory, *, rounds, steps=3, optimizer=None):
    """Return the learning rate after each round; `rounds` has the values known of each."""
    optimizer = optimizer or sgd()
    scheduler, found = make_scheduler(factory, optimizer), []
    for values in rounds:
        for _ in range(steps):
            optimizer.step()
            scheduler.on_step()
        scheduler.on_round(values)
        found.append(optimizer.param_groups[0]["lr"])
    return found


def halves(optimizer):
    return lrs.StepLR(optimizer, 1, gamma=0.5)


@pytest.mark.parametrize(
    ("factory", "expected"),
    [
        (None, [1.0, 1.0]),
        (halves, [0.5, 0.25]),
        (lambda o: {"scheduler": halves(o)}, [0.5, 0.25]),
        (lambda o: {"scheduler": halves(o), "interval": "epoch"}, [0.5, 0.25]),
        (lambda o: {"scheduler": halves(o), "interval": "step"}, [2**-3, 2**-6]),
        (lambda o: {"scheduler": halves(o), "frequency": 1, "name": "lr", "strict": True}, [0.5, 0.25]),
    ],
)
def test_by_round_and_by_step(factory, expected):
    assert rates(factory, rounds=[{}, {}]) == expected


def plateau(optimizer, mode="min"):
    return lrs.ReduceLROnPlateau(optimizer, mode, factor=0.1, patience=0)


def test_by_metric_the_training_loss_unless_another_is_named():
    rounds = [
        {"loss": 3.0, "val_accuracy": 0.5},
        {"loss": 2.0, "val_accuracy": 0.4},
        {"loss": 2.5, "val_accuracy": 0.6},
    ]
    assert rates(plateau, rounds=rounds) == pytest.approx([1, 1, 0.1])

    def named_metric(optimizer):
        return {"scheduler": plateau(optimizer, "max"), "monitor": "val_accuracy"}

    assert rates(named_metric, rounds=rounds) == pytest.approx([1, 0.1, 0.1])


def test_a_metric_that_is_not_there_is_an_error_that_names_those_that_are():
    expected = r"scheduler: monitor must be one of 'loss', 'accuracy', got 'accurcy' \(did you mean 'accuracy'"
    with pytest.raises(ConfigError, match=expected):
        rates(lambda o: {"scheduler": plateau(o), "monitor": "accurcy"}, rounds=[{"loss": 1.0, "accuracy": 0.5}])


def test_a_round_without_evaluation_is_no_step_of_a_scheduler_that_waits_for_one():
    optimizer = sgd()
    scheduler = make_scheduler(lambda o: {"scheduler": plateau(o), "monitor": "val_loss"}, optimizer, evaluate_every=2)
    scheduler.on_round({"loss": 1.0}, evaluated=False)
    for value in (1.0, 2.0):
        scheduler.on_round({"loss": 1.0, "val_loss": value})
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)
    with pytest.raises(ConfigError, match="'val_loss' is measured on the clients' test data, and no client has any"):
        scheduler.on_round({"loss": 1.0})
    with pytest.raises(ConfigError, match="evaluate_every is 0"):
        make_scheduler(lambda o: {"scheduler": plateau(o), "monitor": "val_loss"}, sgd(), evaluate_every=0)


def test_a_mode_that_does_not_fit_the_metric_is_warned_of(caplog):
    with caplog.at_level(logging.WARNING, "flwr.psl_flower"):
        make_scheduler(lambda o: {"scheduler": plateau(o), "monitor": "accuracy"}, sgd())
    assert "ReduceLROnPlateau has mode='min', but monitors 'accuracy': is mode='max' meant?" in caplog.text


class ByEpoch:
    def step(self, epoch):
        raise AssertionError("never called")

    state_dict = load_state_dict = print


@pytest.mark.parametrize(
    ("factory", "expected"),
    [
        (lambda o: None, "got None"),
        (lambda o: [halves(o), halves(o)], "got a list of 2: join several with .*ChainedScheduler"),
        (lambda o: lrs.StepLR, "got the class StepLR"),
        (lambda o: o, "got SGD"),
        (lambda o: 0.1, "got float, which has no step"),
        (lambda o: {"interval": "step"}, "got None"),
        (lambda o: {"scheduler": halves(o), "frequency": 2}, r"frequency must be 1, got 2: .*\(step_size"),
        (
            lambda o: {"scheduler": halves(o), "freq": 1},
            r"'interval', 'monitor', .*got 'freq' \(did you mean 'frequency'",
        ),
        (lambda o: {"scheduler": halves(o), "interval": "batch"}, "'round', 'step', 'epoch', got 'batch'"),
        (lambda o: {"scheduler": halves(o), "monitor": "loss"}, "StepLR steps without a metric: leave monitor='loss'"),
        (lambda o: {"scheduler": plateau(o), "monitor": 3}, "monitor must be the name of a metric, .* got 3"),
        (lambda o: {"scheduler": plateau(o), "interval": "step"}, "ReduceLROnPlateau needs a metric, .* got 'step'"),
        (lambda o: halves(sgd()), "built over the optimizer it is given, but is built over another"),
        (lambda o: ByEpoch(), r"ByEpoch.step must need nothing, or one metric, but it needs epoch"),
    ],
)
def test_what_is_no_scheduler_is_refused(factory, expected):
    with pytest.raises(ConfigError, match=f"scheduler.*{expected}|{expected}"):
        make_scheduler(factory, sgd())


def test_what_is_no_function_is_refused():
    with pytest.raises(ConfigError, match=r"must be a function that takes the optimizer .* got StepLR: pass lambda"):
        make_scheduler(halves(sgd()), sgd())


@pytest.mark.parametrize("factory", [halves, plateau])
def test_a_scheduler_goes_on_where_it_was(factory):
    rounds = [{"loss": value} for value in (3.0, 2.0, 2.0, 1.0, 5.0)]
    whole = rates(factory, rounds=rounds)
    first, second = sgd(), sgd()
    before, after = make_scheduler(factory, first), make_scheduler(factory, second)
    for values in rounds[:3]:
        before.on_round(values)
    after.load_state_dict(before.state_dict())
    second.load_state_dict(first.state_dict())
    found = []
    for values in rounds[3:]:
        after.on_round(values)
        found.append(second.param_groups[0]["lr"])
    assert found == whole[3:]
    assert make_scheduler(None, sgd()).state_dict() == {}
