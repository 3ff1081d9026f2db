"""A cut that cannot be made is refused with its name, the reason and a way out."""

import inspect
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from packaging.version import Version
from torch import nn

from psl_flower.errors import ConfigError, CutError
from psl_flower.split import cut_candidates, split_module


class Net(nn.Module):
    """Five layers and whatever `go` makes of them."""

    def __init__(self, go=None):
        super().__init__()
        self.flat = nn.Flatten()
        self.stem = nn.Linear(4, 4)
        self.middle = nn.Linear(4, 4)
        self.last = nn.Linear(4, 4)
        self.soft = nn.Softmax(1)
        self.never = nn.Linear(4, 4)
        self.register_buffer("level", torch.ones(4))
        self.calls = 0
        self.go = go or (lambda net, x: net.soft(net.last(net.middle(net.stem(net.flat(x))))))

    def forward(self, x):
        return self.go(self, x)


def refusal(model, cut):
    with pytest.raises(CutError) as caught:
        split_module(model, cut)
    return str(caught.value)


@pytest.mark.parametrize(
    ("cut", "words"),
    [
        ("midle", ["'midle'", "no such submodule", "Did you mean 'middle'", "'middle', 'last'"]),
        ("layer9", ["'layer9'", "no such submodule", "'middle', 'last'"]),
        ("stem.weight", ["'stem.weight'", "no such submodule"]),
        ("", ["must be the name of a submodule", "''", "'middle', 'last'"]),
        (None, ["must be the name of a submodule", "None"]),
        (3, ["must be the name of a submodule", "3"]),
        ("never", ["'never'", "never calls it", "'middle', 'last'"]),
        ("flat", ["'flat'", "client half would have no parameters", "cut later"]),
        ("stem", ["'stem'", "client half would have no parameters", "cut later"]),
        ("soft", ["'soft'", "server half would have no parameters", "cut earlier"]),
    ],
)
def test_names_and_ends(cut, words):
    message = refusal(Net(), cut)
    assert all(word in message for word in words), message


def test_a_lazy_model():
    with pytest.raises(ConfigError, match=r"'0\.weight' has no shape yet"):
        split_module(nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 4)), "1")


def test_cut_errors_are_config_errors_and_value_errors():
    assert issubclass(CutError, ConfigError)
    with pytest.raises(ValueError, match="layer9"):
        split_module(Net(), "layer9")


def twice(net, x):
    x = net.stem(x)
    return net.last(net.stem(net.middle(x)))


def tied(net, x):
    x = net.middle(net.stem(x))
    return F.linear(x, net.stem.weight)


def buffer_on_both_sides(net, x):
    return net.last(net.middle(net.stem(x) * net.level) * net.level)


def around(net, x):
    return net.middle(net.stem(x)) + x


def no_way_across(net, x):
    a = net.stem(x)
    return net.last(net.middle(net.level.expand(a.shape[0], 4)))


def read_out(net, x):
    y = net.stem(x)
    total = y.sum().item()
    return net.middle(y) / total


@pytest.mark.parametrize(
    ("go", "words"),
    [
        (twice, ["'stem.weight'", "on the client and on the server"]),
        (tied, ["'stem.weight'", "on the client and on the server"]),
        (buffer_on_both_sides, ["'level'", "on the client and on the server"]),
        (around, ["the input 'x'", "raw examples", "SplitModel"]),
        (no_way_across, ["no tensor would cross"]),
        (read_out, ["item", "only the client knows", "SplitModel"]),
    ],
)
def test_what_cannot_be_divided(go, words):
    message = refusal(Net(go), "middle")
    assert message.startswith("cut 'middle': ")
    assert all(word in message for word in words), message
    assert "middle" not in cut_candidates(Net(go))


def test_tied_weights_across_the_cut_name_both():
    model = Net()
    model.last.weight = model.stem.weight
    message = refusal(model, "middle")
    assert "'stem.weight'" in message
    assert "'last.weight'" in message


def test_a_block_called_twice_cannot_be_cut_inside():
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    model.append(model[1])
    assert "'1.0.weight' would be needed on the client and on the server" in refusal(model, "1.1")
    split_module(model, "1")


