"""Models whose code does not come in the order of a cut, or asks on one side for sizes of the other."""

from types import BuiltinFunctionType
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from test_cut import assert_names, assert_same_evaluation, assert_same_step
from torch import fx, nn

from psl_flower.errors import CutError
from psl_flower.split import split_module


class Net(nn.Module):
    """Three layers and whatever `go` makes of them."""

    def __init__(self, go):
        super().__init__()
        self.body, self.middle, self.head = (nn.Linear(4, 4).double() for _ in range(3))
        self.go = go

    def forward(self, x, y):
        return self.go(self, x, y)


def inputs(rows=3):
    return torch.randn(2, rows, 5, 4, dtype=torch.float64).unbind()


def one(net, x):
    return net.head(net.middle(F.relu(net.body(x), inplace=True)).tanh_())


# --- modules that are called again -----------------------------------------------------------------------------------
TWICE = {
    "pair": lambda net, x, y: torch.stack([one(net, x), one(net, y)]),
    "triplet": lambda net, x, y: one(net, x) * one(net, y) + one(net, x.flip(2)),
    "code in between": lambda net, x, y: (
        net.middle(net.body(x)),
        net.head(net.middle(net.body(y.view(len(y), 5, 4)) * 2)),
    )[1],
    "by its weights": lambda net, x, y: net.head(net.middle(net.body(x))) + net.middle(F.linear(y, net.body.weight)),
}


@pytest.mark.parametrize("kind", TWICE)
def test_a_module_is_where_it_is_called_first(kind):
    model = Net(TWICE[kind])
    client, server = split_module(model, "middle")
    assert_names(model, client, server)
    assert {*client.state_dict()} == {"body.weight", "body.bias"}
    assert_same_step(model, client, server, *inputs())
    assert_same_evaluation(model, client, server, *inputs(2))


def test_each_part_of_three_is_called_again():
    model = Net(TWICE["pair"])
    head, body, tail = split_module(model, "middle", tail="head")
    assert [{*part.state_dict()} for part in (head, body, tail)] == [
        {f"{name}.weight", f"{name}.bias"} for name in ("body", "middle", "head")
    ]
    x, y = inputs()
    activations, kept = head(x, y)
    assert torch.equal(tail(*body(*activations), *kept), model(x, y))


def test_what_may_be_changed_in_between_stays_where_it_is():
    def go(net, x, y):
        h = net.body(x)
        return net.middle(h) + h.mul_(2) + net.body(h)

    with pytest.raises(CutError, match=r"'body.\w+' would be needed on the client and on the server"):
        split_module(Net(go), "middle")


def a_view_of_it(net, x, y):
    h = net.body(x)
    v = h.view_as(h)
    m = net.middle(v).detach()
    v.mul_(2)
    return m + net.middle(net.body(h))


def both_names_cross(net, x, y):
    h = net.body(x) * 1
    v = h.transpose(0, 1)
    m = net.middle(h).detach()
    v.mul_(2)
    return m + h


def kept_for_the_tail(net, x, y):
    h = net.body(x)
    m = net.middle(h)
    F.relu(h, inplace=True)
    return net.head(m) + h


def joined_late(net, x, y):
    h = net.middle(b := net.body(x))
    both = h + b
    return net.head(h.mul_(2)) + both


def with_a_layer(net, x, y):
    h = net.body(x)
    return net.head(net.middle(h)) + h


@pytest.mark.parametrize("go", [a_view_of_it, both_names_cross, kept_for_the_tail, joined_late, with_a_layer])
def test_a_change_in_place_that_the_other_side_would_not_see_is_refused(go):
    model, tail = Net(go), None if go in (a_view_of_it, both_names_cross) else "head"
    if go is with_a_layer:
        model.middle = nn.Sequential(nn.Identity(), nn.ReLU(inplace=True), nn.Linear(4, 4).double())
    with pytest.raises(CutError, match="changes a tensor in place that is used on the other side of a cut"):
        split_module(model, "middle", tail=tail)


def test_a_change_in_place_is_welcome_where_it_is_seen():
    """As of what crosses, and in the layers within a part: nobody else has what a layer returns."""

    def go(net, x, y):
        h = net.body(x).mul_(2)
        return net.head(net.middle(h) + h).view_as(h).tanh_()

    model = Net(go)
    model.middle = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4), nn.ReLU(inplace=True)).double()
    assert_same_step(model, *split_module(model, "middle"), *inputs())


