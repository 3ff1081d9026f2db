"""Whether a client half treats examples one by one is told by what it does."""

import random
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from psl_flower.split import CannotTellError, cut_model, find_mixing
from psl_flower.split.compare import same
from psl_flower.torchvision_compat import import_torchvision


class Half(nn.Module):
    """A convolution and a layer, and whatever `go` makes of them."""

    def __init__(self, go=None, norm=None):
        super().__init__()
        self.conv, self.norm, self.layer, self.go = nn.Conv2d(1, 6, 5), norm or nn.Identity(), nn.Linear(6, 6), go
        self.attention = nn.MultiheadAttention(6, 2, dropout=0.5, batch_first=True)
        self.cell = nn.LSTM(6, 6, num_layers=2, dropout=0.5, batch_first=True)
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x):
        return self.go(self, x)


def features(half, x):
    return half.norm(half.conv(x).flatten(1))


def plain(half, x):
    return half.layer(features(half, x))


def dropout(half, x):
    h = F.dropout(plain(half, x), 0.5, half.training)
    return h, torch.dropout(h, 0.5, True), F.alpha_dropout(h, 0.5, training=True)


def attention(half, x):
    rows = features(half, x)[:, None, :].expand(-1, 3, -1)
    q = rows[:, None]
    return half.attention(rows, rows, rows)[0], F.scaled_dot_product_attention(q, q, q, None, 0.5, True)


def recurrent(half, x):
    return half.cell(features(half, x)[:, None, :])[0]


def buffered(half, x):
    return plain(half, x) - half.mean


def masked(half, x):
    h = plain(half, x)
    return h, h > 0, torch.full_like(h, torch.nan)


def in_place(half, x):
    return plain(half, x.mul_(2).add_(1))


def run(go, norm=None, rows=6, x=None, **options):
    torch.manual_seed(0)
    half = Half(go, norm).train()
    x = torch.randn(rows, 1, 5, 5) if x is None else x
    return find_mixing(half, x, module=half, **options)


@pytest.mark.parametrize("go", [plain, dropout, attention, recurrent, buffered, masked, in_place])
def test_what_treats_examples_one_by_one(go):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    x = torch.randn(6, 1, 5, 5, generator=torch.Generator().manual_seed(0))
    before = x.clone()
    half = Half(go).train()
    torch.manual_seed(3)
    assert find_mixing(half, x, module=half) is None
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(x, before)
    assert all(module.training for module in half.modules())


class FrozenNorm(nn.BatchNorm1d):
    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(6).eval(), FrozenNorm(6), nn.LayerNorm(6)])
def test_frozen_norms(norm):
    half = Half(plain, norm)
    half.conv.train()
    assert find_mixing(half, torch.randn(6, 1, 5, 5), module=half) is None


def functional_norm(half, x):
    return half.layer(F.batch_norm(features(half, x), None, None, training=True))


def centred(half, x):
    h = plain(half, x)
    return h, h - h.mean(0)


def running_sum(half, x):
    return plain(half, x).cumsum(0)


def shifted_up(half, x):
    h = plain(half, x)
    return torch.cat([h[1:], h[-1:]])


def positions(half, x):
    return half.norm(half.layer(x[:, 0, :, :1].expand(-1, -1, 6) ** 2).transpose(1, 2))


def in_training_only(half, x):
    h = F.dropout(plain(half, x), 0.5, half.training)
    return h - h.mean(0) if half.training else h


