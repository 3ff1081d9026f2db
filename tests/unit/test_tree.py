"""Trees: leaves in one order on both ends, joined and split by rows, differences named by path."""

import json
from collections import UserDict

import numpy as np
import pytest
import torch

from psl_flower import tree
from psl_flower.errors import ConfigError


def batch(n, offset=0):
    x = torch.arange(n * 2, dtype=torch.float32).reshape(n, 2) + offset
    return {"b": (x, x[:, 0].long()), "a": x + 1}


def test_leaves_come_in_ascending_key_order_whatever_the_order_of_filling():
    one = batch(3)
    other = {key: one[key] for key in sorted(one)}
    assert list(one) != list(other)
    for a, b in zip(tree.leaves(one), tree.leaves(other), strict=True):
        assert a is b
    assert tree.paths(one, "inputs") == ["inputs['a']", "inputs['b'][0]", "inputs['b'][1]"]


def test_structure_survives_json_and_builds_the_same_tree():
    one = batch(3)
    told = json.loads(json.dumps(tree.structure(one)))
    assert told == {"a": None, "b": [None, None]}
    again = tree.build(told, tree.leaves(one))
    assert again["b"][1] is one["b"][1]
    assert isinstance(again["b"], tuple)


@pytest.mark.parametrize(
    ("structure", "count", "message"),
    [([None, None], 1, "more leaves than were given"), ([None], 2, "fewer leaves than the 2"), (["x"], 1, "holds 'x'")],
)
def test_a_structure_that_does_not_fit_is_refused(structure, count, message):
    with pytest.raises(ConfigError, match=message):
        tree.build(structure, [torch.zeros(1)] * count)


def test_join_and_split_are_inverse_with_empty_and_permuted_parts():
    parts = [batch(2), batch(0), dict(reversed(batch(3, 50).items()))]
    whole = tree.join(parts, "inputs")
    assert tree.rows(whole, "inputs") == 5
    for part, again in zip(parts, tree.split(whole, [2, 0, 3], "inputs"), strict=True):
        for a, b in zip(tree.leaves(part), tree.leaves(again), strict=True):
            assert torch.equal(a, b)
    assert tree.join(parts[:1], "inputs") is parts[0]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"a": torch.zeros(1, 2)}, r"client 4 has x\['a'\], x\['b'\]; client 7 has x\['a'\]"),
        (
            {"a": torch.zeros(1, 3), "b": torch.zeros(1)},
            r"x\['a'\] must be alike .* client 4 has float32 \(2, 2\), client 7 has float32 \(1, 3\)",
        ),
        ({"a": torch.zeros(1, 2), "b": torch.zeros(1).long()}, r"x\['b'\] must be alike .* client 7 has int64 \(1,\)"),
    ],
)
def test_parts_that_differ_are_refused_with_leaf_and_owners(other, message):
    one = {"a": torch.zeros(2, 2), "b": torch.zeros(2)}
    with pytest.raises(ConfigError, match=message):
        tree.join([one, other], "x", of=["client 4", "client 7"])


def test_nothing_to_join_and_counts_that_do_not_add_up():
    with pytest.raises(ConfigError, match="at least one tree of x"):
        tree.join([], "x")
    for counts in ([1, 1], [4, -1]):
        with pytest.raises(ConfigError, match="x of 3 rows cannot be split"):
            tree.split(torch.zeros(3), counts, "x")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ((), "x must hold at least one tensor"),
        ({"a": torch.zeros(3), "b": torch.zeros(())}, r"x\['b'\] has no dimension"),
        ((torch.zeros(3), torch.zeros(2, 5)), r"x\[0\] has 3 rows, x\[1\] has 2 float32 \(2, 5\)"),
    ],
)
def test_leaves_must_agree_in_their_rows(value, message):
    with pytest.raises(ConfigError, match=message):
        tree.rows(value, "x")


def test_what_code_returns_becomes_a_tree():
    read_only = np.arange(3.0)
    read_only.flags.writeable = False
    found = tree.as_tree(UserDict(z=[1, 2], a=[torch.ones(2), read_only], n=[np.float32(1), np.float32(2)]), "x")
    assert list(found) == ["a", "n", "z"]
    assert isinstance(found["a"], tuple)
    assert (found["z"].dtype, found["n"].dtype) == (torch.int64, torch.float32)
    found["a"][1].add_(1)
    assert read_only.tolist() == [0, 1, 2]
    assert tree.as_tree(np.arange(3)[::-1], "x").tolist() == [2, 1, 0]
    assert tree.as_tree(np.arange(2, dtype=np.uint8), "x").dtype == torch.uint8


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": ["cat"]}, r"x\['a'\]\[0\] must be a tensor, .* got 'cat' \(a str\)"),
        ((None,), r"x\[0\] must be a tensor, .* got None"),
        ({1: torch.ones(1)}, "keys of x must be strings, got 1"),
    ],
)
def test_other_leaves_are_refused_by_path(value, message):
    with pytest.raises(ConfigError, match=message):
        tree.as_tree(value, "x")


def test_map_goes_over_several_trees():
    summed = tree.map_leaves(torch.add, batch(2), batch(2, 10))
    assert torch.equal(summed["b"][0], 2 * batch(2)["b"][0] + 10)
