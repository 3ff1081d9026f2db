"""What model_fn and data_fn are called with."""

import functools

import pytest

from psl_flower.client.factory import _call


class Net:
    def __init__(self, num_classes=10):
        self.num_classes = num_classes


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda: "nothing", "nothing"),
        (lambda context: context, "c"),
        (lambda anything: anything, "c"),
        (lambda context, config: (context, config), ("c", "k")),
        (lambda context, config=None: (context, config), ("c", "k")),
        (lambda context=None, config=None: (context, config), ("c", "k")),
        (lambda config=None: config, "k"),
        (lambda context, seed=3: (context, seed), ("c", 3)),
        (lambda context, *, config=None: (context, config), ("c", "k")),
        (functools.partial(lambda scale, context: (scale, context), 2), (2, "c")),
        (lambda: Net().num_classes, 10),
    ],
)
def test_gets_what_it_asks_for(function, expected):
    assert _call(function, context="c", config="k") == expected


def test_a_class_with_options_keeps_them():
    assert _call(Net, context="c").num_classes == 10
