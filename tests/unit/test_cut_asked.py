"""What code around a cut asks of tensors while it is recorded: it is answered rightly, or refused, never guessed."""

import functools
import logging
import re
from collections.abc import Mapping

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_cut import assert_same_evaluation, assert_same_step
from test_cut_rearranged import Net, inputs
from torch import fx, nn

from psl_flower.errors import CutError
from psl_flower.split import Cut, split_module


def by_value(net, x):
    return net.body(x) * 2 if x.sum() > 0 else net.body(x)


def by_size(net, x):
    return net.body(x) * (2 if x.shape[1] in (5, 6) else 3)


def row_by_row(net, x):
    return torch.stack([net.body(row) for row in x])


def as_number(net, x):
    return net.body(x) * int(x.shape[1])


def so_often(net, x):
    h = net.body(x)
    for _ in range(h.shape[1]):
        h = h + 1
    return h


def indexed(net, x):
    return net.body(x) * [1, 2, 3, 4, 5, 6][x.shape[1]]


def at_random(net, x):
    return net.body(x) + torch.randn(4)


def not_a_step(net, x):
    return net.body(x).mul(Net)


def looked_up(net, x):
    return net.body(x) * {5: 2}.get(x.shape[1], 3)


def by_dtype(net, x):
    h = net.body(x)
    return h * 2 if h.dtype is torch.float64 else h


def by_type(net, x):
    h = net.body(x)
    return h * 2 if type(h) is torch.Tensor else h


def by_variable(net, x):
    h = net.body(x)
    kind = h.dtype
    return h * 2 if kind is torch.float64 else h


def by_class(net, x):
    h = net.body(x)
    return h * 2 if h.__class__ is torch.Tensor else h


def matched(net, x):
    match h := net.body(x):
        case torch.Tensor():
            return h * 2
    return h


@functools.singledispatch
def doubled(h):
    return h


@doubled.register
def _(h: torch.Tensor):
    return h * 2


def dispatched(net, x):
    return doubled(net.body(x))


def rounded(net, x):
    return net.body(x) * round(x.shape[1] / 2)


def divided(net, x):
    return net.body(x) * divmod(x.shape[1], 2)[0]


def product(net, x):
    return net.body(x) * np.prod(x.shape[1:])


def by_grad_mode(net, x):
    return net.body(x) * (2 if torch.is_grad_enabled() else 1)


def by_gradient(net, x):
    h = net.body(x)
    return h * (2 if h.requires_grad else 1)


def seeded(net, x):
    torch.manual_seed(0)
    return F.dropout(net.body(x))


def by_identity(net, x):
    return net.body(x) * {id(x): 2}.get(id(x), 3)


def by_text(net, x):
    return net.body(x) * (2 if "64" in f"{x.dtype}" else 3)


def matched_by_form(net, x):
    match x.shape:
        case (_, _, _):
            return net.body(x)
        case _:
            return net.body(x) * 2


class Sizes:
    """Has methods that are called as those of tensors are."""

    def expand(self, *sizes):
        return len(sizes)

    def view(self, h, *sizes):
        return h.view(*sizes) * len(sizes)


def given_to_ones_own(net, x):
    h = net.body(x)
    return h * Sizes().expand(*h.shape)


def given_on_by_ones_own(net, x):
    h = net.body(x)
    return Sizes().view(h, *h.shape)


ELSEWHERE = {"torch": torch, "__name__": "elsewhere"}
exec("def by_type(h):\n    return h * 2 if type(h) is torch.Tensor else h", ELSEWHERE)


def by_type_elsewhere(net, x):
    return net.asking["type"](net.body(x))


ASKING = [
    matched_by_form,
    given_to_ones_own,
    given_on_by_ones_own,
    by_identity,
    by_text,
    by_type_elsewhere,
    by_variable,
    by_class,
    matched,
    dispatched,
    rounded,
    divided,
    product,
    by_grad_mode,
    seeded,
    by_value,
    by_size,
    row_by_row,
    as_number,
    so_often,
    indexed,
    at_random,
    not_a_step,
    looked_up,
    by_dtype,
    by_type,
]


