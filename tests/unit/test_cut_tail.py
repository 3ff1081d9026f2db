"""Three parts: head and tail on the client, the body on the server; what skips the body stays on the client."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from psl_flower.errors import ConfigError, CutError
from psl_flower.split import SplitModel, cut_model, split_module
from psl_flower.torchvision_compat import import_torchvision

models = import_torchvision().models


class UNet(nn.Module):
    """Skips on two levels, one of them past the body; sizes of the input used at the end."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.down = nn.Conv2d(4, 8, 3, stride=2, padding=1)
        self.bottom = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3, padding=1))
        self.up = nn.Conv2d(8, 4, 1)
        self.join = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(8, 4, 3, padding=1))
        self.out = nn.Conv2d(4, 2, 1)

    def forward(self, x):
        skip = F.relu(self.stem(x))
        low = self.down(F.dropout(skip, 0.2, self.training))
        y = self.up(self.bottom(low) + low)
        y = F.interpolate(y, size=x.shape[-2:])
        return self.out(self.join(torch.cat([skip, y], 1)) + x)


class Masked(nn.Module):
    """A padding mask and token ids that the body and the tail need, and one weight for both ends."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8, padding_idx=0)
        self.mix = nn.Linear(8, 8)
        self.body, self.more = nn.Linear(8, 8), nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.out = nn.Linear(8, 11)
        self.out.weight = self.embed.weight

    def forward(self, ids):
        mask = ids.eq(0)
        length = (~mask).sum(1)
        h = self.mix(self.embed(ids))
        h = self.more(self.body(h).masked_fill(mask[..., None], 0.0))
        positive = h.argmax(-1)
        h = self.norm(h / length[:, None, None])
        return self.out(h), mask, positive


def plain():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))


CASES = [
    (UNet, "down", "join", (2, 1, 8, 8), 1, 2),
    (UNet, "bottom.1", "up", (2, 1, 8, 8), 1, 3),
    (models.resnet18, "layer1.0.conv2", "layer4.1", (2, 3, 32, 32), 2, 0),
    (models.resnet18, "layer2", "fc", (2, 3, 32, 32), 1, 0),
    (plain, "2", "4", (5, 4), 1, 0),
    (plain, "1", "3", (5, 4), 1, 0),
    (Masked, "body", "norm", (3, 5), 2, 2),
]


def example(make, shape):
    return torch.randint(0, 11, shape) if make is Masked else torch.randn(shape, dtype=torch.float64)


def leaves(tensors):
    return [t.detach().clone().requires_grad_(t.requires_grad) for t in tensors]


def back(sent, received):
    pairs = [(s, r.grad) for s, r in zip(sent, received, strict=True) if r.grad is not None]
    return [s for s, _ in pairs], [gradient for _, gradient in pairs]


def score(output):
    return (output[0] if isinstance(output, tuple) else output).square().sum()


def run_parts(head, body, tail, x):
    """Run a U-shaped step: only what crosses reaches the body, and only gradients of the same shapes come back."""
    sent, kept = head(x)
    at_server = leaves(sent)
    returned = body(*at_server)
    at_client, local = leaves(returned), leaves(kept)
    output = tail(*at_client, *local)
    score(output).backward()
    torch.autograd.backward(*back(returned, at_client))
    outputs, gradients = (one + two for one, two in zip(back(sent, at_server), back(kept, local), strict=True))
    torch.autograd.backward(outputs, gradients)
    return output


@pytest.mark.parametrize(("make", "cut", "tail", "shape", "crossing", "keeping"), CASES)
def test_three_parts_are_the_model(make, cut, tail, shape, crossing, keeping):
    torch.manual_seed(0)
    model = make().double()
    before = copy.deepcopy(model.state_dict())
    parts = split_module(model, cut, tail=tail)
    assert set().union(*(part.state_dict() for part in parts)) == {*model.state_dict()}
    server = {*parts[1].state_dict()}
    assert server.isdisjoint({*parts[0].state_dict(), *parts[2].state_dict()})
    x = example(make, shape)
    whole = copy.deepcopy(model).train()
    torch.manual_seed(1)
    expected = whole(x)
    score(expected).backward()
    for part in parts:
        part.train()
    torch.manual_seed(1)
    found = run_parts(*parts, x)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    gradients = {name: p.grad for part in parts for name, p in part.named_parameters(remove_duplicate=False)}
    for name, parameter in whole.named_parameters(remove_duplicate=False):
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-9, atol=1e-9)
    buffers = {name: b for part in parts for name, b in part.named_buffers()}
    assert all(torch.equal(buffers[name], buffer) for name, buffer in whole.named_buffers())
    head, body, tail = pickle.loads(pickle.dumps(parts))
    whole.eval(), head.eval(), body.eval(), tail.eval()
    for rows in (1, 4):
        x = example(make, (rows, *shape[1:]))
        sent, kept = head(x)
        assert (len(sent), len(kept)) == (crossing, keeping)
        assert all(len(tensor) == rows for tensor in (*sent, *kept))
        torch.testing.assert_close(tail(*body(*sent), *kept), whole(x), rtol=0, atol=0)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_weights_of_both_ends_stay_tied():
    model = Masked()
    head, _, tail = split_module(model, "body", tail="norm")
    assert head.get_parameter("embed.weight") is tail.get_parameter("out.weight")
    assert "embed.weight" in tail.state_dict()
    model.body.weight = nn.Parameter(torch.zeros(8, 8))
    model.mix.weight = model.body.weight
    with pytest.raises(CutError, match=r"'mix\.weight' would be needed on the client .*there as 'body\.weight'"):
        split_module(model, "body", tail="norm")


def test_a_layer_of_both_ends_is_one_layer():
    class Ends(nn.Module):
        def __init__(self):
            super().__init__()
            self.ends, self.act, self.body, self.last = nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.ends(self.last(self.act(self.body(self.act(self.ends(x))))).repeat(1, 2))

    model = Ends().double()
    head, body, tail = split_module(model, "body", tail="last")
    assert head.get_submodule("ends") is tail.get_submodule("ends")
    assert head.get_submodule("act") is not body.get_submodule("act")
    x = torch.randn(3, 4, dtype=torch.float64)
    model(x).square().sum().backward()
    run_parts(head, body, tail, x)
    torch.testing.assert_close(head.get_parameter("ends.weight").grad, model.ends.weight.grad)


@pytest.mark.parametrize(
    ("cut", "tail", "words"),
    [
        ("2", "9", "tail '9': Sequential has no such submodule"),
        ("2", "", "tail must be the name of a submodule, got ''"),
        ("4", "2", "cut '4', tail '2': the tail '2' must come after it"),
        ("2", "2", "must come after it"),
        ("0", "4", "the head would have no parameters, cut later"),
        ("3", "4", "the body would have no parameters, cut earlier, or let the tail begin later"),
    ],
)
def test_tails_that_cannot_be(cut, tail, words):
    with pytest.raises(CutError) as caught:
        split_module(plain(), cut, tail=tail)
    assert words in str(caught.value)


def test_a_tail_may_have_no_parameters():
    model = nn.Sequential(*plain(), nn.Softmax(1))
    head, body, tail = split_module(model, "2", tail="5")
    x = torch.randn(2, 4)
    sent, kept = head(x)
    assert torch.equal(tail(*body(*sent), *kept), model(x))
    assert not tail.state_dict()


class Ends(nn.Module):
    def __init__(self, go):
        super().__init__()
        self.one, self.two, self.three, self.go = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), go
        self.more, self.never = nn.Linear(4, 4), nn.Linear(1, 1)

    def forward(self, x):
        return self.go(self, x)


def raw(net, x):
    return net.three(net.more(net.two(net.one(x)) + x))


def number(net, x):
    y = net.two(net.one(x))
    total = y.sum().item()
    return net.three(y * 2) / total


def not_back(net, x):
    y = net.one(x)
    net.two(y)
    return net.three(y)


@pytest.mark.parametrize(
    ("go", "tail", "words"),
    [
        (raw, "three", "the input 'x' is used after the cut"),
        (number, "three", "is a number that only the server knows"),
        (not_back, "three", "nothing computed before the tail 'three' is used after it"),
        (raw, "never", "the model never calls 'never'"),
    ],
)
def test_what_three_parts_refuse(go, tail, words):
    with pytest.raises(CutError) as caught:
        split_module(Ends(go), "two", tail=tail)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("join", "crossing", "keeping"),
    [
        (lambda net, y, skip: torch.cat([skip, y], 1)[:, :4], 1, 1),
        (lambda net, y, skip: F.pad(y, [0, skip.shape[1] - y.shape[1]]).relu_(), 1, 1),
        (lambda net, y, skip: net.drop(y.mul_(2).add_(skip)), 1, 1),
        (lambda net, y, skip: y + skip * net.scale, 2, 0),  # parameters stay where their names say
        (lambda net, y, skip: (y + skip) + net.more(y), 2, 0),  # `more` might change y in place
    ],
)
def test_where_a_skip_connection_is_joined(join, crossing, keeping):
    def go(net, x):
        skip = net.one(x).tanh()
        return net.three(join(net, net.two(skip.relu()), skip))

    model = Ends(go).double()
    model.scale, model.drop = nn.Parameter(torch.rand(4)), nn.Dropout(0.5)
    model.double().eval()
    head, body, tail = split_module(model, "two", tail="three")
    x = torch.randn(3, 4, dtype=torch.float64)
    sent, kept = head(x)
    assert (len(sent), len(kept)) == (crossing, keeping)
    assert "three.weight" in tail.state_dict()
    assert "scale" not in tail.state_dict()
    assert torch.equal(tail(*body(*sent), *kept), model(x))


def test_the_input_may_skip_to_the_tail():
    model = Ends(lambda net, x: net.three(net.two(net.one(x))) + x)
    head, body, tail = split_module(model, "two", tail="three")
    x = torch.randn(3, 4)
    sent, kept = head(x)
    assert [*map(id, kept)] == [id(x)]
    assert torch.equal(tail(*body(*sent), *kept), model(x))


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 6)

    def forward(self, x):
        return (self.layer(x), x > 0), (x,)


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, y, x):
        return self.layer(y) + x


class Middle(nn.Module):
    def __init__(self):
        super().__init__()
        self.act, self.layer = nn.ReLU(inplace=True), nn.Linear(6, 6)

    def forward(self, y, positive):
        return self.layer(self.act(y)) * positive.sum(1, keepdim=True)


def test_three_parts_by_hand():
    model = SplitModel(client=Encoder(), server=Middle(), tail=Decoder()).double()
    halves = cut_model(model)
    assert [key for part in halves.parts for key in part.state_dict()] == [*model.state_dict()]
    assert {*halves.tail.state_dict()} == {"tail.layer.weight", "tail.layer.bias"}
    x = torch.randn(3, 4, dtype=torch.float64)
    expected = model(x)
    score(expected).backward()
    assert torch.equal(run_parts(*halves.parts, x), expected)
    gradients = {name: p.grad for part in halves.parts for name, p in part.named_parameters()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad)


def test_weights_tied_by_hand():
    layer = nn.Linear(4, 4)
    model = SplitModel(client=nn.Sequential(layer), server=nn.Linear(4, 4), tail=nn.Sequential(layer))
    halves = cut_model(model)
    assert halves.client.get_parameter("client.0.weight") is halves.tail.get_parameter("tail.0.weight")
    with pytest.raises(CutError, match=r"'tail\.0\.weight' and 'server\.weight' are one tensor"):
        SplitModel(client=nn.Linear(4, 4), server=layer, tail=nn.Sequential(layer))
    with pytest.raises(ConfigError, match="tail must be an nn"):
        SplitModel(client=nn.Linear(4, 4), server=layer, tail=torch.relu)
    with pytest.raises(ConfigError, match="cut already, got tail='fc'"):
        cut_model(model, tail="fc")


def test_arrays_of_three_parts():
    model, other = Masked(), Masked()
    halves = cut_model(model, "body", tail="norm")
    state = {name: value.clone() for name, value in other.state_dict().items()}
    halves.load(state)
    merged = halves.merge(state)
    assert [*merged] == [*state]
    assert all(torch.equal(merged[name], value) for name, value in other.state_dict().items())
    with pytest.raises(ConfigError, match=r"missing 'norm\.bias'"):
        halves.load({name: value for name, value in state.items() if name != "norm.bias"})
