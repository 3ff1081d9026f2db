"""Where a user's exception comes from: the last line that is the user's."""

import json
import signal
import sys

import pytest
import torch

from psl_flower.errors import ConfigError
from psl_flower.origin import let_signals_end, where
from psl_flower.tree import rows


def caught(function):
    try:
        function()
    except Exception as error:
        return where(error)
    raise AssertionError("nothing was raised")


def opens():
    raise OSError("cannot open img_0007.png")


def test_the_users_file_line_and_function():
    line = opens.__code__.co_firstlineno + 1
    assert caught(opens) == f"test_origin.py:{line} in opens: OSError: cannot open img_0007.png"


def test_libraries_and_the_package_are_passed_over():
    def multiplies():
        torch.nn.Linear(2, 2)(torch.zeros(3))

    def parses():
        json.loads("{")

    def breaks_a_rule():
        rows((), "x")

    for function, kind in ((multiplies, "RuntimeError"), (parses, "JSONDecodeError"), (breaks_a_rule, "ConfigError")):
        assert f"in {function.__name__}: {kind}: " in caught(function)


def test_without_a_line_of_the_users_there_is_the_text():
    assert where(ConfigError("bad")) == "ConfigError: bad"
    assert where(KeyError("missing")) == "KeyError: 'missing'"
    assert where(NotImplementedError()) == "NotImplementedError"


class Handler:
    """As of Flower: it puts the handler before it back, and exits in a function of its own."""

    def __call__(self, number, frame):
        signal.signal(number, signal.SIG_DFL)
        self.leave()

    def leave(self):
        sys.exit(3)


@pytest.mark.parametrize("handler", [lambda *_: sys.exit(3), Handler()])
def test_a_signal_whose_handler_exits_ends_the_process(handler):
    before = signal.signal(signal.SIGTERM, handler)
    try:
        signal.raise_signal(signal.SIGTERM)
    except SystemExit as error:
        with pytest.raises(SystemExit) as raised:
            let_signals_end(error)
        assert raised.value.code == 3
    finally:
        signal.signal(signal.SIGTERM, before)


def test_code_that_exits_ends_nothing():
    for function in (lambda: sys.exit(3), lambda frame=None: sys.exit("no data")):
        try:
            function()
        except SystemExit as error:
            let_signals_end(error)
