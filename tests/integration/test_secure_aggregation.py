"""Secure aggregation: training is what it was, up to fixed point, and the server sees sums of clients only."""

import contextlib
import functools
import json
import logging
import re
from collections import Counter

import numpy as np
import pytest
import torch
from faulty import RecordingClient, RecordingRunner, assert_each_used_once, change_reply, changed_output
from flwr.app import ArrayRecord, Context, Error, Message, RecordDict
from process_grid import ERROR_CRASHED, ProcessGrid
from support import (
    CUT,
    DELAYS,
    client_data,
    largest_difference,
    load_partition_64,
    load_partition_with_test,
    planned_batches,
    population,
    sgd,
    tiny_resnet,
    tiny_resnet_64,
    train_centralised,
)
from test_u_shaped import u_net
from torch import nn

from psl_flower import (
    FaultPolicy,
    InProcessGrid,
    LatentDirichletSampler,
    ParallelSplitLearning,
    SecureAggregation,
    StreamOptions,
    UniformGlobalSampler,
    split_client_app,
    tree,
)
from psl_flower.app import client_app, server_app
from psl_flower.client.process import forget_runs
from psl_flower.errors import ConfigError, MembershipError, StepError
from psl_flower.exchange.codec import WeightStore, decode_reply, decode_request
from psl_flower.exchange.records import content_to_frame, frame_to_content
from psl_flower.samplers import Population
from psl_flower.strategy import secure as secure_module
from psl_flower.strategy import strategy as strategy_module

K = 4
SAMPLER = UniformGlobalSampler(40, seed=3)
CUTS = {"parallel": (tiny_resnet_64, {"cut": CUT}), "u-shaped": (u_net, {"cut": "body", "tail": "tail"})}


def make_app(method="parallel", secure=True, **options):
    make_model, cuts = CUTS[method]
    options = {"data_fn": load_partition_64, "device": "cpu", "secure_aggregation": secure, **options}
    return split_client_app(make_model, **cuts, **options)


def u_app():  # by name, for other processes
    return make_app("u-shaped")


def start(method="parallel", grid=None, num_rounds=1, model=None, arrays=None, **options):
    make_model, cuts = CUTS[method]
    strategy = ParallelSplitLearning(
        make_model(),
        **cuts,
        **{
            "sampler": SAMPLER,
            "optimizer": sgd,
            "device": "cpu",
            "transport": "messages",
            "secure_aggregation": True,
            "evaluate_every": 0,
            **options,
        },
    )
    grid = grid or InProcessGrid(make_app(method), K)
    return strategy.start(grid, ArrayRecord(make_model().state_dict()), num_rounds)


def error_of(result, method="parallel"):
    """Return how far a run of one round is from centralised training."""
    batches = planned_batches(SAMPLER.plan(population(K), 0), K, seed=3, epoch=0, dtype=torch.float64)
    reference = train_centralised(CUTS[method][0](), batches, sgd)
    return largest_difference(result.arrays.to_torch_state_dict(), reference)


# --- exactness -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", list(CUTS))
def test_equals_centralised_training_up_to_fixed_point(method):
    assert error_of(start(method), method) < 1e-9


def test_the_same_over_streams_of_several_processes():
    """Masks are between processes then, of two clients each."""
    with ProcessGrid(u_app, K, num_processes=2) as grid:
        result = start("u-shaped", grid, transport="streams")
    assert error_of(result, "u-shaped") < 1e-9


def test_few_neighbours_are_enough():
    options = SecureAggregation(least=2, neighbours=2)
    result = start(grid=InProcessGrid(make_app(secure=options), K), secure_aggregation=options)
    assert error_of(result) < 1e-9


@pytest.mark.parametrize("method", list(CUTS))
@pytest.mark.parametrize("processes", [0, 2], ids=["messages", "streams of two processes"])
def test_clients_scale_their_gradients_down_as_the_server_would(method, processes, tmp_path, caplog):
    """Some of them, in some steps: the same number, to the same model, whether the server or they themselves do it."""
    policy, results, clipped = FaultPolicy(max_gradient_norm=0.5), [], []
    for secure in (False, True):
        make, folder = functools.partial(make_app, method, secure=secure), tmp_path / str(secure)
        grid = ProcessGrid(make, K, num_processes=processes) if processes else InProcessGrid(make(), K)
        options = {"transport": "streams" if processes else "messages", "output_dir": folder}
        with contextlib.closing(grid) if processes else contextlib.nullcontext():
            results.append(start(method, grid, secure_aggregation=secure, faults=policy, **options))
        clipped.append(json.loads((folder / "summary.json").read_text())["clipped"])
    assert largest_difference(*(r.arrays.to_torch_state_dict() for r in results)) < 1e-9
    assert 0 < clipped[0] == clipped[1] < 11 * K * len(CUTS[method][1])
    assert "clients scaled their head gradients down to norm 0.5, by a factor of 0." in caplog.text
    assert error_of(results[1], method) > 1e-3


