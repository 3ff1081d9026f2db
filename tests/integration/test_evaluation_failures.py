"""Clients that fail in split evaluation: the others are evaluated, and it is logged and counted with its reason."""

import json

import pytest
from faulty import EVALUATE, FakeTime
from flwr.app import ArrayRecord
from support import CUT, NUM_CLASSES, client_sizes, load_partition_with_test, sgd, tiny_resnet

from psl_flower import InProcessGrid, ParallelSplitLearning, SplitClient, UniformGlobalSampler, split_client_app
from psl_flower.exchange import clients, messages
from psl_flower.faults import FaultPolicy

K = 3
BAD = 1  # the client


TEXTS = {
    "client error": "OSError: no test data today",
    "not finite": "expected finite values",
    "shape": "shape: expected",
    "dtype": "dtype: expected",
    "label range": f"for what does not count, got {NUM_CLASSES}: number the classes from 0",
}


class FailsToEvaluate(SplitClient):
    kind, testing = None, False

    def batch(self, dataset, indices):
        self.testing = dataset is self.test
        batch = super().batch(dataset, indices)
        inputs, labels = batch.inputs, batch.target
        if self.fails("client error"):
            raise OSError("no test data today")
        return (
            inputs * float("inf") if self.fails("not finite") else inputs,
            labels * 0 + NUM_CLASSES if self.fails("label range") else labels,
        )

    def forward(self, half, inputs):
        (activations,) = super().forward(half, inputs)
        activations = activations[:, 1:] if self.fails("shape") else activations
        return (activations.double() if self.fails("dtype") else activations,)

    def fails(self, kind):
        return self.testing and self.kind == kind and self.partition_id == BAD


def train(folder, transport, grid_class=InProcessGrid, client_class=FailsToEvaluate):
    strategy = ParallelSplitLearning(
        tiny_resnet(),
        cut=CUT,
        sampler=UniformGlobalSampler(200, seed=3),
        optimizer=sgd,
        transport=transport,
        min_available_nodes=K,
        faults=FaultPolicy(step_timeout=60.0, mistakes="retry"),
        output_dir=folder,
    )
    app = split_client_app(tiny_resnet, cut=CUT, data_fn=load_partition_with_test, client_class=client_class)
    result = strategy.start(grid_class(app, K), ArrayRecord(tiny_resnet().state_dict()), num_rounds=2)
    return result, json.loads((folder / "summary.json").read_text())


def assert_gone_without(result, summary, reason):
    others = sum(size // 2 for k, size in enumerate(client_sizes(K)) if k != BAD)
    for metrics in result.evaluate_metrics_clientapp.values():
        assert metrics["num_examples"] == others
        assert 0 < metrics["loss"] < 10
    assert summary["evaluation_refused"] == {reason: 2}  # a round each
    assert summary["evaluation_failures"] == {str(BAD): 2}
    assert (summary["refused"], summary["failures"]) == ({}, {})


@pytest.mark.parametrize("transport", ["messages", "streams"])
@pytest.mark.parametrize("kind", list(TEXTS))
def test_what_a_client_does_wrong_is_counted_and_the_others_are_evaluated(kind, transport, tmp_path, caplog):
    FailsToEvaluate.kind = kind
    assert_gone_without(*train(tmp_path, transport), kind)
    said = [
        r.message for r in caplog.records if f"evaluation goes on without client {BAD} (node {BAD + 2}): " in r.message
    ]
    assert len(said) == 2
    assert all(TEXTS[kind] in text for text in said)
    assert f"Failures in evaluation: {kind} 2; of clients: {BAD} (2)" in caplog.text


class Silent(InProcessGrid):
    """Does not answer when it is to be evaluated."""

    def _answer(self, message, context):
        if message.metadata.message_type == EVALUATE and context.node_config["partition-id"] == BAD:
            return None
        return super()._answer(message, context)

    def pull_messages(self, message_ids):
        return [message for message in super().pull_messages(message_ids) if message is not None]


def test_a_client_that_does_not_answer_is_counted(tmp_path, caplog, monkeypatch):
    clock = FakeTime()
    for module in (messages, clients):
        monkeypatch.setattr(module, "time", clock)
    assert_gone_without(*train(tmp_path, "messages", Silent, SplitClient), "timeout")
    assert f"evaluation goes on without client {BAD} (node {BAD + 2}): no reply within 3600 s" in caplog.text
