"""What is classification and what is not, and metrics as sums over examples."""

import copy
import logging
import math
import re
from collections import namedtuple

import pytest
import torch

from psl_flower import checkpoint
from psl_flower.errors import ConfigError
from psl_flower.server import Predictions, Scores, check_metrics, classes_of, why_no_accuracy, wrong_rows
from psl_flower.torchvision_compat import import_torchvision


def ints(*shape):
    return torch.zeros(shape, dtype=torch.long)


@pytest.mark.parametrize(
    ("outputs", "labels", "classes"),
    [
        ((6, 3), ints(6), 3),
        ((3, 3), ints(3), 3),
        ((2, 5, 4, 4), ints(2, 4, 4), 5),
        ((2, 5, 7), ints(2, 7), 5),
        ((6, 3), ints(6).to(torch.uint8), 3),
        ((6, 3), torch.zeros(6), None),  # regression
        ((6, 2), torch.zeros(6, dtype=torch.bool), None),
        ((6, 3), ints(6, 3), None),  # several labels a row
        ((5, 5), ints(5, 5), None),  # the same, as many rows as labels
        ((6, 1), ints(6), None),  # one logit
        ((6,), ints(6), None),
        ((6, 1), ints(6, 1), None),
        ((2, 7, 5), ints(2, 7), None),  # classes last
        ((2, 7, 7), ints(2, 7), None),  # classes first or last
        ((6, 3), ints(5), None),
        ((6, 3), {"labels": ints(6)}, None),
    ],
)
def test_shapes_tell_what_is_classification(outputs, labels, classes):
    assert classes_of(torch.zeros(outputs), labels) == classes


Named = namedtuple("Named", ["logits", "aux_logits"])


class ModelOutput(dict):
    """As Hugging Face's: a dict whose keys are attributes, too."""

    logits = property(lambda self: self["logits"])


def test_outputs_that_are_more_than_a_tensor():
    logits, other = torch.zeros(6, 3), torch.zeros(6, 8)
    for outputs in ({"logits": logits, "hidden": other}, ModelOutput(logits=logits), Named(logits, other), (logits,)):
        assert classes_of(outputs, ints(6)) == 3
    for outputs in ({"prediction": logits}, (logits, other), "text", None):
        assert classes_of(outputs, ints(6)) is None
        assert Predictions.of(outputs, ints(6)) is None


def test_what_is_ignored_neither_counts_nor_is_wrong():
    logits = torch.eye(3)[[0, 1, 2, 0]]
    labels = torch.tensor([0, 2, -100, -100])
    predictions = Predictions.of(logits, labels)
    assert predictions.score() == (1, 2)
    assert predictions.class_counts().tolist() == [1, 0, 1]
    assert wrong_rows(labels, 3) == ([], "")
    assert wrong_rows(torch.tensor([[0, 255], [255, 2]]), 3, 255) == ([], "")


def test_wrong_labels_are_found_by_row():
    rows, text = wrong_rows(torch.tensor([[0, 1], [3, 1], [2, -1], [3, 3]]), 3)
    assert rows == [1, 2, 3]
    assert "from 0 to 2" in text
    assert "got -1, 3: number the classes from 0" in text
    assert "got 10, 11, 12, 13, 14, ...:" in wrong_rows(torch.arange(20), 10)[1]


def test_a_sentence_says_why_there_is_no_accuracy():
    text = why_no_accuracy(torch.zeros(6, 1), ints(6))
    assert "got outputs (n, 1) and labels (n) of torch.int64: pass metrics={'name': function" in text
    assert "got outputs a tuple and labels a dict" in why_no_accuracy((1, 2), {})


# --- sums over examples ----------------------------------------------------------------------------------------------
SIZES = [3, 1, 5]
OUTPUTS = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 3, -100, -100, 2, 0, 1])


def parts():
    return zip(OUTPUTS.split(SIZES), LABELS.split(SIZES), strict=True)


def add(scores, outputs, labels, loss=(0.0, 0.0)):
    scores.add(outputs, labels, len(labels), loss=loss, score=Predictions(outputs, labels).score())


def gap(outputs, labels):
    return (outputs.mean(1) - labels.float()).abs().mean()


class Highest:
    """As an object of torchmetrics: what it tells is no mean of means."""

    def __init__(self):
        self.reset()

    def reset(self):
        self.value, self.metric_state, self._update_count = torch.tensor(-9.0), {}, 0

    def update(self, outputs, labels):
        self.value = torch.maximum(self.value, outputs.max())

    def compute(self):
        return self.value


