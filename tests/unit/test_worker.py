"""The client half at work: gradients against plain autograd, and the halves it must refuse."""

import contextlib

import pytest
import torch
from psl_flower.client.worker import Graph, Worker
from torch import nn
from torch.nn import functional as F

from psl_flower.devices import seeded
from psl_flower.errors import ConfigError
from psl_flower.exchange.codec import decode_tensors, encode_tensors
from psl_flower.protocol import Weights

CPU = torch.device("cpu")


def over_the_wire(tensors):
    return decode_tensors(encode_tensors(tensors))


def weights_of(half, version="v1"):
    """Return a half's state as it arrives from the server: views of immutable bytes."""
    parameters = {n: p for n, p in half.named_parameters() if p.requires_grad}
    constants = {n: p for n, p in half.named_parameters() if not p.requires_grad} | dict(half.named_buffers())
    return Weights(over_the_wire(parameters), over_the_wire(constants), version)


def blank(half_class, *arguments):
    """Return a half whose own weights would give another result."""
    half = half_class(*arguments)
    for p in half.parameters():
        nn.init.constant_(p, 17.0)
    return half


def run(half, weights, *inputs, training=True, worker=None):
    worker = worker or Worker(half, CPU)
    with worker.bound(weights, training=training) as (call, parameters):
        return call(*inputs), parameters


def graph(half, weights, *inputs):
    activations, parameters = run(half, weights, *inputs)
    return Graph(activations, torch.zeros(len(inputs[0])), parameters)


def reference(half, outputs_of, cut_gradients, *inputs):
    """Return what plain autograd says: None for parameters that are not used."""
    half.zero_grad(set_to_none=True)
    outputs = outputs_of(half(*inputs))
    pairs = [(o, g) for o, g in zip(outputs, cut_gradients, strict=True) if g is not None]
    torch.autograd.backward([o for o, _ in pairs], [g for _, g in pairs])
    return {name: p.grad for name, p in half.named_parameters()}


def assert_gradients(found, expected):
    gradients, unused = found
    assert set(gradients) | set(unused) == set(expected)
    assert set(unused) == {name for name, g in expected.items() if g is None}
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=0)


