"""Where a user's exception comes from: the last line that is the user's."""

import json

import torch

from psl_flower.errors import ConfigError
from psl_flower.origin import where
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