def test_a_client_that_is_told_another_norm_gives_a_mask_that_stays():
    """Else the server could have all others scale their gradients to nothing."""

    class Unfair(InProcessGrid):
        def _answer(self, message, context):
            if message.metadata.message_type == "train.backward" and context.node_config["partition-id"] == 2:
                frame = content_to_frame(message.content)
                frame.header["cohort"]["max-norm"] = 1e3
                message.content = frame_to_content(frame)
            return super()._answer(message, context)

    fair, unfair = (
        start(grid=grid(make_app(), K), faults=FaultPolicy(max_gradient_norm=1e-9)).arrays.to_torch_state_dict()
        for grid in (InProcessGrid, Unfair)
    )
    assert largest_difference(fair, unfair) > 100


def test_values_beyond_the_room_there_is_make_more(monkeypatch):
    """A client says so, the step is given up, and the examples are drawn again with other weights."""
    monkeypatch.setattr(strategy_module, "StepRunner", RecordingRunner)
    monkeypatch.setattr(secure_module, "_FIRST", -6)  # values up to 1/64
    app = make_app("u-shaped", client_class=RecordingClient)
    result = start("u-shaped", InProcessGrid(app, K), sampler=UniformGlobalSampler(20, seed=3))
    runner = RecordingRunner.latest
    assert runner._summary.refused["beyond fixed point"] >= K
    assert_committed_is_learned(result, "u-shaped")


def assert_committed_is_learned(result, method, tolerance=1e-9):
    """Assert that training equals a centralised one on the batches of the committed steps; return their sizes."""
    data = [client_data(k, K, torch.float64).tensors for k in range(K)]
    batches = [
        tuple(torch.cat([data[k][i][rows] for k, (_, rows) in drawn.items()]) for i in (0, 1))
        for _, drawn in RecordingRunner.latest.committed
    ]
    reference = train_centralised(CUTS[method][0](), batches, sgd)
    assert largest_difference(result.arrays.to_torch_state_dict(), reference) < tolerance
    return [len(y) for _, y in batches]


