"""Whether a client sees that gradients do not follow the labels it has told."""

import copy
import uuid
from collections import OrderedDict

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord
from torch import nn
from torch.utils.data import TensorDataset

from psl_flower import InProcessGrid, ParallelSplitLearning, UniformGlobalSampler, split_client_app, tree
from psl_flower.client import keeping
from psl_flower.errors import ConfigError
from psl_flower.methods import ParallelSplit
from psl_flower.privacy import GradientScrutiny, Secret, parse_defences
from psl_flower.privacy.defences.scrutiny import Watch

CLASSES, WIDTH, STEPS = 4, 30, 60


def labels(rng, share=0.2):
    """Return pairs of labels, told and true."""
    true = rng.integers(0, CLASSES, 10)
    told = np.where(rng.random(10) < share, (true + rng.integers(1, CLASSES, 10)) % CLASSES, true)
    return list(zip(told.tolist(), true.tolist(), strict=True))


def gradients(rng, which):
    """Return noisy gradients that point where those of a label do, each of a length of its own."""
    directions = np.random.default_rng(7).normal(size=(CLASSES, WIDTH))
    return rng.lognormal(size=(len(which), 1)) * (directions[which] + rng.normal(size=(len(which), WIDTH)))


@pytest.mark.parametrize(("follows", "alarmed"), [("told", 0), ("true", 50), ("nothing", 50)])
def test_only_gradients_that_follow_what_was_told_raise_no_alarm(follows, alarmed):
    raised = 0
    for seed in range(50):
        rng, watch, seen = np.random.default_rng(seed), Watch(looks=16, least=0.75), False
        for _ in range(STEPS):
            pairs = labels(rng)
            which = {
                "told": [told for told, _ in pairs],
                "true": [true for _, true in pairs],
                "nothing": rng.integers(0, CLASSES, 10),
            }
            watch.see(gradients(rng, which[follows]), pairs)
            seen |= watch.alarmed
        raised += seen
    assert abs(raised - alarmed) <= 1


def test_nothing_is_judged_before_enough_was_seen():
    rng, watch = np.random.default_rng(0), Watch(looks=16, least=0.75)
    watch.see(gradients(rng, [0] * 10), [(0, 0)] * 10)
    watch.see(gradients(rng, [0] * 20), [(1, 0)] * 20)  # what gradients of label 1 look like is not known
    assert watch.share is None
    watch.see(gradients(rng, [1] * 10), [(1, 1)] * 10)
    watch.see(gradients(rng, [1] * 15), [(1, 0)] * 15)
    assert not watch.alarmed
    watch.see(gradients(rng, [0] * 16), [(1, 0)] * 16)
    assert watch.alarmed
    assert "ask who runs it" in watch.describe()


def test_the_share_of_wrong_labels_is_what_was_asked_for_and_the_same_each_time():
    scrutiny, secret = GradientScrutiny(10, share=0.1), Secret()
    true, examples = np.arange(5000) % 10, np.arange(5000)
    told = scrutiny.labels(true, examples, secret, b"labels 0 train ")
    assert 0.08 < (told != true).mean() < 0.12
    assert np.array_equal(told, scrutiny.labels(true, examples, secret, b"labels 0 train "))
    assert np.array_equal(true, scrutiny.labels(true, examples, secret, b"labels 0 test "))


def test_it_is_written_like_the_others_and_refuses_what_is_out_of_range():
    (made,) = parse_defences("GradientScrutiny(10, share=0.05)")
    assert isinstance(made, GradientScrutiny)
    assert (made.classes, made.share) == (10, 0.05)
    for options in ({"share": 0.0}, {"share": 0.5}, {"looks": 0}, {"least": 0.0}, {"least": 1.1}, {"classes": 1}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            GradientScrutiny(**{"classes": 10, **options})


def test_only_classes_that_the_client_holds_are_told_wrongly(caplog):
    scrutiny, few, one = GradientScrutiny(10, share=0.2), Secret(), Secret()
    scrutiny.meet(np.array([3, 8]), few)
    assert not caplog.records
    scrutiny.meet(np.array([5]), one)
    scrutiny.meet(np.array([5]), one)
    (record,) = caplog.records
    assert "judges nothing here" in record.message
    true, examples = np.where(np.arange(2000) % 2, 3, 8), np.arange(2000)
    told = scrutiny.labels(true, examples, few, b"labels 0 train ")
    assert set(told) == {3, 8}
    assert 0.15 < (told != true).mean() < 0.25
    assert (scrutiny.labels(np.full(2000, 5), examples, one, b"labels 0 train ") == 5).all()
    with pytest.raises(ConfigError, match="GradientScrutiny is for the classes 0 to 9: there are other labels"):
        scrutiny.meet(np.array([5, 10]), few)


class Evil(ParallelSplit):
    """Sends back noise as long as the gradients are."""

    def step(self, ctx):
        sent = ctx.call(self.forward)
        out = ctx.body.forward_backward(sent.activations, sent.labels)
        noise = tree.map_leaves(lambda t: torch.randn_like(t) * t.norm() / t.numel() ** 0.5, out.gradient)
        back = ctx.call(self.backward, gradient=noise)
        ctx.commit(head=back.head, body=out.parameter_gradients)
        return out


def few_classes(context):
    """Return examples of two classes of ten, others with each client."""
    client = int(context.node_config["partition-id"])
    rng = np.random.default_rng(client)
    labels = 2 * client + rng.integers(0, 2, 300)
    centres = 3 * np.random.default_rng(9).normal(size=(10, 8))
    return TensorDataset(
        torch.from_numpy(centres[labels] + rng.normal(size=(300, 8))).float(), torch.from_numpy(labels)
    )


def watched(method, kind=InProcessGrid):
    """Train for some rounds; return what two clients have seen."""
    torch.manual_seed(1)
    scrutiny = GradientScrutiny(10, leave=False)
    model = nn.Sequential(OrderedDict(a=nn.Linear(8, 16), c=nn.ReLU(), b=nn.Linear(16, 10)))
    app = split_client_app(lambda: copy.deepcopy(model), cut="b", data_fn=few_classes, defences=[scrutiny])
    strategy = ParallelSplitLearning(
        model,
        cut="b",
        method=method(),
        sampler=UniformGlobalSampler(50, seed=0),
        transport="messages",
        evaluate_every=0,
        device="cpu",
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    )
    strategy.start(kind(app, 2), ArrayRecord(model.state_dict()), num_rounds=3)
    return scrutiny.watches()


@pytest.mark.parametrize(("method", "alarmed"), [(ParallelSplit, 0), (Evil, 2)])
def test_clients_of_two_classes_tell_an_honest_server_from_another(method, alarmed, caplog):
    watches = watched(method)
    assert len(watches) == 2
    assert all(watch.share is not None for watch in watches)
    assert sum(watch.alarms > 0 for watch in watches) == alarmed
    assert not [record for record in caplog.records if "one process after another" in record.message]


class OtherProcesses(InProcessGrid):
    """Answers each message under the name of another process."""

    def _answer(self, message, context):
        keeping.PROCESS_ID = str(uuid.uuid4())
        return super()._answer(message, context)


def test_a_client_is_told_once_where_each_message_has_a_process_of_its_own(monkeypatch, caplog):
    monkeypatch.setattr(keeping, "PROCESS_ID", keeping.PROCESS_ID)
    watched(ParallelSplit, OtherProcesses)
    assert len([record for record in caplog.records if "one process after another" in record.message]) == 2
