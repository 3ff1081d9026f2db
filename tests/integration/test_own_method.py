"""A method written here alone, without touching the package, trains exactly: over both carriers, with losses, resumed.

Clients run two parts of the model one after the other, and what crosses the first cut goes by the server, which has it
disguised with a sign of each client's own. All kinds of leaves travel.
"""

from collections import Counter
from typing import ClassVar

import pytest
import torch
from faulty import RecordingClient, RecordingRunner, assert_each_used_once
from flwr.app import ArrayRecord, Error, Message
from process_grid import ERROR_CRASHED
from support import (
    client_data,
    largest_difference,
    load_partition_64,
    planned_batches,
    population,
    sgd,
    tiny_resnet_64,
    train_centralised,
)

from psl_flower import (
    FaultPolicy,
    InProcessGrid,
    ParallelSplitLearning,
    UniformGlobalSampler,
    split_client_app,
    tree,
)
from psl_flower.client.process import forget_runs
from psl_flower.methods import CLIENT, EACH, ROWS, SERVER, SHARED, SUM, SplitMethod, stage
from psl_flower.strategy import strategy as strategy_module

K = 3
SAMPLER = UniformGlobalSampler(40, seed=3)
LOSS_SCALE = torch.tensor(1024.0, dtype=torch.float64)  # a power of two: multiplying by it is exact


def times(factor, value):
    return tree.map_leaves(lambda t: t * factor, value)


class Relay(SplitMethod):
    """Two parts on the clients, activations sent twice; the rest of the model and the loss on the server."""

    name = "relay"
    parts: ClassVar = {"stem": CLIENT, "middle": CLIENT, "top": SERVER}

    # --- on a client ---
    @stage(outputs={"activations": ROWS, "labels": ROWS, "examples": EACH}, exact=("labels",))
    def first(self, client, batch):
        client.kept["activations"], kept = client.stem(batch.inputs)
        assert not kept  # nothing skips the middle
        return {
            "activations": client.kept["activations"],
            "labels": batch.target,
            "examples": torch.tensor(batch.size),
        }

    def _middle(self, client, received, sign):
        received = tree.map_leaves(lambda t: (t.detach() * sign).requires_grad_(client.training), received)
        return received, client.middle(received)

    @stage(inputs={"received": ROWS, "sign": EACH}, outputs={"activations": ROWS}, after="first")
    def second(self, client, received, sign):
        client.kept["middle"] = received, outputs = self._middle(client, received, sign)
        return {"activations": outputs}

    @stage(
        inputs={"received": ROWS, "sign": EACH, "gradient": ROWS, "scale": SHARED},
        outputs={"middle": SUM, "gradient": ROWS},
        after="first",
    )
    def second_backward(self, client, received, sign, gradient, scale):
        if "middle" not in client.kept:  # another process than the one of `second`
            client.kept["middle"] = self._middle(client, received, sign)
        leaves, outputs = client.kept["middle"]
        found = client.middle.gradients(outputs, times(1 / scale, gradient), again=True)
        torch.autograd.backward(outputs, gradient, inputs=leaves)
        return {"middle": found, "gradient": tree.map_leaves(lambda t: t.grad, leaves)}

    @stage(inputs={"gradient": ROWS, "scale": SHARED}, outputs={"stem": SUM}, after="first")
    def first_backward(self, client, gradient, scale):
        return {"stem": client.stem.gradients(client.kept["activations"], times(1 / scale, gradient))}

    # --- on the server ---
    def forward(self, ctx):
        sent = ctx.call(self.first)
        assert [int(n) for n in sent.examples] == ctx.orders.counts.tolist()
        sign = [torch.tensor(1.0 if client % 2 else -1.0, dtype=torch.float64) for client in ctx.clients]
        by_row = torch.stack(sign).repeat_interleave(torch.tensor(ctx.orders.counts)).reshape(-1, 1, 1, 1)
        relayed = {"received": times(by_row, sent.activations), "sign": sign}
        return sent.labels, relayed, ctx.call(self.second, **relayed).activations

    def step(self, ctx):
        labels, relayed, activations = self.forward(ctx)
        outcome = ctx.top.forward_backward(activations, labels)
        scaled = {"gradient": times(LOSS_SCALE, outcome.gradient), "scale": LOSS_SCALE}
        back = ctx.call(self.second_backward, **relayed, **scaled)
        first = ctx.call(self.first_backward, gradient=back.gradient, scale=LOSS_SCALE)
        ctx.commit(stem=first.stem, middle=back.middle, top=outcome.parameter_gradients)
        return outcome

    def evaluate(self, ctx):
        labels, _, activations = self.forward(ctx)
        return ctx.top.evaluate(activations, labels)


