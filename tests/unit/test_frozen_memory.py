"""Frozen weights lie in the server's memory once, where they are the model's own: large models are fine-tuned so."""

import pytest
import torch
from flwr.app import ArrayRecord
from torch import nn

from psl_flower import InProcessGrid, ParallelSplitLearning, SplitModel, UniformGlobalSampler, split_client_app
from psl_flower.strategy.arrays import arrays_to_state


def by_name():
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    model[0].weight.requires_grad_(False)
    model[2].weight.requires_grad_(False)
    return model


def by_hand():
    model = by_name()
    return SplitModel(client=model[:2], server=model[2:])


def places(module):
    return {name: p.data_ptr() for name, p in module.named_parameters()}


@pytest.mark.parametrize(("make", "cut"), [(by_name, "2"), (by_hand, None)])
def test_state_trainable_copies_no_frozen_weight(make, cut):
    model = make()
    strategy = ParallelSplitLearning(model, cut=cut, state="trainable", device="cpu")
    trainable = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    buffers = dict(model.named_buffers())
    state = arrays_to_state(ArrayRecord({**trainable, **buffers}), strategy._template)
    backend = strategy._backend(state)
    own, held = places(model), {n: at for part in backend.parts.values() for n, at in places(part).items()}
    assert own.keys() == held.keys()
    assert {name for name in own if own[name] == held[name]} == own.keys() - trainable.keys()
    assert not {t.data_ptr() for t in buffers.values()} & {
        t.data_ptr() for part in backend.parts.values() for t in part.buffers()
    }
    frozen = own.keys() - trainable.keys()
    everything = backend.state()  # what callbacks and evaluation are given
    assert all(everything[name].data_ptr() == own[name] for name in frozen)
    assert all(everything[name].data_ptr() != held[name] for name in trainable)
    sent = backend.weights()["head"].constants
    assert [t.data_ptr() for n, t in sent.items() if n in frozen] == [own[n] for n in sent if n in frozen]


@pytest.mark.parametrize("method", ["parallel", "splitfed-v1"])
@pytest.mark.parametrize("state", ["all", "trainable"])
def test_the_users_model_is_not_changed(method, state):
    """Neither by the arrays that `start` is given, nor where the parts of clients are averaged."""
    model = by_name()[:3].double()  # no statistics of a batch
    before = {name: t.clone() for name, t in model.state_dict().items()}
    given = {n: p.detach() + 1 for n, p in model.named_parameters() if state == "all" or p.requires_grad}

    def sgd(parameters):
        return torch.optim.SGD(parameters, lr=0.1)

    def load(context):
        torch.manual_seed(context.node_config["partition-id"])
        return torch.randn(9, 4).double(), torch.randint(8, (9,))

    strategy = ParallelSplitLearning(
        model, cut="2", method=method, state=state, optimizer=sgd, device="cpu", sampler=UniformGlobalSampler(6, seed=0)
    )
    app = split_client_app(lambda: by_name()[:3].double(), cut="2", data_fn=load, method=method, optimizer=sgd)
    result = strategy.start(InProcessGrid(app, 2), ArrayRecord(given), 1).arrays.to_torch_state_dict()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert all(torch.equal(t, given[name]) != (name in trained) for name, t in result.items())