@pytest.mark.parametrize(
    ("go", "norm", "words"),
    [
        (plain, nn.BatchNorm1d(6), "'norm' (BatchNorm1d) fails on an example alone (ValueError: Expected more than 1"),
        (
            positions,
            nn.BatchNorm1d(6),
            "what 'norm' (BatchNorm1d) computes for an example depends on the other 5 in",
        ),
        (functional_norm, None, "(ValueError: Expected more than 1"),
        (
            centred,
            None,
            "output 1 (computed after 'layer' (Linear)) for an example depends on the other 5 in its batch",
        ),
        (running_sum, None, "output 0 (computed after 'layer' (Linear))"),
        (shifted_up, None, "output 0 (computed after 'layer' (Linear))"),
        (in_training_only, None, "output 0 (computed after 'layer' (Linear))"),
        (
            lambda half, x: half.layer(features(half, x) - features(half, x).mean(0)),
            None,
            "what 'layer' (Linear) is given",
        ),
    ],
)
def test_what_mixes_examples(go, norm, words):
    found = run(go, norm)
    assert found.startswith("the client half must treat examples one by one")
    assert words in found
    assert "replace_batch_norm(model, before=cut)" in found


@pytest.mark.parametrize(
    ("go", "words"),
    [
        (lambda half, x: half.conv(x).squeeze(), "output 0 has shape (6,) for one example alone"),
        (lambda half, x: (plain(half, x), plain(half, x).mean(0)), "output 1 has shape (6,) for a batch of 4"),
        (lambda half, x: plain(half, x).mean(), "output 0 has shape () for a batch of 4"),
        (lambda half, x: plain(half, x).view(-1), "output 0 has shape (24,) for a batch of 4"),
        (lambda half, x: torch.cat([half.conv(x).squeeze()] * 2, 1), "it fails on an example alone (IndexError"),
    ],
)
def test_outputs_without_a_row_an_example(go, words):
    found = run(go, rows=4)
    assert words in found
    assert "x.flatten(1) instead of x.squeeze()" in found


def test_a_single_example_shows_its_shape_only():
    assert "output 0 has shape (6,) for one example" in run(lambda half, x: half.conv(x).squeeze(), rows=1)
    with pytest.raises(CannotTellError, match="one example"):
        run(plain, rows=1)
    with pytest.raises(CannotTellError, match="no example"):
        run(plain, rows=0)


def test_what_a_batch_cannot_tell():
    with pytest.raises(CannotTellError, match="alike"):
        run(plain, x=torch.zeros(4, 1, 5, 5))
    with pytest.raises(CannotTellError, match="random numbers are drawn, and the batch is too small"):
        run(noisy, rows=3)


def noisy(half, x):
    h = plain(half, x)
    return h + h.abs() * torch.rand_like(h) + random.random() + torch.from_numpy(np.random.rand(6)).to(h)  # noqa: NPY002


def mixup(half, x):
    h = plain(half, x)
    other = h[torch.randperm(len(h))]
    return h + float(np.random.beta(0.2, 0.2)) * (other - h)  # noqa: NPY002


def sometimes(half, x):
    return mixup(half, x) if half.training and random.random() < 0.5 else F.dropout(plain(half, x), 0.5)


def scaled_noise(half, x):
    h = plain(half, x)
    return h + torch.randn_like(h) * h.std(0)


def test_random_numbers_are_no_mixing():
    before = random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    assert run(noisy) is None
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before  # noqa: NPY002


class Mixer(nn.Module):
    def forward(self, x):
        return 0.7 * x + 0.3 * x[torch.randperm(len(x))] if self.training else x


@pytest.mark.parametrize("go", [mixup, sometimes, scaled_noise])
def test_mixing_by_chance(go):
    for rows in (2, 6, 40):
        found = run(go, rows=rows)
        by_chance = "depends on the others in its batch; what mixes examples at random (mixup, CutMix)"
        assert by_chance in found or "is another alone than in a batch" in found


def test_numbers_drawn_by_what_the_rows_hold():
    half = Half(lambda half, x: half.norm(half.layer(half.conv(x).flatten(1))), nn.RReLU(0.0, 1.0)).train()
    x = torch.randn(16, 1, 5, 5)
    assert find_mixing(half, x, module=half) is None
    half.go = lambda half, x: half.norm(half.layer(half.conv(x).flatten(1))).softmax(0)
    assert "depends on the others in its batch" in find_mixing(half, x)