def test_evaluation_is_of_all_clients_together():
    app = make_app("u-shaped", data_fn=lambda context: _doubled(load_partition_with_test(context)))
    result = start("u-shaped", InProcessGrid(app, K), evaluate_every=1, evaluate_batch_size=64)
    model = u_net()
    model.load_state_dict(result.arrays.to_torch_state_dict())
    data = [client_data(k, K, torch.float64).tensors for k in range(K)]
    x, y = (torch.cat([d[i][: len(d[1]) // 2] for d in data]) for i in (0, 1))
    with torch.no_grad():
        logits = model.eval()(x)
    told = result.evaluate_metrics_clientapp[1]
    assert told["loss"] == pytest.approx(nn.functional.cross_entropy(logits, y).item(), abs=1e-9)
    assert told["accuracy"] == pytest.approx((logits.argmax(1) == y).double().mean().item())
    assert told["num_examples"] == len(y)


def _doubled(data):
    return tuple(torch.utils.data.TensorDataset(d.tensors[0].double(), d.tensors[1]) for d in data)


# --- clients that are lost -------------------------------------------------------------------------------------------
class LosingGrid(InProcessGrid):
    """Loses a client in the middle of some steps, before or after it has done its work."""

    def __init__(self, method):
        super().__init__(make_app(method, client_class=RecordingClient), K)
        self.asked, self.lost = Counter(), Counter()

    def _answer(self, message, context):
        stage, client = message.metadata.message_type, context.node_config["partition-id"]
        self.asked[stage] += 1
        turn = self.asked[stage] // K
        if stage.startswith("train.") and turn in (1, 3, 4, 6) and client == turn % K and stage != "train.describe":
            self.lost[stage] += 1
            if turn % 2:
                super()._answer(message, context)  # too late
            return Message(Error(ERROR_CRASHED, "the process died"), reply_to=message)
        return super()._answer(message, context)


@pytest.mark.parametrize("method", list(CUTS))
def test_a_step_that_loses_a_client_is_given_up_and_drawn_otherwise(method, monkeypatch):
    monkeypatch.setattr(strategy_module, "StepRunner", RecordingRunner)
    grid = LosingGrid(method)
    result = start(method, grid, faults=FaultPolicy(patience=5))
    assert min(grid.lost.values()) >= 2
    assert RecordingRunner.latest._summary.steps_redone >= 3
    assert_each_used_once(RecordingRunner.latest, K, 1)
    assert_committed_is_learned(result, method)


class LosingLast(InProcessGrid):
    """Loses a client in the last step of the first epoch, after it has given its sum."""

    lost = False

    def _answer(self, message, context):
        reply = super()._answer(message, context)
        _, _, request = decode_request(content_to_frame(message.content), WeightStore())
        last = request.stage == "backward" and request.orders.step == 10 and not self.lost
        if last and context.node_config["partition-id"] == 2:
            self.lost = True
            return Message(Error(ERROR_CRASHED, "the process died"), reply_to=message)
        return reply


BY_CLASS = LatentDirichletSampler(40, seed=3)


@pytest.mark.parametrize("sampler", [SAMPLER, BY_CLASS], ids=["at random", "by class"])
def test_a_loss_in_the_last_step_of_an_epoch_does_not_end_the_run(sampler):
    grid = LosingLast(make_app(client_class=RecordingClient), K)
    result = start(grid=grid, num_rounds=2, faults=FaultPolicy(patience=1), sampler=sampler, delays=DELAYS)
    first, second = (result.train_metrics_clientapp[i] for i in (1, 2))
    assert 0 < first["examples_unseen"] == 406 - first["num_examples"] <= 40
    assert (second["num_examples"], second["examples_unseen"]) == (406, 0)


@pytest.mark.parametrize("step", [4, 10])
def test_a_step_that_is_not_finite_is_drawn_again_at_other_weights(step, monkeypatch, caplog):
    """It was given, so its examples must rest; in the last step of an epoch, until the next has made one."""
    done = []

    def loss(outputs, targets):
        diverges = len(done) == step * K + 2
        done.append(diverges)
        return nn.functional.cross_entropy(outputs, targets) * (float("nan") if diverges else 1.0)

    monkeypatch.setattr("psl_flower.server.additive.Additivity.refuted", lambda *arguments, **options: False)
    options = {"faults": FaultPolicy(patience=1, non_finite_loss="skip"), "num_rounds": 2}
    result = start("u-shaped", InProcessGrid(make_app("u-shaped", loss=loss), K), **options)
    assert sum(done) == 1
    assert "is left out: the loss or its gradients are not finite" in caplog.text
    unseen = [result.train_metrics_clientapp[i]["examples_unseen"] for i in (1, 2)]
    assert unseen == ([0, 0] if step == 4 else [36, 0])


def test_where_no_step_is_left_to_be_made_the_run_ends():
    class Losing(InProcessGrid):
        def _answer(self, message, context):
            if message.metadata.message_type == "train.backward" and context.node_config["partition-id"] == 2:
                return Message(Error(ERROR_CRASHED, "the process died"), reply_to=message)
            return super()._answer(message, context)

    sampler = UniformGlobalSampler(406, seed=3)
    with pytest.raises(StepError, match=r"no step could be completed: sums are of at least 3 .* examples once"):
        start(grid=Losing(make_app(), K), sampler=sampler)


class Restarted(InProcessGrid):
    """Its processes are new from some message on: nobody knows the clients' keys any more."""

    def __init__(self):
        super().__init__(make_app(client_class=RecordingClient), K)
        self.count = 0

    def _answer(self, message, context):
        self.count += 1
        if self.count == 40:
            forget_runs()
            for each in self._contexts.values():
                each.state.clear()
        return super()._answer(message, context)


def test_clients_whose_keys_are_lost_make_new_ones(monkeypatch, caplog):
    monkeypatch.setattr(strategy_module, "StepRunner", RecordingRunner)
    caplog.set_level(logging.INFO)
    result = start(grid=Restarted())
    assert_each_used_once(RecordingRunner.latest, K, 1)
    assert_committed_is_learned(result, "parallel")
    assert RecordingRunner.latest._summary.refused["another key"] >= 1
    (server, *_), (client, *_) = (
        [
            record.message.split(": ", 1)[1]
            for record in caplog.records
            if f"Secure aggregation: {whose}" in record.message
        ]
        for whose in ("keys, by client", "own keys")
    )
    told = [set(re.findall(r"\d \w{4}-\w{4}-\w{4}-\w{4}", text)) for text in (server, client)]
    assert told[0] == told[1]
    assert len(told[0]) == K


def test_a_process_that_ends_with_each_message_keeps_the_key_in_its_nodes_state():
    class Forgetful(InProcessGrid):
        def _answer(self, message, context):
            reply = super()._answer(message, context)
            forget_runs()
            return reply

    assert error_of(start(grid=Forgetful(make_app(), K))) < 1e-9


# --- replies that are not what was asked for -----------------------------------------------------------------------
def changed_head(change):
    return changed_output(lambda value: {**value, **change(value)}, "head")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed_output(lambda value: value["values"], "head"), "head: expected a masked sum"),
        (
            changed_head(lambda v: {"values": tree.map_leaves(torch.Tensor.int, v["values"])}),
            "head of '.*': dtype: expected torch.int64",
        ),
        (changed_head(lambda v: {"values": tree.map_leaves(lambda t: t[None], v["values"])}), "head of '.*': shape: "),
        (changed_head(lambda v: {"values": dict(list(v["values"].items())[1:])}), "head: 1 missing"),
        (changed_head(lambda v: {"values": {**v["values"], "stem.bias": None}}), "head: a masked sum must be whole"),
        (changed_head(lambda v: {"present": v["present"][1:]}), "head of 'present': shape: expected"),
    ],
)
def test_a_sum_that_is_not_masked_as_it_should_be_is_refused(change, message):
    class Changing(InProcessGrid):
        def _answer(self, request, context):
            reply = super()._answer(request, context)
            changes = request.metadata.message_type == "train.backward" and context.node_config["partition-id"] == 2
            return change_reply(request, reply, change) if changes else reply

    with pytest.raises(StepError, match=rf"client 2 \(node 4\): {message}"):
        start(grid=Changing(make_app(), K))


# --- few clients, and what does not go together ----------------------------------------------------------------------
def test_steps_of_too_few_clients_are_joined_to_others(caplog):
    sampler = UniformGlobalSampler(3, seed=3)
    assert sampler.plan(Population(range(K), [12] * K)).active_clients().min() < 3
    result = start(sampler=sampler, grid=InProcessGrid(make_app(data_fn=few_examples), K))
    assert result.train_metrics_clientapp[1]["num_examples"] == 48
    assert result.train_metrics_clientapp[1]["clients_per_step"] >= 3
    assert "is left out" not in caplog.text


def test_where_too_few_clients_hold_data_their_steps_are_left_out(caplog):
    def two_of_four(context):
        return torch.utils.data.Subset(few_examples(context), range(12 * (context.node_config["partition-id"] < 2)))

    with pytest.raises(StepError, match="no step could be completed: sums are of at least 3 clients"):
        start(sampler=UniformGlobalSampler(3, seed=3), grid=InProcessGrid(make_app(data_fn=two_of_four), K))
    assert "step 0 is left out: 2 clients in it, sums are of 3 at least" in caplog.text


def few_examples(context):
    return torch.utils.data.Subset(load_partition_64(context), range(12))


@pytest.mark.parametrize(
    ("secure", "options", "message"),
    [
        (False, {}, "the server wants sums of clients only, client 0 gives its own"),
        (True, {"secure_aggregation": False}, "this client gives sums only, masked: give the server the same"),
    ],
)
def test_server_and_clients_must_both_want_it(secure, options, message):
    with pytest.raises(MembershipError, match=message):
        start(grid=InProcessGrid(make_app(secure=secure), K), **options)


@pytest.mark.parametrize(
    ("clients", "message"),
    [
        (SecureAggregation(least=4, neighbours=2), "the server wants masks with 3 neighbours, this client with 2"),
        (SecureAggregation(least=9), "4 clients take part, this client gives sums of at least 9 only"),
    ],
)
def test_other_options_on_the_clients_are_told(clients, message):
    with pytest.raises(StepError, match=message):
        start(grid=InProcessGrid(make_app(secure=clients), K))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "splitfed-v1"}, "method 'splitfed-v1' adds up what clients keep"),
        ({"method": "sequential"}, "method 'sequential' a step is of one client"),
        ({"stream_options": StreamOptions(sum_gradients=False)}, "it cannot have them one by one"),
        ({"secure_aggregation": 3}, "must be True, False or a SecureAggregation, got 3"),
    ],
)
def test_what_does_not_go_with_it_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        ParallelSplitLearning(tiny_resnet(), cut=CUT, **{"secure_aggregation": True, **options})