def test_of_one_model_a_metric_is_given_all_at_once_where_rows_can_be_joined():
    def spread(outputs, labels):
        outputs = outputs["logits"] if isinstance(outputs, dict) else outputs.logits
        return outputs.std() * (labels >= 0).sum()

    Object = namedtuple("Object", "logits")
    for kind, exact in ((dict, True), (Object, False)):
        scores = Scores({"spread": spread}, one_model=True)
        for outputs, labels in parts():
            scores.add(kind(logits=outputs), labels, len(labels), loss=(0.0, 1.0), score=None)
        whole = spread({"logits": OUTPUTS}, LABELS).item()
        assert (scores.result()["spread"] == pytest.approx(whole)) is exact


def test_a_metric_that_is_no_mean_is_told_once(caplog, monkeypatch):
    monkeypatch.setattr("psl_flower.server.metrics._MOST_HELD", 0)

    def root(outputs, labels):
        return gap(outputs, labels).sqrt()

    for one_model, told in ((False, 0), (True, 1), (True, 1)):
        scores = Scores({"root of gap": root, "gap": gap}, one_model=one_model)
        for outputs, labels in parts():
            add(scores, outputs, labels)
        assert [text[:49] for text in caplog.messages] == ["metrics['root of gap'] is no mean over examples: "] * told


def test_what_a_metric_collects_it_is_given_once(monkeypatch):
    """The look whether it is a mean would show it rows again."""
    monkeypatch.setattr("psl_flower.server.metrics._MOST_HELD", 0)
    seen = []

    class Collecting:
        def __init__(self):
            self.seen = []

        def __call__(self, outputs, _):
            self.seen.append(outputs)
            return 0.0

    mine = Collecting()
    metrics = {"function": lambda outputs, _: float(seen.append(outputs) or 0), "object": mine}
    scores = Scores(metrics, one_model=True)
    for outputs, labels in parts():
        add(scores, outputs, labels)
    assert sum(map(len, seen)) == sum(map(len, mine.seen)) == len(OUTPUTS)


def test_a_metric_of_one_part_may_be_any(caplog):
    scores = Scores({"spread": lambda outputs, _: outputs.std()}, one_model=True)
    add(scores, OUTPUTS, LABELS)
    assert scores.result()["spread"] == pytest.approx(OUTPUTS.std().item())
    assert not caplog.messages


def test_parts_are_told_as_the_whole_is():
    scores = Scores({"gap": gap, "highest": Highest()})
    assert scores.result() == {}
    for (outputs, labels), loss in zip(parts(), [(3.0, 3), (0.0, 0), (10.0, 2)], strict=True):
        add(scores, outputs, labels, loss)
    counted = LABELS != -100
    expected = {
        "loss": 13 / 5,
        "accuracy": float((OUTPUTS.argmax(1) == LABELS)[counted].float().mean()),
        "gap": gap(OUTPUTS, LABELS).item(),
        "highest": OUTPUTS.max().item(),
    }
    assert scores.result() == pytest.approx(expected, rel=1e-6)
    assert 0 < expected["accuracy"] < 1
    scores.reset()
    add(scores, OUTPUTS[:1] - 9, LABELS[:1], (1.0, 1))
    assert scores.result()["highest"] < 0
    assert scores.result()["loss"] == 1


def test_one_part_that_is_no_classification_leaves_no_accuracy():
    scores = Scores()
    add(scores, OUTPUTS, LABELS)
    scores.add(OUTPUTS, LABELS, 9, loss=(1.0, 1), score=None)
    assert list(scores.result()) == ["loss"]


def test_a_part_where_a_metric_has_nothing_to_count_changes_nothing():
    scores = Scores({"m": lambda o, y: o[y != -100].mean()})
    add(scores, OUTPUTS[4:6], LABELS[4:6])
    assert str(scores.result()["m"]) == "nan"
    add(scores, OUTPUTS[:3], LABELS[:3])
    assert scores.result()["m"] == pytest.approx(OUTPUTS[:3].mean().item())


@pytest.mark.parametrize("metric", [lambda o, y: 0.25, Highest()])
def test_a_metric_of_the_users_called_accuracy_takes_the_place_of_ours(metric):
    scores = Scores({"accuracy": metric})
    scores.add(OUTPUTS, LABELS, 9, loss=(1.0, 1), score=None)
    expected = OUTPUTS.max().item() if isinstance(metric, Highest) else 0.25
    assert scores.result()["accuracy"] == pytest.approx(expected)


