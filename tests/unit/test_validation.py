"""What is let in: what the first exchange settles, and what does not get past."""

from typing import ClassVar

import numpy as np
import pytest
import torch

from psl_flower import tree
from psl_flower.exchange.validation import Validator
from psl_flower.failures import Failure
from psl_flower.failures import Kind as FailureKind
from psl_flower.methods import EACH, ROWS, SUM, ParallelSplit, SplitMethod, stage
from psl_flower.protocol import Leaf, Orders, Part, Reply, Request

NAN, INF = float("nan"), float("inf")
FORWARD, BACKWARD = ParallelSplit.forward.stage, ParallelSplit.backward.stage


def request(stage, counts, step=7):
    clients = np.array(sorted(counts))
    numbers = np.array([counts[int(c)] for c in clients])
    orders = Orders(clients=clients, starts=numbers * 0, counts=numbers, step=step)
    return Request(stage=stage.name, nodes=tuple(clients.tolist()), orders=orders)


def sent(*nodes, count=2, shape=(3,), dtype=torch.float32, step=7, labels=None, tensors=None):
    """Return a part with rows of clients, `count` of each."""
    n = count * len(nodes)
    x = (torch.ones(n, *shape, dtype=dtype),) if tensors is None else tensors
    y = torch.zeros(n, dtype=torch.int64) if labels is None else labels
    return Part(nodes, {"activations": Leaf(ROWS, x), "labels": Leaf(ROWS, y)}, step)


def enter(validator, *parts, failures=None, count=2, step=7):
    """Return the clients whose rows pass, in the order of the parts, and what is wrong with the others."""
    counts = dict.fromkeys([*(node for part in parts for node in part.nodes), *(failures or {})], count)
    reply = Reply(list(parts), failures or {})
    checked = validator.check(FORWARD, request(FORWARD, counts, step), reply, {})
    for part in checked.parts:
        assert all(len(leaf) == count * len(part.nodes) for leaf in tree.leaves(part.outputs["activations"].value))
    return [node for part in checked.parts for node in part.nodes], checked.failures


def texts(failures):
    return {client: failure.detail for client, failure in failures.items()}


ALIKE = "; rows must be of one shape at all clients"
SHAPE_4 = "activations[0]: shape: expected (3,) a row, got (4,)" + ALIKE


# --- rows ------------------------------------------------------------------------------------------------------------
def test_good_rows_pass_as_they_are():
    parts = [sent(0), sent(3, 9)]
    checked = Validator().check(FORWARD, request(FORWARD, {0: 2, 3: 2, 9: 2}), Reply(parts), {})
    assert checked.parts == parts
    assert checked.failures == {}


def test_most_clients_settle_what_crosses_the_cut():
    passed, failures = enter(Validator(), sent(0, shape=(4,)), sent(1), sent(2))
    assert passed == [1, 2]
    assert failures == {0: Failure(FailureKind.SHAPE, SHAPE_4)}


def test_clients_that_answer_together_have_a_vote_each():
    passed, failures = enter(Validator(), sent(0, shape=(4,)), sent(1, 2))
    assert passed == [1, 2]
    assert texts(failures) == {0: SHAPE_4}


def test_texts_may_differ_in_length_and_in_nothing_else():
    parts = [
        sent(0, shape=(5, 3)),
        sent(1, shape=(9, 3)),
        sent(2, shape=(5, 4)),
        sent(3, shape=(5,)),
        sent(4, shape=(10, 3)),
    ]
    passed, failures = enter(Validator(longest=9), *parts)
    assert passed == [0, 1]
    assert texts(failures) == {
        2: "activations[0]: shape: expected (-1, 3) a row, got (-1, 4)" + ALIKE,
        3: "activations[0]: shape: expected (-1, 3) a row, got (-1,)" + ALIKE,
        4: "activations[0]: texts of at most 9 positions, the model's max_position_embeddings, got 10: cut them where "
        "they are tokenized",
    }
    assert enter(Validator(longest=INF), *parts)[0] == [0, 1, 4]
    assert enter(Validator(), *parts[:2])[0] == [0]


