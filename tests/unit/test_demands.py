"""What a node demands of a run in its own configuration: the run may ask for more, not for less."""

import pytest
from flwr.app import ArrayRecord, Context, RecordDict

from psl_flower import InProcessGrid, ParallelSplitLearning, UniformGlobalSampler
from psl_flower.app import client_app, demands
from psl_flower.app.models import small_cnn
from psl_flower.config import RunConfig
from psl_flower.errors import ConfigError, PSLError
from psl_flower.privacy import GaussianNoise, TopK


def context(node, **run):
    config = RunConfig(**run).as_run_config()
    return Context(run_id=1, node_id=1, node_config=node, state=RecordDict(), run_config=config)


def test_a_node_that_demands_nothing_does_what_the_run_says():
    run = {"tail": "head", "secure_aggregation": True, "defences": "TopK(5)", "label_epsilon": 2.0}
    of = context({}, **run)
    assert demands.secure_aggregation(of)
    assert demands.defences(of) == (TopK(5),)
    assert demands.label_noise(of).epsilon == 2.0
    assert demands.private(of) is None
    assert not demands.secure_aggregation(context({}))


def test_the_nodes_defences_come_first_and_its_smaller_epsilon_counts():
    node = {"defences": "GaussianNoise(0.5), TopK(5)", "label-epsilon": 1.0}
    assert demands.defences(context(node, defences="TopK(5), TopK(7)")) == (GaussianNoise(0.5), TopK(5), TopK(7))
    assert demands.defences(context(node)) == (GaussianNoise(0.5), TopK(5))
    assert demands.label_noise(context(node, tail="head", label_epsilon=2.0)).epsilon == 1.0
    assert demands.label_noise(context(node, tail="head", label_epsilon=0.5)).epsilon == 0.5
    assert demands.label_noise(context(node)) is None  # none are told


@pytest.mark.parametrize(
    ("what", "node", "message"),
    [
        (
            "secure_aggregation",
            {"secure-aggregation": True},
            "demands secure aggregation .*, the run has none: submit it",
        ),
        ("secure_aggregation", {"secure-aggregation": "yes"}, "must be true or false, got 'yes'"),
        ("defences", {"defences": 3}, "must be text, got 3"),
        ("defences", {"defences": "Noise(1)"}, "a defence must be one of"),
        ("private", {"target-epsilon": 4.0}, "epsilon of at most 4 .* the run has none: submit it with"),
        ("private", {"target-epsilon": 0.0}, "target-epsilon of the node's configuration must be greater than 0"),
        ("label_noise", {"label-epsilon": "1"}, "label-epsilon of the node's configuration must be a number"),
    ],
)
def test_a_run_that_has_less_is_refused(what, node, message):
    with pytest.raises(ConfigError, match=message):
        getattr(demands, what)(context(node))


def test_differential_privacy_that_is_weaker_is_refused():
    node = {"target-epsilon": 4.0}
    with pytest.raises(ConfigError, match=r"at most 4 .* the run has 8"):
        demands.private(context(node, target_epsilon=8.0))
    assert demands.private(context(node, target_epsilon=3.0)) == demands.private(context({}, target_epsilon=3.0))


def test_a_node_that_demands_an_epsilon_says_itself_of_how_many_examples():
    """A run that says there are more than there are has less noise than its epsilon needs."""
    drawn = {"target_epsilon": 3.0, "sampler": "poisson", "dp_examples": 1437}
    for node, message in (({}, "does not say"), ({"dp-examples": 1436}, "says 1436"), ({"dp-examples": 0}, "least 1")):
        with pytest.raises(ConfigError, match=message):
            demands.private(context({"target-epsilon": 4.0, **node}, **drawn))
    for node in ({"target-epsilon": 4.0, "dp-examples": 1437}, {}):
        assert demands.private(context(node, **drawn)).examples == 1437


def test_the_default_app_keeps_to_it():
    """Nothing has left the node when it refuses: it answers the first question with the reason."""
    config = RunConfig(dataset="digits").as_run_config()
    grid = InProcessGrid(client_app.app, num_nodes=2, run_config=config)
    for each in grid._contexts.values():
        each.node_config["secure-aggregation"] = True
    strategy = ParallelSplitLearning(
        small_cnn(1, 10), cut=RunConfig.read(config).cut or "stage2", sampler=UniformGlobalSampler(64), device="cpu"
    )
    with pytest.raises(PSLError, match="this node demands secure aggregation"):
        strategy.start(grid, ArrayRecord(small_cnn(1, 10).state_dict()), num_rounds=1)