@pytest.mark.parametrize("ask", ASKING)
def test_a_refusal_that_the_code_catches_is_raised_all_the_same(ask):
    def go(net, x, y):
        try:
            h = ask(net, x)
        except Exception:
            h = net.body(x) * 7
        return net.head(net.middle(h))

    model = Net(go)
    model.asking = {"type": functools.partial(ELSEWHERE["by_type"])}
    with pytest.raises(CutError) as caught:
        split_module(model, "middle")
    assert re.search(rf"test_cut_asked.py:\d+ in {ask.__name__}: ", str(caught.value))
    assert "SplitModel(client=..., server=...)" in str(caught.value)
    assert not fx.Proxy.__dict__.keys() & {"__index__", "__contains__", "__hash__"}
    assert isinstance.__module__ == hasattr.__module__ == "builtins"


def test_what_the_code_catches_of_its_own_is_no_refusal():
    def go(net, x, y):
        try:
            factor = net.factors["none"]
        except KeyError:
            factor = 2
        return net.head(net.middle(net.body(x) * factor))

    model = Net(go)
    model.factors = {}
    assert_same_step(model, *split_module(model, "middle"), *inputs())


def kinds(net, x, y):
    h = net.body(x)
    if isinstance(h, torch.Tensor) and torch.is_tensor(x) and not isinstance(h, tuple | list) and not callable(h):
        h = h * 2
    if isinstance(x, Mapping) or hasattr(h, "logits"):
        h = h["logits"]
    if isinstance(h.shape[1], int) and isinstance(h.shape, tuple) and isinstance(len(x), int):
        h = h * 3
    if isinstance(net.body.weight, nn.Parameter) and net.body.bias is not None:
        h = h + 1
    mask = getattr(h, "mask", None)
    print(h.shape)
    torch._assert(h.dim() == 3, f"three dimensions, not {h.shape}")
    logging.getLogger(__name__).warning("%s", h)
    return net.head(net.middle(h if mask is None else h * mask)) * (2 if h.layout is not None else 3)


def pieces(net, x, y):
    h = net.body(x)
    h = torch.cat([2 * part for part in h.chunk(2, dim=2)], 2) + sum(part.mean() for part in h.split([1, 2, 1], 2))
    g = net.middle(h).view(*h.shape[:2], 2, 2)
    b, c = h.size()[-2:]
    return net.head(F.relu(g).flatten(2)).view(len(x), *h.size()[-2:]) * (b + c)


def stars(net, x, y):
    h = net.body(x)
    h = h.view(*h.shape[:-1], 2, -1).reshape(len(x), *h.size()[1:]) + h.new_zeros(*h.shape)
    g = net.middle(h)
    return net.head(
        g.view(
            *g.shape,
        )
        + g.mean(1, keepdim=True).expand(*g.shape)
    )


@pytest.mark.parametrize("go", [kinds, pieces, stars])
def test_what_is_answered(go):
    model = Net(go)
    assert_same_step(model, *split_module(model, "middle"), *inputs())
    assert_same_evaluation(model, *split_module(model, "middle"), *inputs())


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4).double()

    def forward(self, x):
        return self.layer(x), None


def a_pair(net, x, y):
    h = net.pair(x)
    if isinstance(h, tuple):
        h = h[0]
    return net.head(net.middle(h))


def an_entry(net, x, y):
    h = net.pair(x)
    mask = h[1]
    return net.head(net.middle(h[0] if mask is None else 2 * h[0]))


def entries_that_are_there(net, x, y):
    h, mask = net.pair(x)
    return tuple(each for each in (net.head(net.middle(h)), mask) if each is not None)


def attention_weights(net, x, y):
    h, weights = net.attention(x, x, x, need_weights=False)
    return net.head(net.middle(net.body(h))) * (1 if weights is None else 2)


def an_entry_by_name(net, x, y):
    h = net.named(x)
    mask = h.get("mask")
    return net.head(net.middle(h["h"])) * (2 if mask is not None else 3)


def unpacked(net, x, y):
    try:
        _, n = x.shape
    except ValueError:
        _, n, _ = x.shape
    return net.head(net.middle(net.body(x))) * n


class Named(Pair):
    def forward(self, x):
        return {"h": self.layer(x)}


def a_gradient(net, x, y):
    h = net.body(x).detach()
    return net.head(net.middle(h if h.grad is None else 2 * h))


WRONG = {
    "(isinstance, tuple)": [a_pair],
    "(entries, 2)": [unpacked],
    "(is None)": [a_gradient, an_entry, an_entry_by_name, attention_weights, entries_that_are_there],
}


