"""Tensors that modules keep as plain attributes: the server's for all, unless they are what a forward pass leaves."""

import functools

import pytest
import torch
from torch import nn

from psl_flower.client.part import ClientPart
from psl_flower.errors import CutError
from psl_flower.protocol import Weights
from psl_flower.split import cut_model
from psl_flower.split.stored import stored_names

SEEN = "seen"  # a name that no code of a module tells


class Keeping(nn.Module):
    """Has a fixed factor, and something that only some of the classes derived from it set."""

    def __init__(self):
        super().__init__()
        self.layer, self.factor, self.seen = nn.Linear(3, 3), torch.randn(3), torch.zeros(3)

    def forward(self, x):
        return self.layer(x * self.factor)


def logged(forward):
    @functools.wraps(forward)
    def run(self, *inputs):
        return forward(self, *inputs)

    return run


class Decorated(Keeping):
    @logged
    def forward(self, x):
        self.seen = x.detach()
        return super().forward(x)


class InAFunction(Keeping):
    def forward(self, x):
        def keep(h):
            self.seen = h.detach()
            return h

        return super().forward(keep(x))


class ByString(Keeping):
    def forward(self, x):
        setattr(self, "seen", x.detach())  # noqa: B010
        return super().forward(x)


class LookedUp(Keeping):
    def forward(self, x):
        return super().forward(x + self.__dict__["seen"])


class Hooked(Keeping):
    def __init__(self):
        super().__init__()
        self.layer.register_forward_hook(self.keep)

    def keep(self, module, inputs, output):
        self.seen = output.detach()


def hooked():
    def keep(module, inputs, output):
        module.seen = output.detach()

    model = Keeping()
    model.register_forward_hook(keep)
    return model


class Unknown(Keeping):
    def forward(self, x):
        setattr(self, SEEN, x.detach())
        return super().forward(x)


def half_of(module):
    return cut_model(nn.Sequential(module, nn.Linear(3, 2)), "1").client


@pytest.mark.parametrize("make", [Decorated, InAFunction, ByString, LookedUp, Hooked, hooked])
def test_what_a_forward_pass_sets_is_left_to_it(make):
    half = half_of(make())
    assert dict(half.named_buffers()).keys() == {"0.factor"}
    assert half(torch.randn(5, 3))[0].shape == (5, 3)


def test_what_is_left_and_what_gets_memory_of_its_own():
    module = Keeping()
    module.factor, module.seen = torch.ones(1).expand(3), torch.eye(3).to_sparse()
    half = half_of(module)
    assert dict(half.named_buffers()).keys() == {"0.factor"}
    half.get_buffer("0.factor").copy_(torch.arange(3.0))
    assert half.get_buffer("0.factor").tolist() == [0, 1, 2]


def weights_of(half, version="v1"):
    constants = {name: t.clone() for name, t in half.named_buffers()}
    return Weights(dict(half.named_parameters()), constants, version, version)


def work(part, weights, x):
    part.load(weights)
    with part.running(training=True) as half:
        return half(x)[0]


def test_a_tensor_that_turns_out_to_be_set_is_left_to_forward():
    server = half_of(Unknown())
    weights, part = weights_of(server), ClientPart("head", half_of(Unknown()), torch.device("cpu"))
    assert weights.constants.keys() == {"0.factor", "0.seen"}
    for version in ("v1", "v2"):  # a buffer of another shape now
        x = torch.randn(5, 3)
        torch.testing.assert_close(
            work(part, weights_of(server, version), x),
            server.get_submodule("0.layer")(x * weights.constants["0.factor"]),
        )
    assert torch.equal(part.module.get_buffer("0.seen"), x)
    work(part.copy(), weights_of(server, "v3"), x)


@pytest.mark.parametrize("on_server", [True, False])
def test_a_tensor_that_one_side_has_only(on_server):
    class Cached(Keeping):
        def __init__(self, there):
            super().__init__()
            self.seen = torch.zeros(3) if there else None

    server, client = half_of(Cached(on_server)), half_of(Cached(not on_server))
    part, x = ClientPart("head", client, torch.device("cpu")), torch.randn(5, 3)
    torch.testing.assert_close(work(part, weights_of(server), x), server(x)[0])


def test_methods_of_torch_itself_are_not_followed():
    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x):
            self.norm.eval()
            self.seen = self.norm(x)
            return self.seen

    assert stored_names(Frozen) == {"seen"}


def test_classes_that_are_registered_get_no_others():
    known = []

    class Registered(Decorated):
        def __init_subclass__(cls):
            known.append(cls)

    class Plain(Registered):
        pass

    class Reads(nn.Module):
        def __init__(self, first):
            super().__init__()
            self.first, self.last = first, nn.Linear(3, 2)

        def forward(self, x):
            return self.last(self.first(x) + self.first.seen)

    with pytest.raises(CutError, match=r"'first\.seen' is read, which the forward of 'first' \(Plain\) sets"):
        cut_model(Reads(Plain()), "last")
    assert known == [Plain]
