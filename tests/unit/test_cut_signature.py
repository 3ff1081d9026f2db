"""Two sides that cut differently are told so in a sentence."""

import json
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from psl_flower.split import SplitModel, cut_model, difference, doubt, signature


def model(width=6):
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))


MINE = signature(cut_model(model(), "2"))


def test_a_signature_is_small_and_survives_json():
    text = json.dumps(MINE)
    assert len(text) < 400
    assert json.loads(text) == MINE
    assert (MINE["cut"], MINE["tail"], {*MINE["parts"]}) == ("2", None, {"client", "server"})
    assert MINE["parts"]["client"]["values"] == 30


@pytest.mark.parametrize(
    "theirs",
    [
        MINE,
        signature(cut_model(model(), "2")),
        signature(cut_model(model(), "2").parts),
        signature(cut_model(model(), "2").client),  # a client that holds its half only
    ],
)
def test_the_same_cut(theirs):
    assert difference(MINE, theirs) is None


@pytest.mark.parametrize(
    ("theirs", "words"),
    [
        (signature(cut_model(model(), "3")), "the server cuts at '2', client 3 at '3'"),
        (signature(cut_model(model(), "2", "4")), "the server cuts at '2', client 3 at '2' with the tail '4'"),
        (
            signature(cut_model(SplitModel(client=nn.Linear(4, 6), server=nn.Linear(6, 2)))),
            "the server cuts at '2', client 3 by hand",
        ),
        (signature(cut_model(model(8), "2")), "part has 2 tensors with 30 values, on client 3 2 tensors with 40"),
        (
            signature(cut_model(nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 1)), "2").client),
            "names or shapes of the tensors in its client part differ",
        ),
        ({}, "client 3 by hand"),
        ({"cut": "2", "parts": 3}, "no part of the model in common"),
        ({"cut": "2", "parts": {}}, "no part"),
        ({"cut": "2", "parts": {"client": [1]}}, "on client 3 None tensors"),
    ],
)
def test_different_cuts(theirs, words):
    found = difference(MINE, theirs, ("the server", "client 3"))
    assert words in found
    assert found.endswith("give both the same model and the same cut")


class Called(nn.Module):
    def __init__(self, function, dropout=0.0):
        super().__init__()
        self.function = function
        self.body, self.dropout, self.head = nn.Linear(4, 6), nn.Dropout(dropout), nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.dropout(self.function(self.body(x))))


def frozen(called):
    called.dropout.eval()
    return called


class MyGELU(nn.GELU):
    pass


OTHER = "cut at 'head', but not the same model: "


@pytest.mark.parametrize(
    ("theirs", "words"),
    [
        (Called(nn.Tanh(), dropout=0.5), "'dropout' of its client part is Dropout(p=0.0) on the server"),
        (
            frozen(Called(nn.Tanh())),
            "'dropout' of its client part is Dropout(p=0.0) on the server, Dropout(p=0.0).eval() on",
        ),
        (Called(nn.GELU()), "'function' of its client part is Tanh() on the server, GELU(approximate='none') on the"),
        (Called(nn.Identity()), "'function' of its client part is Tanh() on the server, nothing on the client"),
    ],
)
def test_the_same_tensors_used_otherwise(theirs, words):
    """What clients run is not what the server's model would do: it would be trained for other activations."""
    mine, other = (signature(cut_model(m, "head")) for m in (Called(nn.Tanh()), theirs))
    assert OTHER + words in difference(mine, other)
    assert difference(mine, {**other, "by": "2.0"}) is None  # another torch may name the same otherwise
    assert difference(mine, signature(cut_model(Called(nn.Tanh()), "head"))) is None


def test_a_mode_counts_where_it_does_something():
    loaded = Called(nn.Tanh())
    loaded.body.eval()  # as of a pretrained model, on one side only
    assert difference(*(signature(cut_model(m, "head")) for m in (loaded, Called(nn.Tanh())))) is None


def test_what_may_be_the_same_mathematics_is_told_only():
    """As of attention, which has several implementations."""
    mine, other = (signature(cut_model(Called(f), "head")) for f in (torch.relu, lambda h: h.clamp(min=0)))
    assert difference(mine, other) is None
    assert doubt(mine, mine) is None
    assert "the server and client 3 do not call the same functions of torch as often in the client part" in (
        doubt(mine, other, ("the server", "client 3"))
    )
    assert "model: 'clamp', 'relu'. Where" in doubt(mine, other)
    assert doubt(mine, {**other, "by": "2.0"}) is None