def with_pairs(go):
    model = Net(go)
    model.pair, model.named = Pair(), Named()
    model.attention = nn.MultiheadAttention(4, 2, batch_first=True).double()
    return model


@pytest.mark.filterwarnings("ignore:The .grad attribute")
@pytest.mark.parametrize(("asked", "go"), [(asked, go) for asked, functions in WRONG.items() for go in functions])
def test_an_answer_that_was_wrong_shows_when_the_part_runs(asked, go):
    client, _ = split_module(with_pairs(go), "middle")
    with pytest.raises(CutError, match=r"recorded with the other answer, .* Cut\(name, example=...\)") as caught:
        client(*inputs())
    assert asked in str(caught.value)


@pytest.mark.torch("2.10")
@pytest.mark.filterwarnings("ignore:The .grad attribute")
@pytest.mark.parametrize("go", [go for functions in WRONG.values() for go in functions])
def test_with_an_example_it_is_answered_as_the_message_says(go):
    model, (x, y) = with_pairs(go), inputs()
    parts = split_module(model, Cut("middle", example={"x": x, "y": y}))
    torch.testing.assert_close(parts[1](*parts[0](x, y)), model(x, y), rtol=0, atol=0)


def number_of_dimensions(net, x, y):
    h = net.body(x if x.dim() == 3 else x.unsqueeze(0))
    return net.head(net.middle(h)) * y.ndim


def star(net, x, y):
    b, *rest = net.body(x).shape
    return net.head(net.middle(net.body(x)).reshape(b, *rest))


def star_elsewhere(net, x, y):
    h = net.body(x)
    sizes = [*h.shape[:-1], 4]
    return net.head(net.middle(h)).view(sizes) * len(sizes)


def one_by_one(net, x, y):
    return net.head(net.middle(torch.stack([row * 2 for row in net.body(x).unbind(1)], 1)))


@pytest.mark.torch("2.10")
@pytest.mark.parametrize(
    ("go", "words"),
    [
        (number_of_dimensions, "the control flow depends on what is known only when the model runs"),
        (star, r"unpacked with \*.*h\.shape\[:-1\] \+ \(2, 3\) in place of"),
        (star_elsewhere, r"unpacked with \*"),
        (one_by_one, "all at once in place of a loop"),
    ],
)
def test_what_only_an_example_tells_is_told_so(go, words):
    model, (x, y) = Net(go), inputs()
    with pytest.raises(CutError, match=words) as caught:
        split_module(model, "middle")
    assert "Cut(name, example={'x': torch.zeros(2, ...), 'y': torch.zeros(2, ...)})" in str(caught.value)
    client, server = split_module(model, Cut("middle", example={"x": x, "y": y}))
    assert torch.equal(server(*client(x, y)), model(x, y))


def else_raises(net, x, y):
    if x.shape[2] == 4 and y.dim() > 1:
        h = net.body(x)
    else:
        raise ValueError("another number of features")
    return net.head(net.middle(h))


def test_a_check_that_raises_otherwise_is_made_by_the_part():
    model = Net(else_raises)
    client, server = split_module(model, "middle")
    assert_same_step(model, client, server, *inputs())
    with pytest.raises(AssertionError, match=r"at .* in else_raises failed"):
        client(*torch.zeros(2, 3, 5, 3).double())


@pytest.mark.torch("2.10")
@pytest.mark.parametrize("ask", [by_value, by_grad_mode, by_gradient, seeded])
def test_what_the_code_catches_is_refused_under_torch_export_too(ask):
    def go(net, x, y):
        try:
            h = ask(net, x if x.dim() == 3 else x[None])
        except Exception:
            h = net.body(x) * 7
        return net.head(net.middle(h))

    x, y = inputs()
    with pytest.raises(CutError, match=r"Nor does torch.export do: torch.export cannot record Net"):
        split_module(Net(go), Cut("middle", example={"x": x, "y": y}))


@pytest.mark.torch("2.10")
def test_a_hook_on_a_tensor_would_be_lost():
    def go(net, x, y):
        h = net.body(x)
        h.register_hook(lambda gradient: 2 * gradient)
        return net.head(net.middle(h))

    x, y = inputs()
    with pytest.raises(CutError, match="a hook on a tensor would be lost"):
        split_module(Net(go), Cut("middle", example={"x": x, "y": y}))
