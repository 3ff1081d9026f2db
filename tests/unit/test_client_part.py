"""A part of the model at work on a client: gradients against plain autograd, and the parts it must refuse."""

import contextlib

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from psl_flower import tree
from psl_flower.client.part import ClientPart, parameter_gradients
from psl_flower.devices import seeded
from psl_flower.errors import ConfigError, ProtocolError
from psl_flower.exchange.tensors import Packer, Unpacker
from psl_flower.protocol import Weights

CPU = torch.device("cpu")


def over_the_wire(tensors):
    """Return tensors as they arrive from the server: views of bytes that must not be written to."""
    packer = Packer()
    spec = packer.pack(tensors)
    return Unpacker([(memoryview(b"".join(pieces)),) for pieces in packer.buffers]).unpack(spec)


def weights_of(module, version="v1"):
    parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}
    constants = {n: p for n, p in module.named_parameters() if not p.requires_grad} | dict(module.named_buffers())
    return Weights(over_the_wire(parameters), over_the_wire(constants), version, f"constants of {version}")


def blank(module_class, *arguments):
    """Return a module whose own weights would give another result."""
    module = module_class(*arguments)
    for p in module.parameters():
        nn.init.constant_(p, 17.0)
    return module


class Worked:
    """A pass of a part on a batch."""

    def __init__(self, module, weights, *inputs, training=True):
        self.part = module if isinstance(module, ClientPart) else ClientPart("head", module, CPU)
        self.part.load(weights)
        with self.part.running(training=training) as module:
            self.outputs = tree.as_tree(module(*inputs), "outputs")

    def gradients(self, gradients):
        return parameter_gradients(self.part.parameters, self.outputs, gradients)


def reference(module, outputs_of, cut_gradients, *inputs):
    """Return what plain autograd says: None for parameters that are not used."""
    module.zero_grad(set_to_none=True)
    outputs = outputs_of(module(*inputs))
    pairs = [(o, g) for o, g in zip(outputs, cut_gradients, strict=True) if g is not None]
    torch.autograd.backward([o for o, _ in pairs], [g for _, g in pairs])
    return {name: p.grad for name, p in module.named_parameters()}


def assert_gradients(found, expected):
    assert list(found) == list(expected)
    for name, gradient in found.items():
        assert (gradient is None) == (expected[name] is None), name
        if gradient is not None:
            torch.testing.assert_close(gradient, expected[name], rtol=0, atol=0)