def branching(net, x):
    x = net.stem(x)
    return net.middle(x) if x.sum() > 0 else net.last(x)


def looping(net, x):
    return net.middle(torch.stack([net.stem(row) for row in x]))


@pytest.mark.parametrize("go", [branching, looping])
def test_what_cannot_be_traced(go):
    with pytest.raises(CutError) as caught:
        split_module(Net(go), "middle")
    cause = caught.value.__cause__
    assert isinstance(cause, torch.fx.proxy.TraceError)
    message = str(caught.value)
    assert all(word in message for word in ("cut 'middle'", "cannot trace Net", "SplitModel(client=", "TraceError"))
    assert cut_candidates(Net(go)) == []


def test_inside_a_module_that_cannot_be_traced():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.Sequential(nn.Linear(4, 8), nn.TransformerEncoder(layer, 2), nn.Linear(8, 2))
    message = refusal(model, "1.layers.1")
    assert "cannot trace Sequential or TransformerEncoder" in message
    assert "can be cut at '1', '2'" in message
    split_module(model, "1")


def noise(net, x):
    return net.middle(net.stem(x) + torch.randn(4))


def stochastic_depth(net, x):
    x = net.stem(x)
    return net.middle(x if random.random() < 0.5 else net.last(x))


def shake(net, x):
    return net.middle(net.stem(x) * np.random.rand())  # noqa: NPY002


@pytest.mark.parametrize("go", [noise, stochastic_depth, shake])
def test_random_numbers_that_tracing_would_freeze(go):
    message = refusal(Net(go), "middle")
    assert "random numbers" in message
    assert "torch.rand_like" in message


def inference(net, x):
    with torch.inference_mode():
        x = net.stem(x)
    return net.middle(x)


def autocast(net, x):
    with torch.autocast("cpu"):
        x = net.stem(x)
    return net.middle(x)


def no_autocast(net, x):
    with torch.autocast("cpu", enabled=False):  # the model may be run under another
        x = net.stem(x)
    return net.head(net.a(x))


@pytest.mark.parametrize("go", [inference, autocast, no_autocast])
def test_contexts_that_tracing_would_drop(go):
    message = refusal(Net(go), "middle")
    assert "'stem'" in message
    assert "inference_mode or autocast" in message
    assert "torch.no_grad() in place of the first" in message


def count(net, x):
    net.calls += 1
    return net.middle(net.stem(x))


def remember(net, x):
    net.seen = net.calls = net.stem(x)
    return net.middle(net.seen)


@pytest.mark.parametrize("go", [count, remember])
def test_state_that_tracing_would_lose(go):
    model = Net(go)
    message = refusal(model, "middle")
    assert "changes 'calls'" in message
    assert "register it as a buffer" in message
    assert model.calls == 0


def test_a_refused_model_is_left_as_it_was():
    model = Net(branching).train()
    model.stem.eval()
    refusal(model, "middle")
    assert model.training
    assert not model.stem.training


def time_first(net, x):
    return net.last(net.middle(net.stem(x).transpose(0, 1)).transpose(0, 1))


def one_number(net, x):
    y = net.stem(x)
    mean = y.mean()
    return net.middle(y) - mean


def of_one_number(net, x):
    mean = net.stem(x).mean()
    return net.middle(net.stem(x)) * mean.dim()


def pieces(net, x):
    parts = net.stem(x).chunk(2, 1)
    return net.middle(torch.cat(parts, 1)), parts


@pytest.mark.parametrize(
    ("go", "words"),
    [
        (time_first, ["'transpose'", "(3, 2, 4)", "a batch of 2", "batch as its first dimension"]),
        (one_number, ["'mean'", "()", "batch as its first dimension"]),
        (
            of_one_number,
            ["'mean'", "is a single number", "its number of dimensions, or its dtype, would have to cross"],
        ),
        pytest.param(
            pieces,
            ["'chunk'", "is a tuple", "only tensors can cross"],
            marks=pytest.mark.skipif(
                Version(torch.__version__) < Version("2.9"), reason="torch.fx does not trace torch.cat(x.chunk(2))"
            ),
        ),
    ],
)
def test_what_shows_only_when_it_runs(go, words):
    x = torch.randn(2, 3, 4) if go is time_first else torch.randn(2, 4)
    client, _ = split_module(Net(go), "middle")
    with pytest.raises(CutError) as caught:
        client(x)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def line_of(function, text):
    lines, first = inspect.getsourcelines(function)
    (at,) = (i for i, line in enumerate(lines) if text in line)
    return f"{Path(__file__).name}:{first + at} in {function.__name__}"