@pytest.mark.parametrize(
    "noise",
    [
        torch.randn_like,
        lambda h: torch.rand(len(h), 6),
        lambda h: torch.randn(h.shape),
        lambda h: torch.empty_like(h).uniform_(-1, 1),
        lambda h: torch.empty(len(h), 1).bernoulli_(0.5),
        lambda h: torch.randn(6),
    ],
)
def test_noise_that_depends_on_how_many_rows_there_are(noise):
    assert run(lambda half, x: plain(half, x) * noise(plain(half, x))) is None
    found = run(lambda half, x: plain(half, x) * noise(plain(half, x)) * len(x))
    assert "output 0 for an example is another alone than in a batch of" in found


def test_mixing_by_chance_in_a_submodule():
    half = Half(lambda half, x: half.norm(half.layer(half.conv(x).flatten(1))), Mixer()).train()
    found = find_mixing(half, torch.randn(6, 1, 5, 5), module=half, who="the tail")
    assert found.startswith("the tail must treat examples one by one")
    assert "mixup" in found


def test_stochastic_depth_is_switched_off():
    depth = import_torchvision().ops.StochasticDepth(0.5, "row")
    half = Half(lambda half, x: half.norm(half.layer(half.conv(x).flatten(1))), depth).train()
    x = torch.randn(6, 1, 5, 5)
    assert find_mixing(half, x, module=half) is None
    assert depth.training
    assert find_mixing(half, x) is None
    half.go = lambda half, x: centred(half, x)[1]
    assert "output 0" in find_mixing(half, x, module=half)


def test_trees_of_inputs():
    half = Half(plain)

    def forward(batch):
        h = half(batch["x"])
        return {"h": h * batch["pair"][0] * batch["factor"], "more": (h - h[:1],)}

    batch = {"x": torch.randn(3, 1, 5, 5), "pair": [torch.rand(3, 1), "a name"], "factor": torch.tensor(2.0)}
    assert "output 1" in find_mixing(forward, batch)
    assert find_mixing(lambda batch: forward(batch)["h"], batch) is None


def test_a_cut_model_with_squeeze():
    model = nn.Sequential()
    model.add_module("trunk", Half(lambda half, x: half.conv(x).squeeze()))
    model.add_module("head", nn.Linear(6, 2))
    client = cut_model(model, "head").client
    found = find_mixing(client, torch.randn(4, 1, 5, 5), module=client)
    assert all(words in found for words in ("(6,) for a batch of 1", "x.flatten(1) instead of squeeze()"))


