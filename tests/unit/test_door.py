"""The door: what the first exchange settles, and what does not get in."""

import pytest
import torch
from psl_flower.exchange.door import Door

from psl_flower.exchange import Answer
from psl_flower.protocol import Activations, Description, Gradients

NAN, INF = float("nan"), float("inf")


def activations(count, shape=(3,), dtype=torch.float32, step=7, labels=None):
    labels = torch.zeros(count, dtype=torch.int64) if labels is None else labels
    return answer(Activations((torch.ones(count, *shape, dtype=dtype),), labels, step))


def answer(reply):
    return Answer(reply, None, 0.1)


def failed(why):
    return Answer(None, why, 0.1)


def enter(door, answers, counts=None, step=7):
    return door.activations(answers, counts or dict.fromkeys(answers, 2), step)


def test_good_activations_pass_in_their_order():
    answers = {0: activations(2), 3: activations(5), 9: activations(1)}
    accepted, failures = enter(Door(), answers, {0: 2, 3: 5, 9: 1})
    assert list(accepted) == [0, 3, 9]
    assert accepted[3] is answers[3].reply
    assert failures == {}


def test_most_clients_settle_what_crosses_the_cut():
    answers = {0: activations(2, (4,)), 1: activations(2, (3,)), 2: activations(2, (3,))}
    accepted, failures = enter(Door(), answers)
    assert list(accepted) == [1, 2]
    assert failures == {0: "activations[0]: shape: expected (2, 3), got (2, 4)"}


def test_the_lowest_id_settles_a_draw():
    accepted, failures = enter(Door(), {4: activations(2, (4,)), 8: activations(2, (3,))})
    assert list(accepted) == [4]
    assert failures == {8: "activations[0]: shape: expected (2, 4), got (2, 3)"}


def test_what_was_settled_stays_until_more_clients_have_sent_something_else():
    door = Door()
    enter(door, {k: activations(2, (3,)) for k in range(3)})
    accepted, failures = enter(door, {k: activations(2, (4,)) for k in (3, 4)})
    assert accepted == {}
    assert set(failures.values()) == {"activations[0]: shape: expected (2, 3), got (2, 4)"}


def test_one_bad_reply_at_first_does_not_shut_the_others_out():
    door = Door()
    assert list(enter(door, {0: activations(2, (4,))})[0]) == [0]
    assert enter(door, {1: activations(2, (3,))})[0] == {}  # one against one
    accepted, failures = enter(door, {0: activations(2, (4,)), 1: activations(2, (3,)), 2: activations(2, (3,))})
    assert list(accepted) == [1, 2]
    assert failures == {0: "activations[0]: shape: expected (2, 3), got (2, 4)"}


def test_a_client_has_one_vote_what_it_sent_last():
    door = Door()
    enter(door, {0: activations(2, (4,))})
    for _ in range(3):
        enter(door, {0: activations(2, (4,))})
    assert list(enter(door, {0: activations(2, (3,))})[0]) == [0]  # nobody says otherwise


def test_what_the_server_half_cannot_use_is_forgotten():
    door = Door()
    enter(door, {0: activations(2, (4,))})
    door.forget([0])
    assert list(enter(door, {1: activations(2, (3,))})[0]) == [1]


def test_nothing_is_settled_while_nothing_passes():
    door = Door()
    assert enter(door, {0: activations(3, (3,)), 1: failed("gone")})[0] == {}  # a wrong count
    assert list(enter(door, {0: activations(2, (4,))})[0]) == [0]


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (activations(3), "activations[0]: shape: expected (2, 3), got (3, 3)"),
        (activations(2, (3, 1)), "activations[0]: shape: expected (2, 3), got (2, 3, 1)"),
        (activations(2, dtype=torch.float64), "activations[0]: dtype: expected torch.float32, got torch.float64"),
        (activations(2, step=6), "reply to another step: expected step 7, got 6"),
        (activations(2, step=None), "reply to another step: expected step 7, got None"),
        (activations(2, labels=torch.zeros(3, dtype=torch.int64)), "labels: shape: expected (2,), got (3,)"),
        (activations(2, labels=torch.zeros(2)), "labels: dtype: expected torch.int64, got torch.float32"),
        (
            answer(Activations((torch.ones(2, 3), torch.ones(2, 3)), torch.zeros(2, dtype=torch.int64), 7)),
            "activations: expected 1 tensors, got 2",
        ),
        (answer(Gradients({}, (), 7)), "expected Activations, got Gradients"),
        (answer(Description(0, 1, 1)), "expected Activations, got Description"),
        (failed("no reply within 5 s"), "no reply within 5 s"),
    ],
)
def test_what_differs_is_named(reply, message):
    accepted, failures = enter(Door(), {0: activations(2), 1: activations(2), 2: reply})
    assert list(accepted) == [0, 1]
    assert failures == {2: message}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_values_that_are_not_finite_are_refused_in_every_dtype(dtype, value):
    good = Activations((torch.ones(2, 50, dtype=dtype),), torch.zeros(2, dtype=torch.int64), 7)
    bad = Activations((good.tensors[0].clone(),), good.labels, 7)
    bad.tensors[0][1, 20] = value
    _, failures = enter(Door(), {0: answer(good), 1: answer(bad)})
    assert failures == {1: "activations[0]: expected finite values, got 1 NaN or infinite"}


