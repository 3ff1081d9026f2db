"""Inputs go to a model's forward pass by name or by position, never to the wrong argument."""

from collections import UserDict
from collections.abc import Mapping
from typing import Optional

import pytest
import torch
from torch import nn

from psl_flower.data import bind_inputs, forward_signature
from psl_flower.errors import ConfigError

A, B, C = torch.zeros(1), torch.ones(1), torch.full((1,), 2.0)


def model(function):
    return type("Net", (nn.Module,), {"forward": function})()


def bound(function, inputs):
    return bind_inputs(forward_signature(model(function)), inputs)


@pytest.mark.parametrize(
    ("function", "inputs", "expected"),
    [
        (lambda self, x: 0, A, ((A,), {})),
        (lambda self, x, y: 0, (A, B), ((A, B), {})),
        (lambda self, *xs: 0, (A, B), ((A, B), {})),
        (lambda self, x: 0, {"img": A}, ((A,), {})),
        (lambda self, *xs: 0, {"img": A}, ((A,), {})),
        (lambda self, x, img=None: 0, {"x": A}, ((A,), {})),
        (lambda self, input_ids, mask=None: 0, {"mask": B, "input_ids": A}, ((A, B), {})),
        (lambda self, ids, gap=None, mask=None: 0, {"mask": B, "ids": A}, ((A,), {"mask": B})),
        (lambda self, ids, *, mask: 0, {"mask": B, "ids": A}, ((A,), {"mask": B})),
        (lambda self, ids=None, **rest: 0, {"mask": B, "ids": A}, ((A,), {"mask": B})),
        (lambda self, **rows: 0, {"img": A}, ((), {"img": A})),
    ],
)
def test_inputs_reach_the_arguments_of_their_names(function, inputs, expected):
    args, kwargs = bound(function, inputs)
    assert len(args) == len(expected[0])
    assert all(a is b for a, b in zip(args, expected[0], strict=True))
    assert kwargs.keys() == expected[1].keys()
    assert all(kwargs[key] is expected[1][key] for key in kwargs)
    model(function)(*args, **kwargs)


@pytest.mark.parametrize(
    ("function", "inputs", "message"),
    [
        (
            lambda self, ids: 0,
            {"ids": A, "idx": B},
            r"takes \(ids\), but rows hold 'ids', 'idx': .* remove 'idx'",
        ),
        (lambda self, x, y: 0, {"a": A, "b": B}, "rename or remove 'a', 'b' .*target=$"),
        (lambda self, x: 0, {"a": A, "b": B}, r"if 'x' is the row's whole dict, annotate it, x: dict$"),
        (lambda self, ids, mask: 0, {"ids": A}, r"takes \(ids, mask\), rows hold 'ids': missing .*'mask'"),
        (lambda self, ids, mask: 0, {"img": A}, "rows hold 'img': missing"),
        (lambda self, x: 0, (A, B), "takes .x., rows hold 2 inputs: too many"),
        (lambda self, x, y: 0, A, "rows hold one input: missing"),
        (lambda self: 0, {"img": A}, "remove 'img'"),
    ],
)
def test_inputs_that_do_not_fit_are_named(function, inputs, message):
    with pytest.raises(ConfigError, match=message):
        bound(function, inputs)


def test_a_model_that_does_not_tell():
    assert bind_inputs(None, {"img": A}) == ((A,), {})
    assert bind_inputs(None, {"a": A, "b": B}) == ((), {"a": A, "b": B})
    assert bind_inputs(None, (A, C)) == ((A, C), {})


@pytest.mark.parametrize(
    "kind",
    [
        *(dict, dict[str, torch.Tensor], Mapping[str, object], UserDict, "dict[str, Tensor]", "typing.Mapping"),
        *(dict | torch.Tensor, torch.Tensor | dict[str, torch.Tensor], Optional[dict]),  # noqa: UP045
        *("dict | Tensor", "Tensor | dict[str, Tensor]", "Optional[dict]", "dict[str, int | Tensor]"),
    ],
)
def test_the_one_argument_that_is_annotated_as_a_dict_is_given_the_whole_row(kind):
    def forward(self, batch, gain=1.0):
        return batch

    forward.__annotations__["batch"] = kind
    for row in ({"a": A}, {"a": A, "b": B}):
        (given,), named = bound(forward, row)
        assert given is row
        assert not named
    assert bound(forward, {"batch": {"a": A}}) == (({"a": A},), {})
    by_name = {"batch": kind}
    only = lambda self, *, batch: batch  # noqa: E731
    only.__annotations__ = by_name
    assert bound(only, {"a": A}) == ((), {"batch": {"a": A}})


@pytest.mark.parametrize("kind", [torch.Tensor, torch.Tensor | list[dict], "Tensor", "Tensor | list[int | dict]"])
def test_an_argument_is_no_dict_for_being_annotated(kind):
    def forward(self, x):
        return x

    forward.__annotations__["x"] = kind
    assert bound(forward, {"img": A}) == ((A,), {})
