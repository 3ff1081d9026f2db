"""Trees of any shape: joining and splitting are inverse, and a structure survives JSON."""

import json

import torch
from hypothesis import given
from hypothesis import strategies as st

from psl_flower import tree

STRUCTURES = st.recursive(
    st.none(),
    lambda part: st.lists(part, min_size=1, max_size=3) | st.dictionaries(st.text(max_size=2), part, min_size=1),
    max_leaves=8,
)


@given(STRUCTURES, st.lists(st.integers(0, 3), min_size=1, max_size=4))
def test_join_and_split_are_inverse(structure, counts):
    width = count(structure)
    whole = tree.build(structure, [torch.rand(sum(counts), i) for i in range(width)])
    parts = tree.split(whole, counts, "x")
    assert [tree.rows(part, "x") for part in parts] == counts
    again = tree.join(parts, "x")
    assert tree.structure(again) == tree.structure(whole) == json.loads(json.dumps(structure))
    assert all(map(torch.equal, tree.leaves(again), tree.leaves(whole)))
    assert len(set(tree.paths(whole, "x"))) == width


def count(structure):
    if structure is None:
        return 1
    return sum(map(count, structure.values() if isinstance(structure, dict) else structure))