def app(**options):
    return split_client_app(
        tiny_resnet_64, cut="layer1", tail="layer2", data_fn=load_partition_64, method=Relay(), device="cpu", **options
    )


def train(grid, num_rounds=1, **options):
    strategy = ParallelSplitLearning(
        tiny_resnet_64(),
        **{"cut": "layer1", "tail": "layer2", "method": Relay(), "sampler": SAMPLER, "optimizer": sgd, **options},
        min_available_nodes=K,
        device="cpu",
    )
    result = strategy.start(grid, ArrayRecord(tiny_resnet_64().state_dict()), num_rounds)
    return result.arrays.to_torch_state_dict()


def reference(num_rounds=1):
    batches = [
        batch
        for epoch in range(num_rounds)
        for batch in planned_batches(SAMPLER.plan(population(K), epoch), K, seed=3, epoch=epoch, dtype=torch.float64)
    ]
    return train_centralised(tiny_resnet_64(), batches, sgd)


@pytest.mark.parametrize("transport", ["messages", "streams"])
def test_equals_centralised_training(transport):
    trained = train(InProcessGrid(app(), K), transport=transport)
    assert largest_difference(trained, reference()) < 1e-9
    assert largest_difference(trained, tiny_resnet_64().state_dict()) > 1e-2


class FreshProcesses(InProcessGrid):
    """Every message finds a process that knows nothing, as in a deployment."""

    def _answer(self, message, context):
        forget_runs()
        return super()._answer(message, context)


def test_every_stage_may_run_in_another_process():
    assert largest_difference(train(FreshProcesses(app(), K), transport="messages"), reference()) < 1e-9


class LosingGrid(InProcessGrid):
    """Loses a client in some step's second, third or fourth exchange, twice: it cannot be asked again."""

    LATER: ClassVar = ("train.second", "train.second_backward", "train.first_backward")

    def __init__(self):
        super().__init__(app(client_class=RecordingClient), K)
        self.asked, self.lost = Counter(), set()

    def _answer(self, message, context):
        stage, client = message.metadata.message_type, context.node_config["partition-id"]
        self.asked[stage, client] += 1
        if stage in self.LATER and client == self.LATER.index(stage) and self.asked[stage, client] in (2, 3):
            self.lost.add(stage)
            return Message(Error(ERROR_CRASHED, "the process died"), reply_to=message)
        return super()._answer(message, context)


def test_clients_lost_in_the_middle_of_a_step(monkeypatch):
    monkeypatch.setattr(strategy_module, "StepRunner", RecordingRunner)
    grid = LosingGrid()
    trained = train(grid, transport="messages", faults=FaultPolicy(patience=300))
    assert grid.lost == set(LosingGrid.LATER)
    assert_each_used_once(RecordingRunner.latest, K, 1)
    data = [client_data(k, K, torch.float64).tensors for k in range(K)]
    steps = [drawn for _, drawn in RecordingRunner.latest.committed]
    assert min(map(len, steps)) < K  # some went on without
    batches = [
        tuple(torch.cat([data[k][i][rows] for k, (_, rows) in drawn.items()]) for i in (0, 1)) for drawn in steps
    ]
    assert largest_difference(trained, train_centralised(tiny_resnet_64(), batches, sgd)) < 1e-9


class Killed(BaseException):
    pass


class KillingGrid(InProcessGrid):
    """Ends the run in the middle of its sixth step."""

    pushes = 0

    def push_messages(self, messages):
        self.pushes += 1
        if self.pushes > 1 + 5 * 4 + 2:  # describing, five steps of four exchanges, two of the sixth
            raise Killed
        return super().push_messages(messages)


def test_a_resumed_run_ends_as_an_uninterrupted_one(tmp_path):
    options = {"transport": "messages", "output_dir": tmp_path, "checkpoint_every": 2}
    with pytest.raises(Killed):
        train(KillingGrid(app(), K), **options)
    resumed = train(InProcessGrid(app(), K), **options, resume_from="latest")
    assert largest_difference(resumed, reference()) < 1e-9
    steps = [line for line in (tmp_path / "metrics.jsonl").read_text().splitlines() if '"step"' in line]
    assert len(steps) >= len(SAMPLER.plan(population(K), 0))
