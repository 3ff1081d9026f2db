"""One mistake is one message, however many clients make it."""

import pytest

from psl_flower.errors import DivergenceError, StepError
from psl_flower.failures import Failure, Kind, alike, failure_lines, likeness, without_values


def name(client):
    return f"client {client} (node {client + 10})"


def raised(text):
    return Failure(Kind.RAISED, text)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("img_7.png is missing", "img_1234.png is missing"),
        ("labels from 0 to 9, got 10", "labels from 0 to 9, got 12, 17, ..."),
        ("<Net object at 0x7fe3>", "<Net object at 0xa01b22>"),
        ("norm -1.5e-07", "norm 3"),
        ("KeyError: 'x'", 'KeyError: "a client\'s"'),
    ],
)
def test_numbers_make_no_difference(one, other):
    assert likeness(one) == likeness(other)
    assert alike([raised(one), raised(other)])


def test_what_is_another_mistake():
    assert not alike([raised("KeyError: 'x'"), raised("ValueError: 'x'")])
    assert not alike([raised("the same"), Failure(Kind.TIMEOUT, "the same")])
    assert alike([raised("one")])


def test_each_mistake_is_told_once_with_the_first_client_that_made_it():
    failures = {5: raised("no img_5.png"), 2: raised("no img_2.png"), 9: raised("KeyError: 'x'"), 7: raised("no img_7")}
    assert failure_lines(failures, name) == [
        "client 2 (node 12) and 1 other likewise: no img_2.png",
        "client 7 (node 17): no img_7",
        "client 9 (node 19): KeyError: 'x'",
    ]
    assert failure_lines(dict.fromkeys(range(4), raised("a bug")), name) == [
        "client 0 (node 10) and 3 others likewise: a bug"
    ]


def test_a_step_error_names_its_clients_as_the_run_calls_them():
    error = StepError("2 of 3 clients failed", {1: raised("a bug"), 2: raised("a bug")})
    assert str(error) == "2 of 3 clients failed\n  client 1 and 1 other likewise: a bug"
    with pytest.raises(DivergenceError) as caught, StepError.located("round 1, step 4", name):
        raise DivergenceError("it is NaN", {1: raised("a bug")})
    assert str(caught.value) == "round 1, step 4: it is NaN\n  client 1 (node 11): a bug"
    assert list(caught.value.failures) == [1]


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("data.py:31 in label_of: KeyError: 'malignant'", "data.py:31 in label_of: KeyError: '...'"),
        ("data.py:31 in label_of: KeyError: 7", "data.py:31 in label_of: KeyError: ..."),
        (
            "row[1] is the string 'cat' in example 4; map labels",
            "row[1] is the string '...' in example ...; map labels",
        ),
        ("got -1.5", "got ..."),
        ("expected float32 (8,), got int64 (9,)", "expected float32 (8,), got int64 (9,)"),
    ],
)
def test_values_are_left_out(text, left):
    assert without_values(text) == left
