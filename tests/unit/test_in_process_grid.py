"""InProcessGrid keeps Flower's contract of a Grid: any strategy and any ClientApp run on it."""

import sys

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from psl_flower import InProcessGrid
from psl_flower.errors import ConfigError
from psl_flower.flower import become_server

become_server(1, 1)


def echo_app():
    """Answers with its partition, how often it was asked, and what it was sent."""
    app = ClientApp()

    @app.query()
    def query(message, context):
        if message.content.config_records["in"].get("fail"):
            raise ValueError("told to fail")
        calls = context.state.config_records.get("calls", ConfigRecord({"n": 0}))
        calls["n"] += 1
        context.state["calls"] = calls
        out = ConfigRecord(
            {
                **context.node_config,
                "n": calls["n"],
                "said": message.content["in"]["say"],
                "lr": context.run_config["lr"],
            }
        )
        return Message(RecordDict({"out": out}), reply_to=message)

    return app


def grid(num_nodes=3):
    return InProcessGrid(echo_app(), num_nodes, run_config={"lr": 0.5})


def ask(node, say="hello", **more):
    return Message(RecordDict({"in": ConfigRecord({"say": say, **more})}), node, "query")


def test_is_a_grid_with_stable_nodes():
    one = grid(5)
    assert isinstance(one, Grid)
    assert len(set(one.get_node_ids())) == 5
    assert list(one.get_node_ids()) == list(one.get_node_ids())
    assert isinstance(one.run.run_id, int)


def test_two_grids_are_two_runs():
    assert grid().run.run_id != grid().run.run_id  # clients keep state by run


def test_nodes_get_partitions_as_in_the_simulation():
    one = grid()
    replies = one.send_and_receive([ask(node) for node in one.get_node_ids()])
    out = [r.content["out"] for r in replies]
    assert [(o["partition-id"], o["num-partitions"], o["lr"]) for o in out] == [(0, 3, 0.5), (1, 3, 0.5), (2, 3, 0.5)]


def test_replies_are_pulled_by_id_each_once_in_any_order():
    one = grid()
    nodes = one.get_node_ids()
    ids = list(one.push_messages([ask(node, str(node)) for node in nodes]))
    assert len(set(ids)) == 3
    assert list(one.pull_messages([])) == []
    (last,) = one.pull_messages(ids[2:])
    assert last.metadata.reply_to_message_id == ids[2]
    assert last.metadata.src_node_id == nodes[2]
    assert last.content["out"]["said"] == str(nodes[2])
    replies = list(one.pull_messages(ids))
    assert [r.metadata.reply_to_message_id for r in replies] == ids[:2]
    assert list(one.pull_messages([*ids, "unknown"])) == []


def test_messages_to_unknown_nodes_get_no_id():
    one = grid()
    nodes = one.get_node_ids()
    messages = [ask(nodes[0]), ask(999_999), ask(nodes[1])]
    ids = list(one.push_messages(messages))
    assert ids == [messages[0].metadata.message_id, messages[2].metadata.message_id]
    assert len(list(one.pull_messages(ids))) == 2


def test_a_client_that_raises_becomes_an_error_reply():
    one = grid()
    nodes = one.get_node_ids()
    bad, good = one.send_and_receive([ask(nodes[0], fail=True), ask(nodes[1])])
    assert bad.has_error()
    assert bad.error.reason == "ValueError: told to fail"
    assert bad.metadata.src_node_id == nodes[0]
    assert not good.has_error()


def answers_the_reply(message, context, call_next):
    return Message(Error(0, "the keys do not match"), reply_to=call_next(message, context))


@pytest.mark.parametrize(
    ("mod", "reason"),
    [
        (lambda *_: None, "a mod of it, must return a Message, got None"),
        (answers_the_reply, "returned a message that does not answer its own: the keys do not match"),
        (lambda *_: sys.exit("no data"), "SystemExit: no data"),
    ],
)
def test_what_is_no_reply_becomes_an_error_reply(mod, reason):
    """Else the server would wait for it in vain, or end."""
    app = ClientApp(mods=[mod])
    app.query()(lambda message, context: Message(RecordDict(), reply_to=message))
    one = InProcessGrid(app, 1)
    (reply,) = one.send_and_receive([Message(RecordDict(), one.get_node_ids()[0], "query")])
    assert reason in reply.error.reason


def test_a_message_nobody_handles_becomes_an_error_reply():
    one = grid()
    message = Message(RecordDict({"in": ConfigRecord()}), one.get_node_ids()[0], "train.sideways")
    (reply,) = one.send_and_receive([message])
    assert reply.has_error()


def test_node_state_lives_between_messages():
    one = grid()
    node, other = one.get_node_ids()[:2]
    for n in (1, 2):
        (reply,) = one.send_and_receive([ask(node)])
        assert reply.content["out"]["n"] == n
    (reply,) = one.send_and_receive([ask(other)])
    assert reply.content["out"]["n"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("app", 2), "client_app must be a flwr ClientApp, got 'app'"),
        ((ClientApp(), 0), "num_nodes must be at least 1, got 0"),
        ((ClientApp(), 2.0), "num_nodes must be a whole number, got 2.0"),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(ConfigError, match=message):
        InProcessGrid(*arguments)


# --- Flower's own FedAvg ----------------------------------------------------------------------------------------------
TARGETS, SIZES = np.array([1.0, 4.0, 7.0]), np.array([10, 20, 30])


def fedavg_app():
    """Each client's optimum is its target; a round of local training goes half the way there."""
    app = ClientApp()

    def reply(message, context, content, value):
        k = context.node_config["partition-id"]
        metrics = MetricRecord({"loss": float((value - TARGETS[k]) ** 2), "num-examples": int(SIZES[k])})
        return Message(RecordDict({**content, "metrics": metrics}), reply_to=message)

    @app.train()
    def train(message, context):
        (value,) = message.content["arrays"].to_numpy_ndarrays()
        value = value + 0.5 * (TARGETS[context.node_config["partition-id"]] - value)
        return reply(message, context, {"arrays": ArrayRecord([value])}, value[0])

    @app.evaluate()
    def evaluate(message, context):
        (value,) = message.content["arrays"].to_numpy_ndarrays()
        return reply(message, context, {}, value[0])

    return app


def test_flowers_fedavg_runs_on_it():
    one = InProcessGrid(fedavg_app(), num_nodes=3)
    strategy = FedAvg(min_available_nodes=3, min_train_nodes=3, min_evaluate_nodes=3)
    result = strategy.start(one, ArrayRecord([np.zeros(1)]), num_rounds=8)
    optimum = np.average(TARGETS, weights=SIZES)
    (value,) = result.arrays.to_numpy_ndarrays()
    np.testing.assert_allclose(value, optimum * (1 - 0.5**8))
    assert list(result.train_metrics_clientapp) == list(range(1, 9))
    expected = np.average((value - TARGETS) ** 2, weights=SIZES)
    assert result.evaluate_metrics_clientapp[8]["loss"] == pytest.approx(expected)