def test_the_users_object_is_left_alone_and_logits_reach_it():
    mine = Highest()
    scores = Scores({"highest": mine})
    scores.add({"logits": OUTPUTS}, LABELS, 9, loss=(1.0, 1), score=None)
    assert mine.value == -9
    assert scores.result()["highest"] == pytest.approx(OUTPUTS.max().item())


def test_scores_go_on_where_they_were(tmp_path):
    whole, first, second = (Scores({"gap": gap}) for _ in range(3))
    every = list(parts())
    for outputs, labels in every:
        add(whole, outputs, labels, (1.0, 2))
    add(first, *every[0], (1.0, 2))
    checkpoint.write(tmp_path / "file", {"version": checkpoint.VERSION, "scores": first.state_dict()})
    second.load_state_dict(checkpoint.read(tmp_path / "file")["scores"])
    for outputs, labels in every[1:]:
        add(second, outputs, labels, (1.0, 2))
    assert second.result() == whole.result()


def test_torchmetrics(tmp_path, caplog):
    import_torchvision()  # torchmetrics imports it where it is installed
    torchmetrics = pytest.importorskip("torchmetrics")
    metric = torchmetrics.classification.MulticlassF1Score(4, average="macro", ignore_index=-100)
    whole, second = Scores({"f1": metric}), Scores({"f1": metric})
    every = list(parts())
    for outputs, labels in every[:2]:
        add(whole, outputs, labels)
    tree = {"version": checkpoint.VERSION, "scores": copy.deepcopy(whole.state_dict())}
    checkpoint.write(tmp_path / "file", tree)
    second.load_state_dict(checkpoint.read(tmp_path / "file")["scores"])
    with caplog.at_level(logging.WARNING):
        for scores in (whole, second):
            add(scores, *every[2])
            assert scores.result()["f1"] == pytest.approx(metric(OUTPUTS, LABELS).item())


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [
        ([gap], "metrics must be a dict of names to functions"),
        ({"loss": gap}, "other than loss and num_examples, got 'loss'"),
        ({3: gap}, "a metric's name must be text"),
        (
            {"f1": 0.5},
            r"metrics\['f1'\] must be a function of \(outputs, labels\), or an object .* got 0.5",
        ),
        ({"f1": Highest}, r"metrics\['f1'\] must be .* got <class"),
    ],
)
def test_what_is_no_metric_is_refused(metrics, expected):
    with pytest.raises(ConfigError, match=expected):
        check_metrics(metrics)


def of_two_kinds(outputs, labels):
    """As the area under a curve, which one kind of label alone has none of."""
    if len(set(labels.tolist())) < 2:
        raise ValueError(f"only one of {labels.unique().tolist()}")
    return outputs.mean()


class NeverComputed(Highest):
    def compute(self):
        return {"f1": 1.0}


@pytest.mark.parametrize(
    ("metric", "text"),
    [
        (lambda o, y: o, r" on .*: it must return one number, got shape \(5, 4\): return its mean"),
        (lambda o, y: {"f1": 1.0}, " on .*: it must return one number, got a dict: name each by itself"),
        (of_two_kinds, r" on outputs \(1, 4\) and labels \(1,\): test_s.*:\d+ in of_two_kinds: ValueError: only one"),
        (NeverComputed(), ": it must return one number, got a dict"),
    ],
)
def test_a_metric_that_fails_is_told_once_and_costs_itself_only(metric, text, caplog, monkeypatch):
    monkeypatch.setattr("psl_flower.server.metrics._FAILURES", set())
    for _ in range(2):
        scores = Scores({"mine": metric, "gap": gap})
        for rows in (slice(0, 5), slice(5, 6), slice(6, 7), slice(7, 9)):
            add(scores, OUTPUTS[rows], LABELS[rows])
        again = Scores({"mine": metric, "gap": gap})
        again.load_state_dict(scores.state_dict())
        for found in (scores.result(), again.result()):
            assert math.isnan(found["mine"])
            assert found["gap"] == pytest.approx(gap(OUTPUTS, LABELS).item())
            assert {"loss", "accuracy"} <= set(found)
    (said,) = caplog.messages
    assert re.match(rf"metrics\['mine'\] failed{text}", said)
    scores.reset()
    add(scores, OUTPUTS, LABELS)
    assert math.isnan(scores.result()["mine"]) is (metric is not of_two_kinds)
