"""Arguments with defaults: None means "may be given", anything else is a setting."""

import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from psl_flower.errors import CutError
from psl_flower.split import SplitModel, cut_model, input_names, split_module


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x, scale=None):
        return self.layer(x) if scale is None else self.layer(x) * scale


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.head = Scaled(), nn.Linear(4, 2)


class AllDefaults(Net):
    def forward(self, x=None, mask=None):
        return self.head(self.stem(x))


class Used(Net):
    def forward(self, x=None, scale=None, *, shift=None, power=1):
        return self.head(F.relu(self.stem(x, scale)).flatten(1) ** power)


class NeedsTwo(Net):
    def forward(self, x=None, y=None, extra=None):
        return self.head(self.stem(x).flatten(1) + y.flatten(1))


class Refuses(Net):
    def forward(self, x=None, embedded=None):
        if x is None and embedded is None:
            raise ValueError("x or embedded must be given")
        if x is not None and embedded is not None:
            raise ValueError("x and embedded must not both be given")
        return self.head(self.stem(x if embedded is None else embedded))


class Branches(Net):
    def forward(self, x, mask=None):
        h = self.stem(x)
        if mask is not None:
            h = h * mask
        return self.head(h)


class Together(Net):
    """Either alone changes nothing, both do."""

    def forward(self, x, a=None, b=None):
        h = self.stem(x)
        if a is not None and b is not None:
            h = h + 1
        return self.head(h)


class ToTheServer(Net):
    def __init__(self):
        super().__init__()
        self.second = Scaled()

    def forward(self, x, scale=None):
        return self.head(self.second(self.stem(x), scale))


x, half = torch.randn(3, 4), torch.full((3, 1), 0.5)


@pytest.mark.parametrize(
    ("make", "calls"),
    [
        (AllDefaults, [{"x": x}, {"x": x, "mask": half}]),
        (Used, [{"x": x}, {"x": x, "scale": half}, {"x": x, "shift": half}, {"x": x, "power": 1}]),
        (NeedsTwo, [{"x": x, "y": x * 2}, {"y": x, "x": x, "extra": half}]),
        (Refuses, [{"x": x}]),
        (Branches, [{"x": x}, {"x": x, "mask": None}]),
        (Together, [{"x": x}]),
        (ToTheServer, [{"x": x}]),
    ],
)
def test_inputs_by_name(make, calls):
    model = make()
    client, server = split_module(model, "second" if make is ToTheServer else "head")
    for mode in (True, False):
        model.train(mode), client.train(mode), server.train(mode)
        for call in calls:
            assert torch.equal(server(*client(**call)), model(**call))
    copied = pickle.loads(pickle.dumps(client))
    assert torch.equal(copied(**calls[0])[0], client(**calls[0])[0])


def test_inputs_by_position():
    model = Used()
    client, server = split_module(model, "head")
    assert torch.equal(server(*client(x, half)), model(x, half))
    assert not torch.equal(server(*client(x, half)), model(x))
    assert input_names(client) == ("x", "scale", "shift", "power")
    with pytest.raises(TypeError, match="unexpected keyword argument 'y'"):
        client(x, y=x)
    with pytest.raises(TypeError, match="too many"):
        client(x, half, half)


@pytest.mark.parametrize(
    ("make", "cut", "call", "words"),
    [
        (
            Branches,
            "head",
            {"mask": half},
            ["'mask' was given", "something else where it is None", "remove its default"],
        ),
        (Together, "head", {"a": half}, ["'a' was given", "remove its default"]),
        (Refuses, "head", {"embedded": x}, ["'embedded' was given", "remove its default"]),
        (Used, "head", {"power": 2}, ["'power' was given", "default, 1", "setting"]),
        (ToTheServer, "second", {"scale": half}, ["'scale' was given", "after the cut", "raw examples", "cut later"]),
    ],
)
def test_arguments_that_keep_their_default(make, cut, call, words):
    client, _ = split_module(make(), cut)
    with pytest.raises(CutError) as caught:
        client(x, **call)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_arguments_that_the_code_cannot_do_without():
    client, _ = split_module(NeedsTwo(), "head")
    for call in ({"x": x}, {"x": x, "y": None}, {"y": x}):
        with pytest.raises(CutError, match="is None or left out, but the model was cut with it"):
            client(**call)

    class OnTheServer(Net):
        def forward(self, x=None, mask=None):
            return self.head(self.stem(x)) * mask.flatten(1) + x[:, :1]

    with pytest.raises(CutError, match="the input 'x' is used after the cut"):
        split_module(OnTheServer(), "head")


def test_an_argument_without_its_default_is_an_input():
    class Always(Net):
        def forward(self, x, mask):
            return Branches.forward(self, x, mask)

    model = Always()
    client, server = split_module(model, "head")
    assert torch.equal(server(*client(x, mask=half)), model(x, half))
    with pytest.raises(TypeError, match="missing a required argument: 'mask'"):
        client(x)


def test_the_only_argument_is_an_input_whatever_its_default():
    class Branch(Net):
        def forward(self, x=None):
            if x is None:
                x = torch.zeros(1, 4)
            return self.head(self.stem(x))

    model = Branch()
    client, server = split_module(model, "head")
    assert torch.equal(server(*client(x=x)), model(x))


def test_an_entry_of_a_dictionary_is_a_raw_input():
    class Rows(Net):
        def forward(self, batch):
            return self.head(self.stem(batch["x"])) + (batch["y"].shape[0] - 3)

    model = Rows()
    client, server = split_module(model, "head")
    rows = {"x": x, "y": x}
    assert torch.equal(server(*client(rows)), model(rows))

    class Crossing(Net):
        def forward(self, batch):
            return self.head(self.stem(batch["x"])) * batch["mask"]

    with pytest.raises(CutError, match="the input 'mask' is used after the cut"):
        split_module(Crossing(), "head")


def test_hooks_on_the_model_see_its_arguments():
    model = Used()
    model.register_forward_pre_hook(lambda module, arguments: (arguments[0] * 2, *arguments[1:]))
    client, server = split_module(model, "head")
    assert torch.equal(server(*client(x, half)), model(x, half))


def test_inputs_of_a_model_cut_by_hand():
    model = SplitModel(client=Scaled(), server=nn.Linear(4, 2))
    client = cut_model(model).client
    assert input_names(client) == ("x", "scale")
    assert torch.equal(model.server(*client(x, scale=half)), model(x, scale=half))


@pytest.mark.parametrize(
    ("forward", "words"),
    [
        (lambda *inputs: None, "forward(*inputs) of Any names no input"),
        (lambda x=1: None, "forward(x=1) of Any names no input: arguments without a default are inputs"),
    ],
)
def test_a_model_that_names_no_input(forward, words):
    class Any(Net):
        pass

    model = Any()
    model.forward = forward
    with pytest.raises(CutError) as caught:
        split_module(model, "head")
    assert words in str(caught.value)


class Entries(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return {"pooled": self.layer(x)}


class SameName(nn.Module):
    """Its module `text` gives a dict, its argument `text` is a tensor."""

    def __init__(self):
        super().__init__()
        self.text, self.head = Entries(), nn.Linear(4, 2)

    def forward(self, text):
        return self.head(self.text(text)["pooled"])


def test_a_module_of_the_name_of_an_argument_says_nothing_of_it():
    model = SameName()
    halves = cut_model(model, "head")
    assert halves.client.signature().parameters["text"].annotation is not dict
    assert torch.equal(halves.server(*halves.client(x)), model(x))