def test_another_activation_function_is_another_model():
    """Called as a function it is no layer, but no two of them compute the same."""
    mine, other, in_place = (signature(cut_model(Called(f), "head")) for f in (torch.tanh, torch.relu, torch.tanh_))
    assert OTHER + "its client part calls 'tanh' on the server, where it calls 'relu' on the client; give" in (
        difference(mine, other) or ""
    )
    assert difference(mine, {**other, "by": "2.0"}) is None
    assert difference(mine, in_place) is None
    longer = signature(cut_model(Called(lambda h: 2 * torch.sigmoid(2 * h) - 1), "head"))  # the same, written otherwise
    assert difference(mine, longer) is None
    assert doubt(mine, longer) is not None


def test_which_line_a_function_is_called_on_is_no_difference():
    def halved(h):
        h /= 2.5
        return h

    def halved_below(h):
        h /= 2.5
        return h

    mine, theirs = (signature(cut_model(Called(f), "head")) for f in (halved, halved_below))
    assert "itruediv(2.5)" in mine["parts"]["client"]["calls"]
    assert doubt(mine, theirs) is None


class Within(nn.Module):
    """Has a layer, or a function in its place, in a module that is taken over whole."""

    def __init__(self, layer=None):
        super().__init__()
        self.linear, self.act = nn.Linear(4, 4), layer

    def forward(self, x):
        return (self.act or F.relu)(self.linear(x))


@pytest.mark.parametrize(
    ("layer", "function", "words"),
    [
        (nn.ReLU(inplace=True), F.relu, None),
        (nn.LeakyReLU(), lambda h: F.leaky_relu(h), None),
        (nn.LeakyReLU(0.2), lambda h: F.leaky_relu(h, 0.2), None),
        (nn.Softmax(1), lambda h: h.softmax(1), None),
        (nn.LeakyReLU(0.1), lambda h: F.leaky_relu(h, 0.2), r"LeakyReLU\(negative_slope=0.1\) on the server, nothing"),
        (nn.GELU("tanh"), F.gelu, "GELU.* on the server, nothing"),
        (nn.ReLU(), torch.tanh, r"ReLU\(\) on the server, nothing"),
        (
            lambda h: F.leaky_relu(h),
            lambda h: F.leaky_relu(h, 0.2),
            r"'leaky_relu\(0.01\)'.* calls 'leaky_relu\(0.2\)'",
        ),
        (
            F.gelu,
            lambda h: F.gelu(h, approximate="tanh"),
            r"calls \"gelu\('none'\)\"",
        ),
    ],
)
def test_a_layer_and_its_function_are_one(layer, function, words):
    mine, theirs = (signature(cut_model(Called(each), "head")) for each in (layer, function))
    found = [difference(mine, theirs), difference(theirs, mine)]
    assert found == [None, None] if words is None else re.search(words, found[0] or "") and found[1]
    assert words or doubt(mine, theirs) is None


def test_a_layer_and_its_function_are_one_in_a_module_that_stays_whole():
    def signed(layer):
        return signature(cut_model(nn.Sequential(Within(layer), nn.Linear(4, 2)), "1"))

    assert difference(signed(nn.ReLU()), signed(None)) is None
    assert "'0.act' of its client part is nothing on the server, Tanh() on" in (
        difference(signed(None), signed(nn.Tanh())) or ""
    )


def test_layers_of_the_users_have_any_name():
    def signed(layer):
        return signature(cut_model(SplitModel(client=nn.Sequential(nn.Linear(4, 4), layer), server=nn.Linear(4, 2))))

    assert difference(signed(nn.GELU()), signed(MyGELU())) is None
    assert "'client.1' of its client part is GELU" in difference(signed(nn.GELU()), signed(nn.ReLU()))