class Shifted(nn.Module):
    """What a library of layers may hold: its line is the user's as well."""

    def forward(self, x):
        return x + torch.randn(4)


def by_way_of_a_module(net, x):
    net.shifted = Shifted()
    return net.middle(net.shifted.forward(net.stem(x)))


@pytest.mark.parametrize(
    ("go", "text"),
    [
        (branching, "if x.sum() > 0"),
        (looping, "for row in x"),
        (noise, "torch.randn(4)"),
        (inference, "x = net.stem(x)"),
        (autocast, "x = net.stem(x)"),
        (around, "x"),
        (read_out, "y.sum().item()"),
    ],
)
def test_the_line_is_named(go, text):
    lines, _ = inspect.getsourcelines(go)
    text = lines[-1].strip() if go is around else text
    assert line_of(go, text) in refusal(Net(go), "middle")


def test_the_line_is_that_within_which_it_happens():
    assert line_of(Shifted.forward, "torch.randn(4)") in refusal(Net(by_way_of_a_module), "middle")


@pytest.mark.parametrize(
    ("go", "text"), [(time_first, "net.last(net.middle(net.stem(x).transpose"), (one_number, "mean = y.mean()")]
)
def test_the_line_of_what_shows_only_when_it_runs_is_named(go, text):
    client, _ = split_module(Net(go), "middle")
    with pytest.raises(CutError, match=re.escape(line_of(go, text))):
        client(torch.randn(2, 3, 4) if go is time_first else torch.randn(2, 4))


def test_no_line_is_named_where_none_is_the_users():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    message = refusal(nn.Sequential(nn.Linear(4, 8), nn.TransformerEncoder(layer, 2)), "1.layers.1")
    assert ".py:" not in message


@pytest.mark.parametrize("hook", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_backward_hooks_that_recording_would_lose(hook):
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear(4, 2))
    getattr(model[1], hook)(lambda *_: None)
    assert "'1' has a backward hook, which would be lost" in refusal(model, "1.1")
    split_module(model, "1")  # which stays whole, and keeps it
    getattr(model, hook)(lambda *_: None)
    assert "'Sequential' has a backward hook" in refusal(model, "1")


class Gate(nn.Linear):
    """Leaves an auxiliary loss on itself, as mixtures of experts do."""

    def __init__(self):
        super().__init__(4, 4)
        self.loss = 0.0

    def forward(self, x):
        return self._kept(super().forward(x))

    def _kept(self, h):
        self.loss = h.square().mean()
        return h


def test_what_a_forward_leaves_on_a_module():
    def make(go):
        model = Net(go)
        model.middle = nn.Sequential(Gate())
        return model

    def unread(net, x):
        return net.last(net.middle(net.stem(x)))

    def read(net, x):
        return unread(net, x), net.middle[0].loss

    words = "'middle.0.loss' is read, which the forward of 'middle.0' (Gate) sets"
    assert words in refusal(make(read), "middle")
    server = split_module(make(unread), "middle")[1]
    assert type(server.middle[0]) is Gate
    server(torch.randn(2, 4))
    assert isinstance(server.middle[0].loss, torch.Tensor)


@pytest.mark.torch("2.10")
def test_a_buffer_that_forward_replaces():
    def plus_one(net, x):
        net.level = net.level + 1
        return net.last(net.middle(net.stem(x)))

    def in_place(net, x):
        h = net.last(net.middle(net.stem(x)))
        net.level += 0.5
        net.level.add_(0.5)
        return h

    model = Net(plus_one)
    assert "puts another tensor in the place of its buffer 'level'" in refusal(model, "middle")
    assert torch.equal(model.level, torch.ones(4))
    server = split_module(Net(in_place), "middle")[1]
    server(torch.randn(2, 4))
    assert torch.equal(server.level, torch.full((4,), 2.0))
