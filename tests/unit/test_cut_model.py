"""Models cut by hand, and the common way to the halves of any model."""

import copy
import pickle

import pytest
import torch
from torch import nn

from psl_flower.errors import ConfigError, CutError
from psl_flower.split import SplitModel, cut_model


class Server(nn.Module):
    def __init__(self):
        super().__init__()
        self.act = nn.ReLU(inplace=True)
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 2)

    def forward(self, x, y=None):
        x = self.act(x)
        return self.head(self.norm(x if y is None else x + y))


class Fork(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.one, self.two = nn.Linear(4, 6), nn.Linear(4, 6)
        self.kind = kind

    def forward(self, x):
        return self.kind((self.one(x), self.two(x)))


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.spare = nn.Linear(2, 2)
        self.stem, self.norm, self.head = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.norm(self.stem(x)))


CLIENTS = [lambda: nn.Linear(4, 6), lambda: Fork(tuple), lambda: Fork(list)]


@pytest.mark.parametrize("make", CLIENTS)
def test_hand_cut_halves_are_the_model(make):
    model = SplitModel(client=make(), server=Server())
    halves = cut_model(model)
    assert [*halves.client.state_dict(), *halves.server.state_dict()] == [*model.state_dict()]
    assert {name.split(".")[0] for name in halves.client.state_dict()} == {"client"}
    assert {name.split(".")[0] for name in halves.server.state_dict()} == {"server"}
    assert halves.unused == ()
    assert {*map(id, model.parameters())}.isdisjoint(map(id, halves.client.parameters()))
    x = torch.randn(3, 4)
    for mode in (True, False):
        whole = copy.deepcopy(model).train(mode)
        client, server = copy.deepcopy(halves.client).train(mode), copy.deepcopy(halves.server).train(mode)
        activations = client(x)
        assert isinstance(activations, tuple)
        received = [activation.detach().requires_grad_() for activation in activations]
        output, expected = server(*received), whole(x)
        assert torch.equal(output, expected)
        output.sum().backward()
        torch.autograd.backward(activations, [tensor.grad for tensor in received])
        expected.sum().backward()
        parameters = {**dict(client.named_parameters()), **dict(server.named_parameters())}
        for name, parameter in whole.named_parameters():
            torch.testing.assert_close(parameters[name].grad, parameter.grad)


def test_hand_cut_halves_keep_the_training_flags_and_pickle():
    model = SplitModel(client=nn.Linear(4, 6), server=Server()).eval()
    halves = pickle.loads(pickle.dumps(cut_model(model)))
    assert not halves.client.training
    assert not halves.server.training
    x = torch.randn(2, 4)
    assert torch.equal(halves.server(*halves.client(x)), model(x))


@pytest.mark.parametrize(
    ("client", "words"),
    [
        (Fork(lambda pair: {"one": pair[0]}), "value number 0 is a dict"),
        (Fork(lambda pair: pair[0].sum()), r"number 0 has shape \(\) for a batch of 3"),
        (Fork(lambda pair: (pair[0], pair[1].t())), r"number 1 has shape \(6, 3\) for a batch of 3"),
        (Fork(lambda pair: ()), "nothing crosses"),
    ],
)
def test_what_a_client_half_may_return(client, words):
    model = SplitModel(client=client, server=Server())
    for run in (model, cut_model(model).client):
        with pytest.raises(CutError, match=words):
            run(torch.randn(3, 4))


def test_what_a_split_model_refuses():
    with pytest.raises(ConfigError, match="server must be an nn"):
        SplitModel(client=nn.Linear(2, 2), server=torch.relu)
    with pytest.raises(CutError, match="client half has no parameters"):
        SplitModel(client=nn.Flatten(), server=nn.Linear(2, 2))
    with pytest.raises(CutError, match="server half has no parameters"):
        SplitModel(client=nn.Linear(2, 2), server=nn.Softmax(1))
    layer = nn.Linear(2, 2)
    with pytest.raises(CutError, match=r"'client\.weight' and 'server\.0\.weight' are one tensor"):
        SplitModel(client=layer, server=nn.Sequential(layer))
    model = SplitModel(client=nn.Linear(2, 2), server=nn.Linear(2, 2))
    model.server.weight = model.client.weight
    with pytest.raises(CutError, match="one tensor"):
        cut_model(model)


def test_cut_belongs_to_models_that_are_not_cut_yet():
    with pytest.raises(ConfigError, match="cut already, got cut='server'"):
        cut_model(SplitModel(client=nn.Linear(2, 2), server=nn.Linear(2, 2)), "server")
    with pytest.raises(ConfigError, match=r"Plain needs a cut.*'norm', 'head'"):
        cut_model(Plain())


def test_a_split_model_is_not_cut_by_name():
    with pytest.raises(CutError, match="SplitModel"):
        cut_model(nn.Sequential(SplitModel(client=nn.Linear(2, 2), server=nn.Linear(2, 2))), "0.server")


def test_arrays_in_and_out():
    model, other = Plain(), Plain()
    halves = cut_model(model, "norm")
    assert halves.unused == ("spare.weight", "spare.bias")
    state = {name: value.clone() for name, value in other.state_dict().items()}
    halves.load(state)
    x = torch.randn(5, 4)
    assert torch.equal(halves.server.train()(*halves.client.train()(x)), other.train()(x))
    merged = halves.merge(state)
    assert [*merged] == [*state]
    assert all(torch.equal(merged[name], value) for name, value in other.state_dict().items())
    assert merged["spare.weight"] is state["spare.weight"]
    model.load_state_dict(merged)
    halves.load({name: value for name, value in state.items() if "spare" not in name})


def test_arrays_that_do_not_fit():
    halves = cut_model(Plain(), "norm")
    state = Plain().state_dict()
    before = {name: value.clone() for name, value in halves.merge(state).items()}
    with pytest.raises(ConfigError, match=r"missing 'head\.bias', unknown none"):
        halves.load({name: value for name, value in state.items() if name != "head.bias"})
    with pytest.raises(ConfigError, match="missing none, unknown 'more'"):
        halves.load({**state, "more": torch.zeros(1)})
    with pytest.raises(ConfigError, match=r"'stem\.bias': expected \(6,\), got \(7,\)"):
        halves.load({**state, "stem.bias": torch.zeros(7)})
    assert all(torch.equal(value, before[name]) for name, value in halves.merge(state).items())