def test_a_cut_model_names_the_layer():
    model = nn.Sequential(nn.Flatten(), nn.Linear(25, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
    client = cut_model(model, "3").client.train()
    assert "'2' (BatchNorm1d)" in find_mixing(client, torch.randn(4, 1, 5, 5), module=client)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_rounding_is_no_mixing(dtype):
    torch.manual_seed(0)
    half = nn.Sequential(*[nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(8)]).to(dtype)
    x = torch.randn(33, 64, dtype=dtype)
    assert find_mixing(half, x, module=half) is None
    assert "output 0 for an example depends on the other 32" in find_mixing(lambda x: half(x) - half(x).mean(0), x)


def test_what_is_the_same():
    one = torch.tensor([1.0, torch.inf, -torch.inf, torch.nan])
    assert same(one, one * (1 + 1e-6))
    assert not same(one, torch.tensor([1.0, torch.inf, torch.inf, torch.nan]))
    assert not same(one, torch.tensor([1.01, torch.inf, -torch.inf, torch.nan]))
    assert not same(one, one.double())
    assert not same(one, one[None])
    mask = torch.arange(4000) > 2000
    assert same(mask, torch.arange(4000) > 2001)
    assert not same(mask, torch.arange(4000) > 2010)
    assert not same(torch.tensor([3]), torch.tensor([4]))
    assert same(torch.zeros(0), torch.zeros(0))


def test_looking_imports_no_compiler(monkeypatch):
    """It takes seconds, in every client process, in the first step."""
    monkeypatch.delitem(sys.modules, "torch._dynamo", raising=False)
    assert find_mixing(nn.Linear(2, 2), torch.randn(3, 2)) is None
    assert "torch._dynamo" not in sys.modules


def test_coarser_numbers_within_are_no_mixing():
    class Cast(nn.Module):
        def __init__(self, dtype):
            super().__init__()
            self.dtype = dtype

        def forward(self, x):
            return x.to(self.dtype)

    for coarse, fine in ((torch.float32, torch.float64), (torch.bfloat16, torch.float32)):
        half = nn.Sequential(nn.Linear(64, 64).to(coarse), nn.Tanh(), Cast(fine))
        x = torch.randn(33, 64).to(coarse)
        assert find_mixing(half, x, module=half) is None
        assert "depends on the other 32" in find_mixing(lambda x, half=half: half(x) - half(x).mean(0), x)


def test_a_state_is_told_as_what_it_is():
    class Counting(nn.Linear):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return super().forward(x) * self.calls

    half = Counting(4, 4)
    assert "it keeps a state (a counter, a hidden state)" in find_mixing(half, torch.randn(3, 4), module=half)


class Backward(nn.Module):
    """What it computes is each example's own; its gradient is what `change` makes of it."""

    def __init__(self, change):
        super().__init__()
        self.layer, self.change = nn.Linear(4, 4), change

    def forward(self, x):
        h = self.layer(x)
        if h.requires_grad:
            h.register_hook(self.change)
        return h


@pytest.mark.parametrize(
    ("change", "mixes"),
    [
        (lambda g: g / g.norm(), True),
        (lambda g: g / len(g), True),
        (lambda g: g - g.mean(0), True),
        (lambda g: -g, False),
        (lambda g: g / g.norm(dim=1, keepdim=True), False),
        (lambda g: g.clamp(-0.1, 0.1), False),
    ],
)
def test_gradients_that_depend_on_the_batch(change, mixes):
    half = Backward(change)
    found = find_mixing(half, torch.randn(5, 4), module=half)
    assert (found is not None) is mixes
    assert not mixes or "gradient of 'layer.weight' in a batch is not the sum of those of its examples" in found
    assert all(p.grad is None for p in half.parameters())


def test_an_embedding_that_scales_gradients():
    tokens = torch.randint(0, 9, (5, 7))
    for sparse in (False, True):
        assert find_mixing(half := nn.Embedding(9, 3, sparse=sparse), tokens, module=half) is None
    half = nn.Embedding(9, 3, scale_grad_by_freq=True)
    assert "gradient of 'weight'" in find_mixing(half, tokens, module=half)


class Checkpointed(nn.Module):
    """Runs its layers again in the backward pass, which draws the dropout again."""

    def __init__(self, mixes=False, **options):
        super().__init__()
        self.inner, self.options, self.mixes = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)), options, mixes
        self.layers = Backward(self.change)

    def change(self, gradient):
        return gradient / gradient.norm() if self.mixes else gradient

    def forward(self, x):
        return self.layers(checkpoint(self.inner, x, use_reentrant=False, **self.options))


@pytest.mark.parametrize("options", [{}, {"preserve_rng_state": False}])
def test_checkpointed_dropout(options):
    x = torch.randn(5, 4)
    assert find_mixing(half := Checkpointed(**options), x, module=half) is None
    half = Checkpointed(mixes=True, **options)
    assert "gradient of 'inner.0.weight' in a batch is not the sum" in find_mixing(half, x, module=half)


def test_where_the_backward_pass_cannot_tell():
    def noise(gradient):
        return gradient + torch.randn_like(gradient)

    def fails(gradient):
        raise RuntimeError("no second time")

    for change in (noise, fails):
        half = Backward(change)
        assert find_mixing(half, torch.randn(5, 4), module=half) is None