def test_opposite_infinities_do_not_cancel():
    reply = Activations((torch.tensor([[INF], [-INF]]),), torch.zeros(2, dtype=torch.int64), 7)
    assert "got 2 NaN or infinite" in enter(Door(), {0: answer(reply)})[1][0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_finite_values_whose_sum_overflows_pass(dtype):
    tensor = torch.full((2, 100), torch.finfo(dtype).max, dtype=dtype)
    assert not torch.isfinite(tensor.sum())
    accepted, failures = enter(Door(), {0: answer(Activations((tensor,), torch.zeros(2, dtype=torch.int64), 7))})
    assert (list(accepted), failures) == ([0], {})


def test_labels_of_a_regression_must_be_finite():
    _, failures = enter(Door(), {0: activations(2, labels=torch.tensor([0.5, NAN]))})
    assert failures == {0: "labels: expected finite values, got 1 NaN or infinite"}


def test_integers_may_cross():
    reply = Activations((torch.ones(2, 3), torch.tensor([[1], [2]])), torch.zeros(2, dtype=torch.int64), 7)
    accepted, _ = enter(Door(), {0: answer(reply)})
    assert list(accepted) == [0]


def test_evaluation_names_no_step():
    door = Door()
    accepted, failures = door.activations({0: activations(2, step=None), 1: activations(2, step=3)}, {0: 2, 1: 2})
    assert (list(accepted), failures) == ([0], {1: "reply to another step: expected step None, got 3"})


# --- gradients -------------------------------------------------------------------------------------------------------
PARAMETERS = {"a": torch.ones(2, 3), "b": torch.ones(4)}
GOOD = {"a": torch.zeros(2, 3), "b": torch.zeros(4)}


def enter_gradients(reply):
    return Door().gradients({0: answer(Gradients(GOOD, (), 7)), 5: reply}, PARAMETERS, 7)


def test_good_gradients_pass():
    accepted, failures = enter_gradients(answer(Gradients({"b": torch.zeros(4)}, ("a",), 7)))
    assert (list(accepted), failures) == ([0, 5], {})


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (Gradients({"a": GOOD["a"]}, (), 7), "gradients: 1 missing, the first is 'b'"),
        (Gradients({}, (), 7), "gradients: 2 missing, the first is 'a'"),
        (Gradients({**GOOD, "z": torch.ones(1)}, (), 7), "gradients: 1 of unknown parameters, the first is 'z'"),
        (Gradients(GOOD, ("z",), 7), "gradients: 1 of unknown parameters, the first is 'z'"),
        (Gradients({**GOOD, "a": torch.ones(3, 2)}, (), 7), "gradient of 'a': shape: expected (2, 3), got (3, 2)"),
        (Gradients({**GOOD, "b": torch.ones(())}, (), 7), "gradient of 'b': shape: expected (4,), got ()"),
        (
            Gradients({**GOOD, "b": GOOD["b"].double()}, (), 7),
            "gradient of 'b': dtype: expected torch.float32, got torch.float64",
        ),
        (
            Gradients({**GOOD, "b": torch.tensor([1, INF, 1, NAN])}, (), 7),
            "gradient of 'b': expected finite values, got 2 NaN or infinite",
        ),
        (Gradients(GOOD, (), 8), "reply to another step: expected step 7, got 8"),
        (Gradients(GOOD), "reply to another step: expected step 7, got None"),
        (Activations((torch.ones(2, 3),), torch.ones(2), 7), "expected Gradients, got Activations"),
    ],
)
def test_what_differs_in_gradients_is_named(reply, message):
    accepted, failures = enter_gradients(answer(reply))
    assert (list(accepted), failures) == ([0], {5: message})


def test_a_client_that_failed_sends_no_gradients():
    assert enter_gradients(failed("error 0: OOM"))[1] == {5: "error 0: OOM"}
