"""What the code around a cut may do: each is recorded, and trains and evaluates as in the whole model."""

import pytest
import torch
import torch.nn.functional as F
from test_cut import assert_same_evaluation, assert_same_step
from test_cut_rearranged import Net
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

from psl_flower.errors import CutError
from psl_flower.split import split_module


class Reversed(torch.autograd.Function):
    """Passes values on and turns gradients round, as domain adaptation does."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return -ctx.factor * gradient, None


reverse = Reversed.apply


def functions_of_ones_own(net, x, y):
    h = net.body(Reversed.apply(net.body(x), 0.5))
    weight = Reversed.apply(next(net.head.parameters()), 3.0)
    return F.linear(Reversed.apply(net.middle(h), 2.0), weight)


def without_gradients(net, x, y):
    with torch.no_grad():
        h = net.body(x)
        h.clamp_(-1, 1)
        rows = h.shape[0] * 2
        with torch.enable_grad():
            g = net.body(h)
        also = g.contiguous()  # g itself
        g *= 2
        F.leaky_relu(g, 3.0, inplace=True)
    cut_off = 2 * net.middle(also)
    with torch.no_grad():
        nearest = net.middle(also).softmax(-1) * ((also > -1) & (also < 1))
        cut_off.detach_()
    return net.head(net.middle(also) + nearest + cut_off) / rows + h.size(1)


def moving_average(net, x, y):
    """The head follows the middle layer, and a buffer the values."""
    g = net.middle(net.body(x))
    with torch.no_grad():
        for slow, fast in zip(net.head.parameters(), net.middle.parameters(), strict=True):
            slow.data = slow.data * 0.9 + fast.data * 0.1
            slow.data.add_(fast.data, alpha=0.1)
        net.level.copy_(0.9 * net.level + g.mean((0, 1)))
        net.level += 1
    return net.head(g.detach()) * net.level + g


def penalties(net, x, y):
    h = net.head(net.middle(net.body(x)))
    weights = torch.nn.utils.parameters_to_vector(net.head.parameters())
    return h + sum(p.norm() for p in net.middle.parameters()) + weights.abs().sum()


def dtypes(net, x, y):
    h = net.body(x)
    short = h.relu().mean(-1, keepdim=True)
    g = net.middle(short.expand(-1, -1, 4))
    mask = torch.zeros(x.size(0), 5, 4, dtype=h.dtype, device=h.device)
    return net.head(g + mask).clamp(min=torch.finfo(x.dtype).tiny)


def new_tensors(net, x, y):
    h = net.body(x)
    filled = h.new_empty(h.shape)
    g = net.middle(h)
    filled[:] = g
    of_input = torch.zeros_like(y) + x.new_ones(x.size(1), 4) + x.new_zeros(y.shape)
    return net.head(filled + of_input + h.new_full((4,), 2.0) + x.new_zeros(4))


def refusals(net, x, y):
    if x.dim() != 3 or x.shape[2] % 2:
        raise ValueError(f"an odd {x.shape}")
    h = net.body(x)
    if h.shape[1] > 9:
        raise ValueError("too long")
    if not torch.isfinite(h).all():
        raise ValueError("overflow")
    assert not (h.abs() > 1e9).any()
    return net.head(net.middle(h))


@pytest.mark.parametrize(
    "go",
    [
        functions_of_ones_own,
        without_gradients,
        pytest.param(moving_average, marks=pytest.mark.torch("2.10")),
        penalties,
        pytest.param(dtypes, marks=pytest.mark.torch("2.10")),
        new_tensors,
        refusals,
    ],
    ids=lambda go: go.__name__,
)
def test_what_is_recorded(go):
    model = Net(go)
    model.register_buffer("level", torch.zeros(4).double())
    model.head.requires_grad_(go is not moving_average)
    parts = split_module(model, "middle")
    x, y = torch.randn(2, 3, 5, 4, dtype=torch.float64).unbind()
    assert_same_step(model, *parts, x, y)
    if go is not moving_average:  # which evaluation changes, too, and the parts have the model's own copies
        assert_same_evaluation(model, *parts, x, y)


def test_an_autograd_function_by_another_name_keeps_its_backward_or_is_refused():
    model = Net(lambda net, x, y: net.head(reverse(net.middle(net.body(x)), 2.0)))
    if isinstance(vars(torch.autograd.Function)["apply"], classmethod):
        assert_same_step(model, *split_module(model, "middle"), *torch.randn(2, 3, 5, 4, dtype=torch.float64).unbind())
    else:  # later releases of torch have it in C
        with pytest.raises(CutError, match=r"Reversed.apply under another name.*: call Reversed.apply itself"):
            split_module(model, "middle")


def test_a_check_that_raises_is_made_by_the_part():
    client, _ = split_module(Net(refusals), "middle")
    with pytest.raises(AssertionError, match=r"the check at .*test_cut_recorded.py:\d+ in refusals failed"):
        client(*torch.zeros(2, 3, 10, 4).double())


def test_a_constant_that_a_buffer_becomes_is_made_anew():
    def go(net, x, y):
        net.level.data = torch.zeros(4, dtype=torch.float64)
        net.level.add_(1)
        return net.head(net.middle(net.body(x)) + net.level)

    model = Net(go)
    model.register_buffer("level", torch.zeros(4).double())
    client, server = split_module(model, "head")
    x, y = torch.randn(2, 3, 5, 4, dtype=torch.float64).unbind()
    assert torch.equal(server(*client(x, y)), server(*client(x, y)))


@pytest.mark.torch("2.10")
def test_a_generator_would_be_made_once():
    def go(net, x, y):
        h = net.body(x)
        noise = torch.randn(h.shape, generator=torch.Generator().manual_seed(0))
        return net.head(net.middle(h + noise))

    with pytest.raises(CutError, match=r"draws with a torch.Generator, .*: draw without one"):
        split_module(Net(go), "middle")


class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.LSTM(4, 4, batch_first=True).double(), nn.Linear(4, 2).double()

    def forward(self, x, lengths):
        _, (h, _) = self.rnn(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))
        seen, _ = pad_packed_sequence(self.rnn(nn.utils.rnn.pack_padded_sequence(x, lengths, True, False))[0], True)
        return self.head(h[-1] + seen.sum(1))


def test_packed_sequences():
    model = Packed()
    parts = split_module(model, "head")
    assert_same_step(model, *parts, torch.randn(3, 5, 4).double(), torch.tensor([2, 5, 1]))
    split_module(model, "head")  # nothing of torch.fx remembers the first


def test_checkpointing_that_is_a_function_of_torch_is_no_step():
    def go(net, x, y):
        return net.head(checkpoint(net.middle, net.body(x), use_reentrant=True))

    with pytest.raises(CutError, match=r"CheckpointFunction of torch .* use_reentrant=False"):
        split_module(Net(go), "middle")


def test_what_is_computed_of_a_copied_weight_is_not_frozen():
    def go(net, x, y):
        return F.linear(net.head(net.middle(net.body(x))), torch.Tensor.relu(net.weights[0]))

    model = Net(go)
    model.weights = [model.head.weight]
    parts = split_module(model, "middle")
    with torch.no_grad():
        model.head.weight.mul_(2)
        parts[1].head.weight.mul_(2)
    x, y = torch.randn(2, 3, 5, 4, dtype=torch.float64).unbind()
    assert_same_step(model, *parts, x, y)