class Shift(nn.Linear):
    """Changes what it is given, which only running it shows."""

    def forward(self, x):
        x += 1
        return super().forward(x)


def called_again(net, x, y):
    h = net.body(x)
    return net.middle(h.view(-1, 5, 4)) + net.body(h)


@pytest.mark.parametrize(("go", "tail"), [(with_a_layer, "head"), (called_again, None), (with_a_layer, None)])
def test_a_module_that_changes_what_it_is_given(go, tail):
    model = Net(go)
    model.middle = Shift(4, 4).double()
    head, body, *tails = split_module(model, "middle", tail=tail)
    if go is with_a_layer and tail is None:  # it is seen there
        assert_same_step(model, head, body, *inputs())
        return
    sent = head(*inputs())[0] if tails else head(*inputs())
    with pytest.raises(
        CutError, match="the module 'middle' changes in place what it is given, which is used elsewhere"
    ):
        body(*sent)


def by_operators(net, x, y):
    h = also = net.body(x)
    h += 1
    h *= 2
    g = too = net.middle(also)
    g -= 1
    return net.head(too) + also


def by_index(net, x, y):
    h = net.body(x)
    moved = torch.zeros(len(x), 5, 4, dtype=h.dtype)
    moved[:, 1:] = h[:, :-1]
    g = net.middle(h)
    moved[:, 0] -= g[:, 0]
    moved.mT[:, 0] += 1
    g.detach().data += 1
    return net.head(g + moved)


def into_what_is_no_input(net, x, y):
    total = torch.zeros(4).double()
    g = net.middle(net.body(x))
    total += g.mean((0, 1))
    rows, half = x.size(1), x.size(1)
    half //= 2
    return net.head(g + total)[:, :half] * rows


@pytest.mark.parametrize(
    "go", [by_operators, pytest.param(by_index, marks=pytest.mark.torch("2.10")), into_what_is_no_input]
)
def test_what_code_changes_in_place_is_recorded(go):
    model = Net(go)
    parts = split_module(model, "middle")
    for _ in range(2):  # what the first pass leaves behind is no matter to the second
        assert_same_step(model, *parts, *inputs())
        assert_same_evaluation(model, *parts, *inputs())


# --- sizes -----------------------------------------------------------------------------------------------------------
def cut_pixels(net, x, y):
    n, h, _ = x.shape
    return net.middle(net.body(x))[:, : h // 2, : y.size(2)].reshape(n, -1)


def of_what_does_not_cross(net, x, y):
    h = net.body(x)
    h, sizes = h.mean(1), h.size()
    return net.middle(h) * sizes[1] + h.shape[0]


SIZES = {
    "interpolation": lambda net, x, y: F.interpolate(net.middle(net.body(x).mean(1))[:, None], size=x.shape[1:2]),
    "several": cut_pixels,
    "an inner tensor": of_what_does_not_cross,
    "dimensions": lambda net, x, y: net.middle(net.body(x)) * x.dim() * y.ndim / x.size(dim=-1),
    "mask": lambda net, x, y: torch.ones(x.size(1), 5).double() @ net.middle(net.body(x)),
}


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=pytest.mark.torch("2.10")) if k == "mask" else k for k in SIZES]
)
def test_sizes_cross(kind):
    model = Net(SIZES[kind])
    client, server = split_module(model, "middle")
    assert_same_step(model, client, server, *inputs())
    for rows in (1, 4):
        assert_same_evaluation(model, client, server, *inputs(rows))
    assert sum(tensor.numel() > 0 for tensor in client(*inputs())) == 1


@pytest.mark.parametrize(
    "count", [lambda x: x.unique(dim=1), lambda x: x[:, (x > 0).all(0)[:, 0]], lambda x: x[:, : x.argmax().item()]]
)
def test_sizes_that_tell_of_values_do_not_cross(count):
    def go(net, x, y):
        found = count(x)
        return net.middle(net.body(x)) * found.shape[1]

    with pytest.raises(CutError, match="is a number that only the client knows"):
        split_module(Net(go), "middle")


