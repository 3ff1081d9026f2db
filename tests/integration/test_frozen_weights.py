"""Over messages, too, frozen weights are sent once: by the process that answers, or by the node where that ends."""

import pytest
import torch
from flwr.app import ArrayRecord, Message
from support import Steps, largest_difference, load_partition_64
from torch import nn

from psl_flower import InProcessGrid, ParallelSplitLearning, UniformGlobalSampler, split_client_app
from psl_flower.client import keeping
from psl_flower.client.process import forget_runs
from psl_flower.errors import StepError
from psl_flower.exchange import messages
from psl_flower.exchange.codec import KEEP, encode_reply
from psl_flower.exchange.records import content_to_frame, frame_to_content
from psl_flower.failures import Failure, Kind
from psl_flower.protocol import Reply, Request

K = 2
BASE, ADAPTER = 36 * 50 + 50, 50 * 4  # parameters of the head


class Adapted(nn.Module):
    """A frozen layer, and what trains beside it."""

    def __init__(self):
        super().__init__()
        self.base, self.adapter = nn.Linear(36, 50), nn.Linear(50, 4, bias=False)
        self.base.requires_grad_(False)

    def forward(self, x):
        return self.adapter(self.base(x.flatten(1)).tanh())


def net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(Adapted(), nn.Tanh(), nn.Linear(4, 4)).double()


class NewProcesses(InProcessGrid):
    """Every message finds a process that has seen nothing yet."""

    def _answer(self, message, context):
        forget_runs()
        return super()._answer(message, context)


def trained(grid_class=InProcessGrid, **options):
    """Return the weights after a round, and what was sent and received in each step."""
    steps, model = Steps(), net()
    app = split_client_app(net, cut="1", data_fn=load_partition_64, device="cpu")
    strategy = ParallelSplitLearning(
        model,
        cut="1",
        sampler=UniformGlobalSampler(60, seed=1),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        device="cpu",
        callbacks=[steps],
        evaluate_every=0,
        **{"transport": "messages", **options},
    )
    result = strategy.start(grid_class(app, K), ArrayRecord(model.state_dict()), 1)
    return result.arrays.to_torch_state_dict(), steps.records


@pytest.fixture(scope="module")
def over_streams():
    return trained(transport="streams")[0]


def check(over_streams, weights, records, times):
    """Compare weights, and how often each of both clients was sent the frozen layer in each step."""
    assert largest_difference(weights, over_streams) < 1e-12
    assert largest_difference(weights, net().state_dict()) > 1e-3
    assert len(records) == 7
    for record, sent in zip(records, times, strict=True):
        assert record.clients == K
        # to both, twice: the adapter; once: gradients of four activations an example
        own = K * 2 * ADAPTER * 8 + record.batch_size * 4 * 8
        assert record.bytes_sent == own + K * sent * BASE * 8


def test_a_process_is_sent_them_once(over_streams):
    check(over_streams, *trained(), times=[1] + [0] * 6)


def test_a_process_that_has_forgotten_is_sent_them_again(over_streams):
    """In the simulation a process may die; where none remembers, no message is sent in vain for long."""
    weights, records = trained(NewProcesses)
    own = K * 2 * ADAPTER * 8
    assert largest_difference(weights, over_streams) < 1e-12
    wasted = [r.bytes_sent - own - 4 * 8 * r.batch_size for r in records]
    full = K * 2 * BASE * 8
    # in vain: the adapter and gradients once more, with the second, third and fourth message to each
    assert [full < more < full + K * 3 * ADAPTER * 8 + 4 * 8 * 60 for more in wasted[:2]] == [True, True]
    assert wasted[2:] == [full] * 5


def test_in_a_deployment_the_node_keeps_them(over_streams, monkeypatch):
    monkeypatch.setattr(messages, "is_deployment", lambda grid: True)
    weights, records = trained(NewProcesses)
    check(over_streams, weights, records, times=[1] + [0] * 6)


class Told(NewProcesses):
    """Takes note of who is told to keep what it is sent, and whose state holds anything of it."""

    asked, held = [], []

    def _answer(self, message, context):
        self.asked.append(content_to_frame(message.content).header[KEEP])
        reply = super()._answer(message, context)
        self.held.append("psl_flower.weights" in context.state)
        if self.forgetful:
            context.state.pop("psl_flower.weights", None)
        return reply

    forgetful = False


def test_what_is_too_large_for_a_nodes_state_is_sent_every_time(over_streams, monkeypatch):
    monkeypatch.setattr(messages, "is_deployment", lambda grid: True)
    monkeypatch.setattr(messages, "MAX_KEPT", BASE * 8 - 1)

    class Grid(Told):
        asked, held = [], []

    weights, records = trained(Grid)
    check(over_streams, weights, records, times=[2] * 7)
    assert not any(Grid.asked + Grid.held)


@pytest.mark.parametrize("by_node", [True, False])
def test_a_node_that_does_not_keep_them_is_told_so_no_more(by_node, over_streams, monkeypatch):
    """It has none that stays with it, or keeps none so large by itself."""
    monkeypatch.setattr(messages, "is_deployment", lambda grid: True)
    if by_node:
        monkeypatch.setattr(keeping, "MAX_KEPT", BASE * 8 - 1)

    class Grid(Told):
        asked, held, forgetful = [], [], not by_node

    weights, _ = trained(Grid)
    assert largest_difference(weights, over_streams) < 1e-12
    assert any(Grid.held) != by_node
    assert sum(Grid.asked) <= K * 4
    assert not any(Grid.asked[-K * 8 :])


class Liars(InProcessGrid):
    """One says, whatever it is sent, that it does not have it."""

    asked = 0

    def _answer(self, message, context):
        if context.node_config["partition-id"] or not message.metadata.message_type.startswith("train."):
            return super()._answer(message, context)
        self.asked += 1
        nodes = tuple(content_to_frame(message.content).header["nodes"])
        reply = Reply(failures=dict.fromkeys(nodes, Failure(Kind.FORGOTTEN, "who knows")))
        return Message(frame_to_content(encode_reply(0, reply, Request(stage="", nodes=nodes))), reply_to=message)


def test_who_never_has_them_is_not_asked_for_ever():
    with pytest.raises(StepError, match="who knows"):
        trained(Liars)