def test_the_first_settles_a_draw():
    passed, failures = enter(Validator(), sent(4), sent(8, shape=(4,)))
    assert passed == [4]
    assert texts(failures) == {8: SHAPE_4}


def test_what_was_settled_stays_until_more_clients_have_sent_something_else():
    validator = Validator()
    enter(validator, *(sent(k) for k in range(3)))
    passed, failures = enter(validator, *(sent(k, shape=(4,)) for k in (3, 4)))
    assert passed == []
    assert texts(failures) == {3: SHAPE_4, 4: SHAPE_4}


def test_one_bad_reply_at_first_does_not_shut_the_others_out():
    validator = Validator()
    assert enter(validator, sent(0, shape=(4,)))[0] == [0]
    assert enter(validator, sent(1))[0] == []  # one against one
    passed, failures = enter(validator, sent(0, shape=(4,)), sent(1), sent(2))
    assert passed == [1, 2]
    assert texts(failures) == {0: SHAPE_4}


def test_a_client_has_one_vote_what_it_sent_last():
    validator = Validator()
    for _ in range(4):
        enter(validator, sent(0, shape=(4,)))
    assert enter(validator, sent(0))[0] == [0]  # nobody says otherwise


def test_what_the_server_part_cannot_use_is_forgotten():
    validator = Validator()
    enter(validator, sent(0, shape=(4,)))
    validator.forget([0])
    assert enter(validator, sent(1))[0] == [1]


def test_nothing_is_settled_while_nothing_passes():
    validator = Validator()
    poisoned = sent(0, tensors=(torch.full((2, 3), NAN),))
    assert enter(validator, poisoned, failures={1: Failure(FailureKind.TIMEOUT, "gone")})[0] == []
    assert enter(validator, sent(0, shape=(4,)))[0] == [0]


@pytest.mark.parametrize(
    ("part", "kind", "message"),
    [
        (sent(2, shape=(3, 1)), FailureKind.SHAPE, "activations[0]: shape: expected (3,) a row, got (3, 1)" + ALIKE),
        (
            sent(2, dtype=torch.float64),
            FailureKind.DTYPE,
            "activations[0]: dtype: expected torch.float32, got torch.float64",
        ),
        (sent(2, step=6), FailureKind.STEP, "reply to another step: expected step 7, got 6"),
        (sent(2, step=None), FailureKind.STEP, "reply to another step: expected step 7, got None"),
        (
            sent(2, labels=torch.zeros(2, 1, dtype=torch.int64)),
            FailureKind.SHAPE,
            "labels: shape: expected () a row, got (1,)" + ALIKE,
        ),
        (sent(2, labels=torch.zeros(2)), FailureKind.DTYPE, "labels: dtype: expected torch.int64, got torch.float32"),
        (sent(2, tensors=(torch.ones(2, 3),) * 2), FailureKind.NAMES, "expected 2 tensors as of the others, got 3"),
        (sent(2, tensors=()), FailureKind.NAMES, "activations[0]: expected as of the others, got labels"),
        (
            sent(2, tensors={"x": torch.ones(2, 3)}),
            FailureKind.NAMES,
            "activations[0]: expected as of the others, got activations['x'], labels",
        ),
        (
            Part((2,), {"head": Leaf(SUM, {})}, 7),
            FailureKind.MALFORMED,
            "forward gives activations (rows), labels (rows), got head (sum)",
        ),
        (Part((2,), {}, 7), FailureKind.MALFORMED, "forward gives activations (rows), labels (rows), got nothing"),
        (
            Part((2,), {**sent(2).outputs, "labels": Leaf(EACH, [torch.zeros(2)])}, 7),
            FailureKind.MALFORMED,
            "forward gives activations (rows), labels (rows), got activations (rows), labels (each)",
        ),
    ],
)
def test_what_differs_is_named(part, kind, message):
    passed, failures = enter(Validator(), sent(0), sent(1), part)
    assert passed == [0, 1]
    assert failures == {2: Failure(kind, message)}