class Simple(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.scale = nn.Linear(3, 4), nn.Parameter(torch.ones(4))
        self.register_buffer("shift", torch.arange(4.0))

    def forward(self, x):
        return torch.tanh(self.linear(x)) * self.scale + self.shift


def test_forward_and_backward_are_those_of_the_weights_given():
    half, x, g = Simple(), torch.randn(5, 3), torch.randn(5, 4)
    found = graph(blank(Simple), weights_of(half), x)
    torch.testing.assert_close(found.activations[0], half(x), rtol=0, atol=0)
    assert_gradients(found.backward([g]), reference(half, lambda o: [o], [g], x))


def test_nothing_of_the_half_itself_is_touched():
    mine = blank(Simple)
    before = {n: t.clone() for n, t in mine.state_dict().items()}
    graph(mine, weights_of(Simple()), torch.randn(5, 3)).backward([torch.randn(5, 4)])
    assert all(torch.equal(t, before[n]) for n, t in mine.state_dict().items())
    assert all(p.grad is None for p in mine.parameters())


def test_the_weights_given_stay_as_they_are():
    weights = weights_of(Simple())
    before = {n: t.clone() for n, t in weights.parameters.items()}
    graph(blank(Simple), weights, torch.randn(5, 3)).backward([torch.randn(5, 4)])
    assert all(torch.equal(t, before[n]) for n, t in weights.parameters.items())
    assert all(not t.requires_grad and t.grad is None for t in weights.parameters.values())


def test_evaluation_keeps_no_graph():
    half = Simple()
    (output,), _ = run(blank(Simple), weights_of(half), torch.randn(5, 3), training=False)
    assert not output.requires_grad


class Dropping(nn.Module):
    """Dropout as a module and as a function."""

    def __init__(self):
        super().__init__()
        self.linear, self.dropout = nn.Linear(3, 50), nn.Dropout(0.5)

    def forward(self, x):
        return F.dropout(self.dropout(self.linear(x)), 0.3, training=self.training)


def test_a_recomputed_graph_gives_the_same_gradients():
    half, x, g = Dropping(), torch.randn(5, 3), torch.randn(5, 50)
    graphs = []
    for _ in range(2):  # two processes
        with seeded(123, CPU):
            graphs.append(graph(blank(Dropping), weights_of(half), x))
    assert torch.equal(graphs[0].activations[0], graphs[1].activations[0])
    assert (graphs[0].activations[0] == 0).float().mean() > 0.4  # it did drop
    (first, _), (second, _) = (made.backward([g]) for made in graphs)
    assert all(torch.equal(first[n], second[n]) for n in first)
    with seeded(124, CPU):
        assert not torch.equal(graph(half, weights_of(half), x).activations[0], graphs[0].activations[0])


def test_modes_switch_with_each_call():
    half = Dropping()
    worker = Worker(half, CPU)
    x, weights = torch.randn(5, 3), weights_of(half)
    (evaluated,), _ = run(half, weights, x, training=False, worker=worker)
    torch.testing.assert_close(evaluated, half.linear(x))
    (trained,), _ = run(half, weights, x, training=True, worker=worker)
    assert (trained == 0).any()


# --- what crosses the cut --------------------------------------------------------------------------------------------
class ManyOutputs(nn.Module):
    """Crosses: a tensor, integers, an input as it is, a second tensor."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.spare = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(2, 2)

    def forward(self, x):
        h = self.a(x)
        return [h, h.argmax(dim=1), x, self.b(torch.relu(h))]


def test_several_tensors_cross_with_integers_among_them():
    half, x = ManyOutputs(), torch.randn(5, 3)
    gradients = [torch.randn(5, 4), None, None, torch.randn(5, 2)]
    found = graph(blank(ManyOutputs), weights_of(half), x)
    assert isinstance(found.activations, tuple)
    assert [t.dtype for t in found.activations] == [torch.float32, torch.int64, torch.float32, torch.float32]
    expected = reference(half, list, gradients, x)
    assert expected["spare.weight"] is None
    assert_gradients(found.backward(gradients), expected)


def test_a_gradient_of_what_is_not_differentiable_is_ignored():
    found = graph(ManyOutputs(), weights_of(ManyOutputs()), torch.randn(5, 3))
    gradients, _ = found.backward([torch.randn(5, 4), None, torch.randn(5, 3), None])
    assert set(gradients) == {"a.weight", "a.bias"}


@pytest.mark.parametrize("given", [[], [None], [None] * 4])
def test_without_gradients_all_parameters_are_unused(given):
    found = graph(ManyOutputs(), weights_of(ManyOutputs()), torch.randn(5, 3))
    gradients, unused = found.backward(given)
    assert gradients == {}
    assert unused == tuple(n for n, _ in ManyOutputs().named_parameters())


def test_missing_gradients_at_the_end_are_none():
    half, x, g = ManyOutputs(), torch.randn(5, 3), torch.randn(5, 4)
    found = graph(half, weights_of(half), x).backward([g])
    assert_gradients(found, reference(half, list, [g, None, None, None], x))


@pytest.mark.parametrize(
    ("gradients", "message"),
    [
        ([torch.ones(5, 4)] * 5, "4 tensors crossed the cut, got 5 gradients"),
        ([torch.ones(4, 4)], r"gradient 0 must be torch.float32 \(5, 4\), got torch.float32 \(4, 4\)"),
        ([torch.ones(5, 4).double()], "gradient 0 must be torch.float32"),
    ],
)
def test_gradients_that_do_not_fit_are_refused(gradients, message):
    found = graph(ManyOutputs(), weights_of(ManyOutputs()), torch.randn(5, 3))
    with pytest.raises(ConfigError, match=message):
        found.backward(gradients)


def test_graph_bytes_are_those_of_the_activations():
    found = graph(ManyOutputs(), weights_of(ManyOutputs()), torch.randn(5, 3))
    assert found.num_bytes() == 5 * (4 * 4 + 8 + 3 * 4 + 2 * 4)


# --- parameters ------------------------------------------------------------------------------------------------------
def test_frozen_parameters_count_but_get_no_gradient():
    half, x, g = Simple(), torch.randn(5, 3), torch.randn(5, 4)
    half.linear.weight.requires_grad_(False)
    mine = blank(Simple)  # what is frozen is the server's to say
    found = graph(mine, weights_of(half), x)
    torch.testing.assert_close(found.activations[0], half(x), rtol=0, atol=0)
    gradients, unused = found.backward([g])
    assert (set(gradients), unused) == ({"linear.bias", "scale"}, ())


class Tied(nn.Module):
    """Two layers share one weight."""

    def __init__(self):
        super().__init__()
        self.encode, self.decode = nn.Linear(4, 4), nn.Linear(4, 4)
        self.decode.weight = self.encode.weight

    def forward(self, x):
        return self.decode(torch.relu(self.encode(x)))


def test_tied_weights_get_the_sum_of_their_gradients():
    half, x, g = Tied(), torch.randn(5, 4), torch.randn(5, 4)
    assert set(weights_of(half).parameters) == {"encode.weight", "encode.bias", "decode.bias"}
    found = graph(blank(Tied), weights_of(half), x)
    torch.testing.assert_close(found.activations[0], half(x), rtol=0, atol=0)
    assert_gradients(found.backward([g]), reference(half, lambda o: [o], [g], x))


class Sparse(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(6, 3, sparse=True)

    def forward(self, x):
        return self.embedding(x)


def test_sparse_gradients_travel():
    half, x, g = Sparse(), torch.tensor([1, 1, 4]), torch.randn(3, 3)
    gradients, _ = graph(half, weights_of(half), x).backward([g])
    received = over_the_wire(gradients)["embedding.weight"]
    expected = torch.zeros(6, 3).index_add(0, x, g)
    torch.testing.assert_close(received, expected)


# --- refusals --------------------------------------------------------------------------------------------------------
class CountsCalls(nn.Module):
    """Changes a buffer, in the way named, in training."""

    def __init__(self, how):
        super().__init__()
        self.linear, self.how = nn.Linear(3, 4), how
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x):
        if self.training:
            if self.how == "in place":
                self.calls += 1
            else:
                self.calls = self.calls + 1
        return self.linear(x)


@pytest.mark.parametrize("how", ["in place", "assigned"])
def test_a_half_that_changes_its_buffers_is_refused(how):
    half = CountsCalls(how)
    with pytest.raises(ConfigError, match=r"changes its buffer 'calls', but clients keep no state"):
        run(half, weights_of(half), torch.randn(5, 3))
    run(half, weights_of(half), torch.randn(5, 3), training=False)
    assert half.calls == 0


def count_call(module, inputs):
    module.calls += 1


@pytest.mark.parametrize("training", [True, False])
def test_the_bytes_a_buffer_came_in_stay_as_they_are(training):
    half = CountsCalls("in place")
    half.register_forward_pre_hook(count_call)
    weights = weights_of(half)
    with contextlib.suppress(ConfigError):
        run(half, weights, torch.randn(5, 3), training=training)
    assert weights.constants["calls"] == 0


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(3), nn.BatchNorm1d(3, affine=False)])
def test_batch_statistics_are_refused_at_work_too(layer):
    half = nn.Sequential(layer, nn.Linear(3, 2))
    with pytest.raises(ConfigError, match=r"changes its buffer '0\.\w+'.*replace_batch_norm"):
        run(half, weights_of(half), torch.randn(5, 3))


@pytest.mark.parametrize("frozen", [True, False])
def test_a_half_that_changes_its_parameters_is_refused(frozen):
    half = nn.Sequential(nn.Embedding(6, 3, max_norm=0.1))
    half[0].weight.requires_grad_(not frozen)
    with pytest.raises(ConfigError, match=r"changes its parameter '0\.weight', but clients keep no state"):
        run(half, weights_of(half), torch.tensor([1, 2]))


def test_a_failing_forward_pass_tells_its_own_error():
    half = CountsCalls("in place")
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        run(half, weights_of(half), torch.randn(5, 7))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p, c: p.pop("scale"), "1 names of the client half differ, 'scale' is only in the client's"),
        (lambda p, c: c.pop("shift"), "'shift' is only in the client's"),
        (lambda p, c: p.update({"layer9.weight": torch.ones(1)}), "'layer9.weight' is only in the server's"),
    ],
)
def test_another_cut_is_refused(change, message):
    weights = weights_of(Simple())
    change(weights.parameters, weights.constants)
    with pytest.raises(ConfigError, match=f"must cut the same model in the same place: .*{message}"):
        run(Simple(), weights, torch.randn(5, 3))


def test_other_shapes_are_refused():
    class Wide(Simple):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 5)

    with pytest.raises(ConfigError, match=r"'linear.weight': the client's is \(5, 3\), the server's \(4, 3\)"):
        run(Wide(), weights_of(Simple()), torch.randn(5, 3))
