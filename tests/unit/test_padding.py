"""Texts of several lengths as one batch: of a client, of a process, of the server; and the loss over them."""

import pytest
import torch

from psl_flower import tree
from psl_flower.data import Batch, PadTexts, join_batches
from psl_flower.errors import ConfigError
from psl_flower.server import causal_lm_loss, weighted
from psl_flower.split import shortened, text_length

ROWS = [
    {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "kind": 1},
    {"input_ids": torch.tensor([8]), "labels": [8], "kind": 2},
]


def test_each_column_is_padded_with_its_own():
    batch = PadTexts(pad_token_id=3)(ROWS)
    assert {name: column.tolist() for name, column in batch.items()} == {
        "input_ids": [[5, 6, 7], [8, 3, 3]],
        "labels": [[-100, 6, 7], [8, -100, -100]],
        "kind": [1, 2],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
    }
    given = PadTexts()([{"input_ids": [5, 6], "attention_mask": [1, 0]}, {"input_ids": [7], "attention_mask": [1]}])
    assert given["attention_mask"].tolist() == [[1, 0], [1, 0]]


@pytest.mark.parametrize("rows", [[torch.tensor([1, 2])], [{"input_ids": [1]}, {"ids": [1]}], [{}]])
def test_rows_that_cannot_be_padded_are_refused(rows):
    with pytest.raises(ConfigError, match="PadTexts needs rows that are dicts of the same names"):
        PadTexts()(rows)


def test_batches_of_a_process_are_joined_as_if_they_were_one():
    padding = PadTexts(3)
    batches = []
    for rows in (ROWS[:1], ROWS[1:]):
        columns = padding(rows)
        batches.append(Batch({k: v for k, v in columns.items() if k != "labels"}, columns["labels"], len(rows)))
    joined, whole = join_batches(batches, padding), padding(ROWS)
    assert joined.size == 2
    assert torch.equal(joined.target, whole.pop("labels"))
    assert all(torch.equal(joined.inputs[name], column) for name, column in whole.items())
    with pytest.raises(ConfigError, match="where lengths vary, pad them all to one"):
        join_batches(batches, None)


def test_only_the_length_may_differ_and_only_what_has_a_fill_is_padded():
    short, long = torch.ones(1, 2, 4), torch.ones(2, 3, 4)
    joined = tree.join([short, long], "x", fill=0)
    assert joined.shape == (3, 3, 4)
    assert joined.sum() == 1 * 2 * 4 + 2 * 3 * 4
    assert torch.equal(joined[:1, :2], short)
    for one, other, fill in [
        (short, long, None),
        (short, long, -100),  # what would not count is for labels that are whole numbers
        (short, torch.ones(2, 3, 5), 0),
        (short, torch.ones(2, 3), 0),
        (torch.ones(1, 2), torch.ones(2, 3).long(), 0),
    ]:
        with pytest.raises(ConfigError, match="must be alike everywhere but for the number of rows"):
            tree.join([one, other], "x", fill=fill)


def test_what_comes_back_is_cut_to_the_own_length():
    tensors = (torch.ones(2, 5, 3), torch.ones(2, 5), None, torch.ones(2, 7))
    cut = shortened(tensors, (True, False, True), 4)
    assert [None if t is None else tuple(t.shape) for t in cut] == [(2, 4, 3), (2, 5), None, (2, 7)]
    assert shortened(tensors, (True,), None) is tensors
    assert text_length({"pixels": torch.ones(2, 3), "z": torch.ones(2, 6).long()}) == 6
    assert text_length(torch.ones(2, 3)) is None


@pytest.mark.parametrize("loss", [torch.nn.functional.cross_entropy, torch.nn.CrossEntropyLoss()])
def test_cross_entropy_takes_the_logits_of_what_transformers_return(loss):
    output = pytest.importorskip("transformers.modeling_outputs").ImageClassifierOutput  # here: it takes seconds

    logits, labels = torch.randn(5, 3), torch.tensor([0, 1, 2, 1, 0])
    found = weighted(loss, output(logits=logits), labels, 5)
    assert torch.equal(found.mean, loss(logits, labels))
    assert found.predictions.score()[1] == 5


def test_the_loss_of_a_language_model_is_a_mean_over_tokens():
    logits = torch.randn(2, 4, 9, dtype=torch.float64)
    labels = torch.tensor([[1, 2, 3, 4], [5, 6, -100, -100]])
    each = torch.log_softmax(logits, -1)
    counted = [each[0, 0, 2], each[0, 1, 3], each[0, 2, 4], each[1, 0, 6]]
    assert torch.allclose(causal_lm_loss(logits, labels), -torch.stack(counted).mean())
    assert weighted(causal_lm_loss, {"logits": logits}, labels, 2, classify=False).weight == 4
    with pytest.raises(ConfigError, match=r"needs logits \(rows, length, tokens\) and labels"):
        causal_lm_loss(logits, labels[:, 0])