def test_the_default_app_keeps_labels_and_gradients_with_its_clients(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    config = {
        "tail": "head",
        "secure-aggregation": True,
        "label-epsilon": 1.0,
        "sampler": "aligned",
        "delays": "slow-fraction",
        "model": "tiny-cnn",
        "batch-size": 256,
        "num-server-rounds": 1,
        "output-dir": str(tmp_path),
    }
    grid = InProcessGrid(client_app.app, K, run_config=config)
    server_app.app(grid, Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=config))
    assert "Secure aggregation: keys, by client: 0 " in caplog.text
    record = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert record["num_examples"] == 1437
    assert 0.2 < record["evaluate_clientapp"]["accuracy"] < 1
    settings = json.loads((tmp_path / "config.json").read_text())["strategy"]
    assert settings["secure_aggregation"] == {"class": "SecureAggregation", "least": 3, "neighbours": "auto"}
    assert settings["label_counts"] == "noisy"


def test_a_resumed_run_ends_as_an_uninterrupted_one(tmp_path):
    whole = start("u-shaped", num_rounds=2)
    options = {"output_dir": tmp_path, "resume_from": "latest"}
    start("u-shaped", num_rounds=1, **options)
    resumed = start("u-shaped", num_rounds=2, **options)
    for name, t in whole.arrays.to_torch_state_dict().items():
        assert torch.equal(t, resumed.arrays.to_torch_state_dict()[name])