def test_those_that_failed_before_are_named_too():
    gone = Failure(FailureKind.TIMEOUT, "no reply within 5 s")
    assert enter(Validator(), sent(0), failures={2: gone}) == ([0], {2: gone})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_values_that_are_not_finite_are_refused_in_every_dtype(dtype, value):
    bad = torch.ones(2, 50, dtype=dtype)
    bad[1, 20] = value
    passed, failures = enter(Validator(), sent(0, shape=(50,), dtype=dtype), sent(1, tensors=(bad,)))
    assert passed == [0]
    assert failures == {
        1: Failure(FailureKind.NOT_FINITE, "activations[0]: expected finite values, got 1 NaN or infinite")
    }


def test_of_clients_that_answer_together_only_the_guilty_are_refused():
    x = torch.arange(18.0).reshape(6, 3)
    x[2, 1] = NAN
    y = torch.arange(6)
    part = Part(
        (4, 5, 8), {"activations": Leaf(ROWS, (x,)), "labels": Leaf(ROWS, y, exact=True)}, 7, np.array([14, 15, 18])
    )
    checked = Validator().check(FORWARD, request(FORWARD, {4: 2, 5: 2, 8: 2}), Reply([part]), {})
    (kept,) = checked.parts
    assert kept.nodes == (4, 8)
    rest = [0, 1, 4, 5]
    assert torch.equal(kept.outputs["activations"].value[0], x[rest])
    assert kept.outputs["labels"].value.tolist() == rest
    assert kept.outputs["labels"].exact
    assert kept.checksums.tolist() == [14, 18]
    assert texts(checked.failures) == {5: "activations[0]: expected finite values, got 1 NaN or infinite"}


def test_opposite_infinities_do_not_cancel():
    _, failures = enter(Validator(), sent(0, tensors=(torch.tensor([[INF], [-INF]]),)))
    assert "got 2 NaN or infinite" in failures[0].detail


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_finite_values_whose_sum_overflows_pass(dtype):
    tensor = torch.full((2, 100), torch.finfo(dtype).max, dtype=dtype)
    assert not torch.isfinite(tensor.sum())
    assert enter(Validator(), sent(0, tensors=(tensor,))) == ([0], {})


def test_labels_of_a_regression_must_be_finite():
    _, failures = enter(Validator(), sent(0, labels=torch.tensor([0.5, NAN])))
    assert texts(failures) == {0: "labels: expected finite values, got 1 NaN or infinite"}


def test_integers_may_cross():
    assert enter(Validator(), sent(0, tensors=(torch.ones(2, 3), torch.tensor([[1], [2]]))))[0] == [0]


def test_stages_are_voted_on_apart():
    class Two(SplitMethod):
        name = "two"
        parts: ClassVar = {}

        @stage(outputs={"x": ROWS})
        def narrow(self, client, batch):
            pass

        @stage(outputs={"x": ROWS})
        def wide(self, client, batch):
            pass

        step = evaluate = None

    validator = Validator()
    for each, width in ((Two.narrow.stage, 3), (Two.wide.stage, 5), (Two.narrow.stage, 3)):
        part = Part((0,), {"x": Leaf(ROWS, torch.ones(2, width))}, 7)
        assert validator.check(each, request(each, {0: 2}), Reply([part]), {}).parts == [part]


class Personal(SplitMethod):
    name = "personal"
    parts: ClassVar = {}

    @stage(outputs={"own": EACH})
    def tell(self, client, batch):
        pass

    step = evaluate = None


def enter_each(*values):
    parts = [Part(nodes, {"own": Leaf(EACH, list(each))}, 7) for nodes, each in values]
    counts = {node: 1 for part in parts for node in part.nodes}
    checked = Validator().check(Personal.tell.stage, request(Personal.tell.stage, counts), Reply(parts), {})
    return {n: v for part in checked.parts for n, v in zip(part.nodes, part.outputs["own"].value, strict=True)}, (
        checked.failures
    )


def test_what_is_each_clients_is_looked_at_one_by_one():
    good, bad = {"a": torch.ones(2)}, {"a": torch.tensor([1.0, NAN])}
    passed, failures = enter_each(((0,), [good]), ((4, 5, 6), [good, bad, good]))
    assert list(passed) == [0, 4, 6]
    assert failures == {
        5: Failure(FailureKind.NOT_FINITE, "own['a']: expected finite values, got 1 NaN or infinite"),
    }