@pytest.mark.parametrize("layers", [3, "ab", [], {"0": 7}, {"0": None, "x" * 999: ["y"] * 999}])
def test_layers_that_are_nothing_to_read(layers):
    theirs = json.loads(json.dumps(MINE))
    theirs["parts"]["client"] |= {"layers": layers, "calls": layers, "numbers": layers}
    found = difference(MINE, theirs)
    assert (found is None) == (not isinstance(layers, dict))
    assert len(found or "") < 400
    assert len(doubt(MINE, theirs) or "") < 400


def test_what_the_server_runs_is_its_own():
    mine, other = (signature(cut_model(Called(torch.tanh, dropout=p), "dropout")) for p in (0.0, 0.5))
    assert difference(mine, other) is None


def test_models_cut_by_hand():
    def halves(width):
        return cut_model(SplitModel(client=nn.Linear(4, width), server=nn.Linear(width, 2)))

    assert difference(signature(halves(6)), signature(halves(6))) is None
    assert "cut by hand, but not the same model" in difference(signature(halves(6)), signature(halves(7)))


class Shuffled(nn.Module):
    def __init__(self, order):
        super().__init__()
        self.layer, self.order = nn.Linear(4, 4), order

    def forward(self, x):
        return self.layer(x[:, self.order])


def test_whole_numbers_that_modules_keep():
    def signed(order, cut="1"):
        return signature(cut_model(nn.Sequential(Shuffled(order), nn.Linear(4, 2), Shuffled(order)), cut))

    mine = signed([0, 1, 2, 3])
    assert difference(mine, signed(np.arange(4))) is None
    found = difference(mine, signed([1, 0, 2, 3]))
    assert "the whole numbers in '0.order' of its client part are in another order" in found
    assert "make them a buffer" in found
    for other in ([0, 0, 2, 3], [0]):  # no permutation of the same
        assert difference(mine, signed(other)) is None
    server = (
        nn.Sequential(nn.Linear(4, 4), Shuffled([3, 2, 1, 0])),
        nn.Sequential(nn.Linear(4, 4), Shuffled([0, 1, 2, 3])),
    )
    assert difference(*(signature(cut_model(each, "1")) for each in server)) is None  # the server's own is used


class Scaled(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.layer, self.factor, self.steps = nn.Linear(4, 4), factor, 0

    def forward(self, x):
        self.steps += 1
        return self.layer(x) * self.factor


class ScaledOutside(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.layer, self.head, self.factor = nn.Linear(4, 4), nn.Linear(4, 2), factor

    def forward(self, x):
        return self.head(self.layer(x) * self.factor)


@pytest.mark.parametrize(
    ("make", "cut", "words"),
    [
        (
            lambda factor: nn.Sequential(Scaled(factor), nn.Linear(4, 2)),
            "1",
            "'0.factor' of the client part of the model",
        ),
        (ScaledOutside, "head", "model: 'mul(0.5)', 'mul(2.0)'"),
    ],
)
def test_numbers_that_modules_keep_are_compared(make, cut, words):
    mine, other = (signature(cut_model(make(factor), cut)) for factor in (2.0, 0.5))
    assert difference(mine, other) is None
    assert words in doubt(mine, other)
    run = make(2.0)
    run(torch.ones(2, 4))
    assert doubt(mine, signature(cut_model(run, cut))) is None  # what forward sets is a state


def test_tensors_that_modules_keep_are_the_servers():
    class Projected(nn.Linear):
        def __init__(self):
            super().__init__(4, 4)
            self.fixed, self.seen = torch.randn(4, 4), torch.zeros(1)

        def forward(self, x):
            self.seen = x.detach()
            return super().forward(x @ self.fixed)

    model = nn.Sequential(Projected(), nn.Linear(4, 2), Projected())
    halves = cut_model(model, "1")
    assert dict(halves.client.named_buffers()).keys() == {"0.fixed"}  # not what its forward sets
    assert not dict(halves.server.named_buffers())
    assert "0.fixed" not in halves.client.state_dict()
    x = torch.randn(3, 4)
    assert torch.equal(halves.client(x)[0], model[0](x))
    assert isinstance(vars(model[0])["fixed"], torch.Tensor)  # the model itself is left as it was


def test_a_layer_may_work_in_place_on_one_side():
    def signed(inplace):
        return signature(
            cut_model(nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace), nn.Dropout(0.5, inplace), nn.Linear(4, 2)), "3")
        )

    assert difference(signed(True), signed(False)) is None
