"""What model_fn and data_fn are called with."""

import functools
import logging

import pytest
from torch import nn

from psl_flower import split_client_app
from psl_flower.client.factory import _call
from psl_flower.data.telling import tell_once


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


def test_a_loss_that_clients_do_not_use_is_told_of(caplog):
    tell_once.cache_clear()
    own = nn.CrossEntropyLoss(label_smoothing=0.1)
    with caplog.at_level(logging.WARNING, "flwr.psl_flower"):
        for options in ({}, {"loss": own, "tail": "2"}, {"loss": own, "method": lambda context: "parallel"}):
            split_client_app(nn.Sequential, cut="1", data_fn=lambda context: None, **options)
        assert not caplog.records
        split_client_app(nn.Sequential, cut="1", data_fn=lambda context: None, loss=own)
    (record,) = caplog.records
    assert (
        "clients do not use with method 'parallel': the server's counts, ParallelSplitLearning(..., loss=" in record.msg
    )