def test_a_run_is_not_resumed_without_one_of_its_clients(tmp_path):
    options = {"output_dir": tmp_path, "resume_from": "latest"}
    start(num_rounds=1, **options)
    with pytest.raises(MembershipError, match=r"1 are not connected \(the first is client 3\): start them"):
        start(num_rounds=2, grid=InProcessGrid(make_app(data_fn=of_four), K - 1), **options)


def of_four(context):
    return client_data(context.node_config["partition-id"], K, torch.float64)


# --- the curious server ----------------------------------------------------------------------------------------------
class CuriousGrid(InProcessGrid):
    """Keeps the sums that clients reply, masked or not, as long vectors."""

    def __init__(self, method, secure):
        super().__init__(make_app(method, secure=secure), K)
        self.received = {}  # by stage and output: of each client, those of all steps

    def _answer(self, message, context):
        reply = super()._answer(message, context)
        _, _, request = decode_request(content_to_frame(message.content), WeightStore())
        for part in decode_reply(content_to_frame(reply.content), request).parts:
            for name, leaf in part.outputs.items():
                if leaf.kind.value == "sum" and (leaves := tree.leaves(leaf.value)):
                    leaves = tree.leaves(leaf.value["values"]) if request.cohort else leaves
                    flat = torch.cat([t.flatten() for t in leaves]).numpy()
                    of_all = self.received.setdefault((request.stage, name), {})
                    of_all.setdefault(context.node_config["partition-id"], []).append(flat)
        return reply

    def found(self, where, members):
        """Return what a sum over some clients comes to, step after step; masked ones are whole numbers mod 2^64."""
        total = [sum(steps) for steps in zip(*(self.received[where][k] for k in members), strict=True)]
        return np.concatenate(total).astype(float)


SUBSETS = [[k for k in range(K) if mask >> k & 1] for mask in range(1, 2**K)]


@pytest.mark.parametrize("method", list(CUTS))
def test_no_proper_sum_can_be_read_from_what_was_received(method):
    """What was received of some of the clients goes with nobody's gradients; of all, it is their sum.

    The gradients are those that the server has received without masks, of the same training.
    """
    plain, secure = CuriousGrid(method, False), CuriousGrid(method, True)
    start(method, plain, secure_aggregation=False)
    start(method, secure)
    assert plain.received.keys() == secure.received.keys()
    for where in plain.received:
        for members in SUBSETS:
            truth = plain.found(where, members)
            for others in SUBSETS:
                if len(others) == K:
                    continue
                seen = secure.found(where, others)
                assert abs(np.corrcoef(seen, truth)[0, 1]) < 6 / np.sqrt(len(truth))  # by chance
            if len(members) < K:
                continue
            for total, true in zip(np.split(secure.found(where, members), 11), np.split(truth, 11), strict=True):
                places = round(np.log2(np.linalg.norm(total) / np.linalg.norm(true)))
                assert np.allclose(np.ldexp(total, -places), true, rtol=1e-9, atol=1e-9)