@pytest.mark.parametrize(
    "go",
    [
        lambda net, x, y: net.head((h := net.middle(net.body(x)).mean(1)) * 2) * x.shape[1] + h.shape[1],
        lambda net, x, y: net.head((h := net.middle(net.body(x)) * x.size(1)).mean(1)) * h.size(1),
    ],
)
def test_sizes_cross_both_ways(go):
    model = Net(go)
    head, body, tail = split_module(model, "middle", tail="head")
    for rows in (1, 4):
        x, y = inputs(rows)
        activations, kept = head(x, y)
        assert torch.equal(tail(*body(*activations), *kept), model(x, y))


# --- code that torch.fx does not record by itself --------------------------------------------------------------------
def checked(net, x, y):
    assert x.dim() == 3, f"got {x.shape}"
    assert len(x) == len(y) and x.shape[1:] == y.shape[1:]  # noqa: PT018
    start = torch.zeros(len(x), x.size(1), 4).double()
    out = net.middle(net.body(x) + start)
    assert (
        out.shape[-1]
        == 4
    )  # fmt: skip
    return out.view(len(y), -1)


@pytest.mark.torch("2.10")
def test_lengths_sizes_and_asserts_are_recorded():
    model = Net(checked)
    client, server = split_module(model, "middle")
    assert_same_step(model, client, server, *inputs())
    assert_same_evaluation(model, client, server, *inputs(2))
    x, y = inputs()
    with pytest.raises(AssertionError, match=r"the assert at test_cut_rearranged.py:\d+ in checked failed"):
        client(x, y[:, :2])
    assert isinstance(torch.zeros, BuiltinFunctionType)
    assert "len" not in globals()


def either(x):
    assert x.dim() == 2 or x.dim() == 3


def one_of(x):
    assert x.dim() in (2, 3)


def any_of(x):
    assert any([x.dim() == 2, x.dim() == 3])


@pytest.mark.parametrize("check", [either, one_of, any_of])
def test_an_assert_that_need_not_hold_in_all_its_parts_is_refused(check):
    with pytest.raises(CutError, match="control flow"):
        split_module(Net(lambda net, x, y: (check(x), net.middle(net.body(x)))[1]), "middle")


def test_a_model_that_is_a_recording_itself():
    model = fx.symbolic_trace(Net(lambda net, x, y: net.middle(net.body(x) * y)))
    client, server = split_module(model, "middle")
    assert_same_evaluation(model, client, server, *inputs())


# --- what holds tensors ----------------------------------------------------------------------------------------------
class Out(NamedTuple):
    features: torch.Tensor
    aux: torch.Tensor
    more: dict


class Giving(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4).double()

    def forward(self, x):
        h = self.layer(x)
        return Out(h, h.relu(), {"scale": h.sigmoid(), "deep": Out(h, h, {})})


def test_entries_of_what_a_module_returns_cross_as_tensors():
    def go(net, x, y):
        out = net.giving(x)
        order = net.body(y).sort(dim=-1)
        g = net.head(net.middle(out.features)) + out.aux * out.more["scale"] + out[0] * out.more["deep"].aux
        return net.head(net.middle(order.values)) + g + order.indices

    model = Net(go)
    model.giving = Giving()
    parts = split_module(model, "middle")
    assert_same_step(model, *parts, *inputs())
    assert_same_evaluation(model, *parts, *inputs(2))
    assert len(parts[0](*inputs())) == 7


def test_an_entry_that_is_changed_in_place_is_one_however_often_it_is_asked_for():
    def go(net, x, y):
        out = net.giving(x)
        h = net.middle(out.features.clone())
        out.aux.mul_(2)
        return net.head(h) + out.aux

    model = Net(go)
    model.giving = Giving()
    with pytest.raises(CutError, match="changes a tensor in place that is used on the other side"):
        split_module(model, "middle")


def test_entries_that_tensors_have_as_well_stay_where_they_are():
    def go(net, x, y):
        h = net.body(x)
        return net.head(net.middle(h)) + h.data[:, 0:1] + h[0]

    client, _ = split_module(Net(go), "middle")
    assert [a.shape for a in client(*inputs())] == [(3, 5, 4)]