class Simple(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.scale = nn.Linear(3, 4), nn.Parameter(torch.ones(4))
        self.register_buffer("shift", torch.arange(4.0))

    def forward(self, x):
        return torch.tanh(self.linear(x)) * self.scale + self.shift


def test_forward_and_backward_are_those_of_the_weights_given():
    module, x, g = Simple(), torch.randn(5, 3), torch.randn(5, 4)
    found = Worked(blank(Simple), weights_of(module), x)
    torch.testing.assert_close(found.outputs, module(x), rtol=0, atol=0)
    assert_gradients(found.gradients(g), reference(module, lambda o: [o], [g], x))


def test_gradients_are_returned_and_not_kept():
    found = Worked(Simple(), weights_of(Simple()), torch.randn(5, 3))
    found.gradients(torch.randn(5, 4))
    assert all(p.grad is None for p in found.part.module.parameters())


def test_the_weights_given_stay_as_they_are():
    weights = weights_of(Simple())
    before = {n: t.clone() for n, t in weights.parameters.items()}
    Worked(blank(Simple), weights, torch.randn(5, 3)).gradients(torch.randn(5, 4))
    assert all(torch.equal(t, before[n]) for n, t in weights.parameters.items())
    assert all(not t.requires_grad and t.grad is None for t in weights.parameters.values())


def test_new_weights_take_the_place_of_the_old_ones():
    part, x = ClientPart("head", Simple(), CPU), torch.randn(5, 3)
    for version in ("v1", "v2", "v1"):  # back again, too
        module = Simple()
        nn.init.constant_(module.scale, float(version[1]))
        module.shift += float(version[1])
        torch.testing.assert_close(Worked(part, weights_of(module, version), x).outputs, module(x), rtol=0, atol=0)


def test_constants_of_the_same_version_are_not_written_again():
    part, one, other = ClientPart("head", Simple(), CPU), weights_of(Simple(), "v1"), weights_of(Simple(), "v2")
    part.load(one)
    before = part.module.shift._version
    part.load(Weights(other.parameters, one.constants, "v2", one.constants_version))
    assert part.module.shift._version == before
    torch.testing.assert_close(part.module.scale.detach(), other.parameters["scale"])


def test_evaluation_keeps_no_graph():
    module = Simple()
    found = Worked(blank(Simple), weights_of(module), torch.randn(5, 3), training=False)
    assert not found.outputs.requires_grad


def test_the_servers_dtype_decides():
    module, x = Simple().bfloat16(), torch.randn(5, 3).bfloat16()
    found = Worked(Simple(), weights_of(module), x)
    assert found.outputs.dtype == torch.bfloat16
    torch.testing.assert_close(found.outputs, module(x), rtol=0, atol=0)


class Checkpointed(nn.Module):
    """Forgets what it computed, and computes it again in the backward pass."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 8), nn.Linear(8, 4)

    def forward(self, x):
        return checkpoint(lambda x: self.b(torch.tanh(self.a(x))), x, use_reentrant=False)


def test_activation_checkpointing_finds_the_weights_of_the_step():
    module, x, g = Checkpointed(), torch.randn(5, 3), torch.randn(5, 4)
    found = Worked(blank(Checkpointed), weights_of(module), x)
    assert_gradients(found.gradients(g), reference(module, lambda o: [o], [g], x))


class Dropping(nn.Module):
    """Dropout as a module and as a function."""

    def __init__(self):
        super().__init__()
        self.linear, self.dropout = nn.Linear(3, 50), nn.Dropout(0.5)

    def forward(self, x):
        return F.dropout(self.dropout(self.linear(x)), 0.3, training=self.training)


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(self.linear(x)) + torch.randn(4)


def test_a_batch_that_cannot_tell_leaves_the_weights_as_they_are():
    """Loading them again would spoil the graph of the pass that went before."""
    part, weights, x = ClientPart("head", blank(Noisy), torch.device("cpu")), weights_of(Noisy()), torch.randn(2, 4)
    part.load(weights)
    with part.running(training=True) as module:
        outputs = module(x)
    part.check_rows(part.module, x)  # two rows, and random numbers
    part.load(weights)
    gradients = parameter_gradients(part.parameters, outputs, torch.ones_like(outputs))
    assert torch.allclose(gradients["linear.bias"], 2 + 2 * weights.parameters["linear.weight"].sum(0))


def test_a_pass_done_again_gives_the_same_gradients():
    module, x, g = Dropping(), torch.randn(5, 3), torch.randn(5, 50)
    passes = []
    for _ in range(2):  # two processes
        with seeded(123, CPU):
            passes.append(Worked(blank(Dropping), weights_of(module), x))
    assert torch.equal(passes[0].outputs, passes[1].outputs)
    assert (passes[0].outputs == 0).float().mean() > 0.4  # it did drop
    first, second = (made.gradients(g) for made in passes)
    assert all(torch.equal(first[n], second[n]) for n in first)
    with seeded(124, CPU):
        assert not torch.equal(Worked(module, weights_of(module), x).outputs, passes[0].outputs)


def test_modes_switch_with_each_call():
    module, x = Dropping(), torch.randn(5, 3)
    part, weights = ClientPart("head", module, CPU), weights_of(module)
    evaluated = Worked(part, weights, x, training=False).outputs
    torch.testing.assert_close(evaluated, module.linear(x))
    assert (Worked(part, weights, x, training=True).outputs == 0).any()


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
    module, x = ManyOutputs(), torch.randn(5, 3)
    gradients = (torch.randn(5, 4), None, None, torch.randn(5, 2))
    found = Worked(blank(ManyOutputs), weights_of(module), x)
    assert [t.dtype for t in found.outputs] == [torch.float32, torch.int64, torch.float32, torch.float32]
    expected = reference(module, list, gradients, x)
    assert expected["spare.weight"] is None
    assert_gradients(found.gradients(gradients), expected)


class Named(ManyOutputs):
    def forward(self, x):
        first, _, _, last = super().forward(x)
        return {"last": last, "first": first}


def test_what_crosses_may_have_names():
    module, x = Named(), torch.randn(5, 3)
    gradients = {"first": torch.randn(5, 4), "last": torch.randn(5, 2)}
    found = Worked(blank(Named), weights_of(module), x).gradients(gradients)
    assert_gradients(found, reference(module, lambda o: [o["first"], o["last"]], gradients.values(), x))


def test_a_gradient_of_what_is_not_differentiable_is_ignored():
    found = Worked(ManyOutputs(), weights_of(ManyOutputs()), torch.randn(5, 3))
    gradients = found.gradients((torch.randn(5, 4), None, torch.randn(5, 3), None))
    assert {name for name, g in gradients.items() if g is not None} == {"a.weight", "a.bias"}


@pytest.mark.parametrize("given", [None, (), (None,) * 4])
def test_without_gradients_all_parameters_took_no_part(given):
    found = Worked(ManyOutputs(), weights_of(ManyOutputs()), torch.randn(5, 3))
    assert found.gradients(given) == dict.fromkeys(n for n, _ in ManyOutputs().named_parameters())


@pytest.mark.parametrize(
    ("gradients", "message"),
    [
        (
            (torch.ones(5, 4), None, None, None, torch.ones(5, 4)),
            r"gradients of what did not cross the cut: output\[4\]",
        ),
        (
            (torch.ones(4, 4),),
            r"gradient of output\[0\] must be torch.float32 \(5, 4\), got torch.float32 \(4, 4\)",
        ),
        ((torch.ones(5, 4).double(),), r"gradient of output\[0\] must be torch.float32"),
        (torch.ones(5, 4), "gradients of what did not cross the cut: output"),
        ({"x": torch.ones(5, 4)}, r"gradients of what did not cross the cut: output\['x'\]"),
    ],
)
def test_gradients_that_do_not_fit_are_refused(gradients, message):
    found = Worked(ManyOutputs(), weights_of(ManyOutputs()), torch.randn(5, 3))
    with pytest.raises(ConfigError, match=message):
        found.gradients(gradients)


# --- parameters ------------------------------------------------------------------------------------------------------
def test_frozen_parameters_count_but_get_no_gradient():
    module, x, g = Simple(), torch.randn(5, 3), torch.randn(5, 4)
    module.linear.weight.requires_grad_(False)
    found = Worked(blank(Simple), weights_of(module), x)  # what is frozen is the server's to say
    torch.testing.assert_close(found.outputs, module(x), rtol=0, atol=0)
    gradients = found.gradients(g)
    assert set(gradients) == {"linear.bias", "scale"}
    assert all(g is not None for g in gradients.values())


class Tied(nn.Module):
    """Two layers share one weight."""

    def __init__(self):
        super().__init__()
        self.encode, self.decode = nn.Linear(4, 4), nn.Linear(4, 4)
        self.decode.weight = self.encode.weight

    def forward(self, x):
        return self.decode(torch.relu(self.encode(x)))


def test_tied_weights_get_the_sum_of_their_gradients():
    module, x, g = Tied(), torch.randn(5, 4), torch.randn(5, 4)
    assert set(weights_of(module).parameters) == {"encode.weight", "encode.bias", "decode.bias"}
    found = Worked(blank(Tied), weights_of(module), x)
    torch.testing.assert_close(found.outputs, module(x), rtol=0, atol=0)
    assert_gradients(found.gradients(g), reference(module, lambda o: [o], [g], x))


class Sparse(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(6, 3, sparse=True)

    def forward(self, x):
        return self.embedding(x)


def test_sparse_gradients_travel():
    module, x, g = Sparse(), torch.tensor([1, 1, 4]), torch.randn(3, 3)
    gradients = Worked(module, weights_of(module), x).gradients(g)
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
def test_a_part_that_changes_its_buffers_is_refused(how):
    part, weights = ClientPart("head", CountsCalls(how), CPU), weights_of(CountsCalls(how))
    with pytest.raises(ConfigError, match=r"changes its buffer 'calls', but clients keep no state"):
        Worked(part, weights, torch.randn(5, 3))
    Worked(part, weights, torch.randn(5, 3), training=False)
    assert part.module.calls == 0  # what it changed is put back


def count_call(module, inputs):
    module.calls += 1


@pytest.mark.parametrize("training", [True, False])
def test_the_bytes_a_buffer_came_in_stay_as_they_are(training):
    module = CountsCalls("in place")
    module.register_forward_pre_hook(count_call)
    weights, part = weights_of(module), ClientPart("head", module, CPU)
    with contextlib.suppress(ConfigError):
        Worked(part, weights, torch.randn(5, 3), training=training)
    assert weights.constants["calls"] == 0
    assert module.calls > 0
    part.load(weights)
    assert module.calls == 0


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(3), nn.BatchNorm1d(3, affine=False)])
def test_batch_statistics_are_refused_at_work_too(layer):
    module = nn.Sequential(layer, nn.Linear(3, 2))
    with pytest.raises(ConfigError, match=r"changes its buffer '0\.\w+'.*replace_batch_norm"):
        Worked(module, weights_of(module), torch.randn(5, 3))


@pytest.mark.parametrize("frozen", [True, False])
def test_a_part_that_changes_its_parameters_is_refused(frozen):
    module = nn.Sequential(nn.Embedding(6, 3, max_norm=0.1))
    module[0].weight.requires_grad_(not frozen)
    with pytest.raises(ConfigError, match=r"changes its parameter '0\.weight', but clients keep no state"):
        Worked(module, weights_of(module), torch.tensor([1, 2]))


class Renormed(nn.Linear):
    """Puts other weights in the place of its own where they have grown, past autograd; or the same ones in another."""

    def __init__(self):
        super().__init__(3, 4)
        self.most = 1e9

    def forward(self, x):
        self.weight.data = torch.renorm(self.weight.data, 2, 0, self.most)
        return super().forward(x)


def test_weights_put_in_the_place_of_others_are_seen_in_each_pass():
    module = Renormed()
    worked = Worked(module, weights_of(module), torch.randn(5, 3))
    for part in (worked.part.copy(), worked.part):
        part.module.most = 1e-3
        with pytest.raises(ConfigError, match="changes its parameter 'weight'"), part.running(training=True) as half:
            half(torch.randn(5, 3))


def test_a_failing_forward_pass_tells_its_own_error():
    part, weights = ClientPart("head", CountsCalls("in place"), CPU), weights_of(CountsCalls("in place"))
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        Worked(part, weights, torch.randn(5, 7))
    assert part.module.calls == 1
    part.load(weights)  # of the same version, and yet
    assert part.module.calls == 0


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
    with pytest.raises(ProtocolError, match=f"must cut the same model in the same place: .*{message}"):
        Worked(Simple(), weights, torch.randn(5, 3))


def test_other_shapes_are_refused():
    class Wide(Simple):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 5)

    with pytest.raises(ProtocolError, match=r"'linear.weight': the client's is \(5, 3\), the server's \(4, 3\)"):
        Worked(Wide(), weights_of(Simple()), torch.randn(5, 3))