def test_what_is_each_clients_must_be_alike():
    good, wide = (torch.ones(2),), (torch.ones(3),)
    passed, failures = enter_each(((0, 1), [good, good]), ((2,), [wide]), ((3, 4), [good, wide]))
    assert list(passed) == [0, 1]
    assert {client: failure.kind for client, failure in failures.items()} == dict.fromkeys((2, 3, 4), FailureKind.SHAPE)


# --- sums ------------------------------------------------------------------------------------------------------------
PARAMETERS = {"head": {"a": torch.ones(2, 3), "b": torch.ones(4)}}
GOOD = {"a": torch.zeros(2, 3), "b": torch.zeros(4)}


def enter_sums(*parts, stage=BACKWARD, expected=PARAMETERS):
    counts = {node: 1 for part in parts for node in part.nodes}
    checked = Validator().check(stage, request(stage, counts), Reply(list(parts)), expected)
    return [part.nodes for part in checked.parts], checked.failures


def gradients(*nodes, value, step=7):
    return Part(nodes, {"head": Leaf(SUM, value)}, step)


def test_good_sums_pass():
    passed, failures = enter_sums(gradients(0, value=GOOD), gradients(5, 6, value={"b": torch.zeros(4), "a": None}))
    assert (passed, failures) == ([(0,), (5, 6)], {})


@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
        ({"a": GOOD["a"]}, FailureKind.NAMES, "head: 1 missing, the first is 'b'"),
        ({}, FailureKind.NAMES, "head: 2 missing, the first is 'a'"),
        ({**GOOD, "z": torch.ones(1)}, FailureKind.NAMES, "head: 1 of unknown name, the first is 'z'"),
        ({**GOOD, "z": None}, FailureKind.NAMES, "head: 1 of unknown name, the first is 'z'"),
        ({**GOOD, "a": (GOOD["a"],)}, FailureKind.NAMES, "head of 'a': expected a tensor, got a tree"),
        ((GOOD["a"], GOOD["b"]), FailureKind.MALFORMED, "head: expected tensors by name"),
        (None, FailureKind.MALFORMED, "head: expected tensors by name"),
        ({**GOOD, "a": torch.ones(3, 2)}, FailureKind.SHAPE, "head of 'a': shape: expected (2, 3), got (3, 2)"),
        ({**GOOD, "b": torch.ones(())}, FailureKind.SHAPE, "head of 'b': shape: expected (4,), got ()"),
        (
            {**GOOD, "b": GOOD["b"].double()},
            FailureKind.DTYPE,
            "head of 'b': dtype: expected torch.float32, got torch.float64",
        ),
        (
            {**GOOD, "b": torch.tensor([1, INF, 1, NAN])},
            FailureKind.NOT_FINITE,
            "head of 'b': expected finite values, got 2 NaN or infinite",
        ),
    ],
)
def test_what_differs_in_a_sum_is_named_for_all_it_is_of(value, kind, message):
    passed, failures = enter_sums(gradients(0, value=GOOD), gradients(5, 6, value=value))
    assert passed == [(0,)]
    assert failures == dict.fromkeys((5, 6), Failure(kind, message, joint=True))


@pytest.mark.parametrize("step", [8, None])
def test_a_sum_of_another_step_is_refused(step):
    passed, failures = enter_sums(gradients(0, value=GOOD), gradients(5, value=GOOD, step=step))
    assert passed == [(0,)]
    assert texts(failures) == {5: f"reply to another step: expected step 7, got {step}"}


def test_a_sum_that_nothing_is_known_of_must_be_finite_and_alike():
    parts = [
        gradients(0, value=GOOD),
        gradients(1, value=GOOD),
        gradients(2, 3, value={**GOOD, "b": torch.full((4,), NAN)}),
        gradients(4, value={**GOOD, "b": torch.zeros(5)}),
    ]
    passed, failures = enter_sums(*parts, expected={})
    assert passed == [(0,), (1,)]
    assert {client: failure.kind for client, failure in failures.items()} == {
        2: FailureKind.NOT_FINITE,
        3: FailureKind.NOT_FINITE,
        4: FailureKind.SHAPE,
    }
