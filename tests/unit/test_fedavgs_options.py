"""Who comes from FedAvg is told what stands for its options, and the signature stays what it was."""

import inspect
from pathlib import Path

import pytest
from flwr.serverapp import strategy as flwr_strategies
from torch import nn

from psl_flower import ParallelSplitLearning
from psl_flower.errors import ConfigError

MODEL = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
TUTORIAL = Path(__file__).parents[2] / "docs" / "tutorial.md"
OURS = inspect.signature(ParallelSplitLearning).parameters


def made(**options):
    return ParallelSplitLearning(MODEL, cut="1", **options)


@pytest.mark.parametrize("kind", [flwr_strategies.FedAvg, flwr_strategies.FedAdam, flwr_strategies.FedAvgM])
def test_each_option_of_flowers_strategies_is_ours_or_its_remedy_is_told(kind):
    theirs = [name for name, p in inspect.signature(kind).parameters.items() if p.kind is not p.VAR_KEYWORD]
    for name in theirs:
        if name not in OURS:
            with pytest.raises(ConfigError, match=f"does not take all that FedAvg does. {name}: "):
                made(**{name: 1})


def test_all_that_was_given_is_told_at_once_and_as_the_tutorial_does():
    with pytest.raises(ConfigError, match=r"fraction_train: .*leave it out; evaluate_fn: .*start\(grid, initial_arr"):
        made(fraction_train=0.5, evaluate_fn=print)
    with pytest.raises(ConfigError, match="min_available_nodes"):
        made(min_available_clients=3)
    named = {"fraction_train", "min_train_nodes", "fraction_evaluate", "min_evaluate_nodes", "weighted_by_key"}
    named |= {"train_metrics_aggr_fn", "evaluate_metrics_aggr_fn", "arrayrecord_key", "configrecord_key"}
    table = TUTORIAL.read_text(encoding="utf-8").split("What else `FedAvg` was given")[1].split("\n## ")[0]
    for name in named:
        assert f"`{name}`" in table
        with pytest.raises(ConfigError, match=name):
            made(**{name: 1})


def test_what_is_nobodys_option_is_pythons_error_and_the_signature_is_typed():
    with pytest.raises(TypeError, match="optimzer"):
        made(optimzer=None)
    assert OURS["min_available_nodes"].annotation == "int"
    assert made(min_available_nodes=3).min_available_nodes == 3


def test_a_subclass_may_have_such_options_of_its_own():
    class Own(ParallelSplitLearning):
        def __init__(self, fraction_train):
            super().__init__(MODEL, cut="1")
            self.fraction_train = fraction_train

    assert Own(fraction_train=0.5).fraction_train == 0.5
