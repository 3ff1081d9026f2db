"""What the server keeps of clients' rows: by example, without padding, and only as long as it is true."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from psl_flower.errors import ConfigError
from psl_flower.methods import ParallelSplit
from psl_flower.protocol import Description, Kind, Leaf, Orders, Part, Weights, WorkOrder
from psl_flower.strategy.kept import KeptRows

STAGE = ParallelSplit.stages()["forward"]
LENGTHS = {0: [3, 1, 5, 2], 7: [4, 4]}  # of each client's texts
FROZEN = [Weights({}, {}, "1", "c")]


def orders(*counts, start=0, epoch=0, **more):
    given = {"starts": np.full(2, start), "counts": np.array(counts), "epoch": epoch, **more}
    return Orders(clients=np.array([0, 7]), **given)


def sent(client, examples):
    """Return what a client sends of some texts: masks and hidden states, padded to the longest, and labels."""
    longest = max(LENGTHS[client][e] for e in examples)
    hidden, mask = torch.zeros(len(examples), longest, 2), torch.zeros(len(examples), longest, dtype=torch.int64)
    labels = torch.full((len(examples), longest), -100)
    for row, e in enumerate(examples):
        n = LENGTHS[client][e]
        hidden[row, :n], mask[row, :n], labels[row, :n] = 10 * client + e + 1, 1, e
        hidden[row, n:] = 77  # what a model makes of padding
    outputs = {"activations": Leaf(Kind.ROWS, (mask, hidden)), "labels": Leaf(Kind.ROWS, labels, True)}
    return Part((client,), outputs, 0, np.zeros(1))


def keeper(described=None):
    described = described or {k: Description(k, len(n), len(n)) for k, n in LENGTHS.items()}
    return KeptRows(described.__getitem__, (True, True)), described


def fill(kept, some):
    _, missing, examples = kept.find(STAGE, some, FROZEN)
    kept.put(STAGE, some, examples, [sent(int(some.clients[i]), examples[i]) for i in missing])
    return examples


def test_texts_come_back_as_long_as_the_longest_that_is_asked_for():
    kept, _ = keeper()
    whole = fill(kept, orders(4, 2))
    assert [sorted(each) for each in whole] == [[0, 1, 2, 3], [0, 1]]
    assert kept.num_bytes() == sum(sum(n) for n in LENGTHS.values()) * (8 + 2 * 4 + 8)
    some = orders(2, 1, start=1, epoch=3)
    (part,), missing, examples = kept.find(STAGE, some, FROZEN)
    assert part.nodes == (0, 7)
    assert not missing
    mask, hidden = part.outputs["activations"].value
    lengths = [LENGTHS[0][e] for e in examples[0]] + [LENGTHS[7][e] for e in examples[1]]
    assert mask.sum(1).tolist() == lengths
    assert mask.shape[1] == max(lengths)
    assert 77 not in hidden
    values = [e + 1 for e in examples[0]] + [71 + e for e in examples[1]]
    assert hidden[:, 0, 0].tolist() == values
    labels = part.outputs["labels"].value
    assert (labels == -100).sum(1).tolist() == [max(lengths) - n for n in lengths]
    assert part.outputs["labels"].exact


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_several_labels_for_each_text_are_kept_whole(dtype):
    """Also where a text is padded to as many positions as it has labels."""
    kept, _ = keeper()
    labels = torch.tensor([[1, 0, 1, 1], [0, 1, 0, 1], [1, 1, 0, 0], [0, 0, 0, 1]], dtype=dtype)
    mask = torch.arange(4) < torch.tensor([[2], [1], [3], [2]])
    sent = {"activations": Leaf(Kind.ROWS, (mask.long(), torch.ones(4, 4, 3))), "labels": Leaf(Kind.ROWS, labels, True)}
    some = orders(4, 2).take(np.array([0]))
    kept.put(STAGE, some, kept.find(STAGE, some, FROZEN)[2], [Part((0,), sent, 0, np.zeros(1))])
    ((part,), _, _) = kept.find(STAGE, some, FROZEN)
    assert torch.equal(part.outputs["labels"].value, labels)
    assert torch.equal(part.outputs["activations"].value[0], mask.long())


def test_rows_that_come_together_lie_together_and_those_that_come_again_in_their_place():
    described = {k: Description(k, 4, 4) for k in (0, 7)}
    kept = KeptRows(described.__getitem__)

    def answer(some, value):
        _, _, examples = kept.find(STAGE, some, FROZEN)
        asked = [example for each in examples for example in each]
        e = torch.tensor(asked)
        given = {"activations": Leaf(Kind.ROWS, e + value), "labels": Leaf(Kind.ROWS, e, True)}
        kept.put(STAGE, some, examples, [Part(tuple(some.clients.tolist()), given, 0, np.zeros(len(some)))])
        return asked

    first = answer(orders(2, 4), 10)
    assert kept.num_bytes() == 6 * 16
    rows = kept._clients["forward", 0, False].rows
    assert len({id(came) for came, _ in rows.values()}) == 1
    again = answer(orders(4, 4).take(np.array([0])), 20)
    assert len({id(came) for came, _ in rows.values()}) == 4
    ((part,), _, examples) = kept.find(STAGE, orders(4, 4), FROZEN)
    assert examples == [again, first[2:]]
    assert part.outputs["labels"].value.tolist() == again + first[2:]
    assert part.outputs["activations"].value.tolist() == [e + 20 for e in again] + [e + 10 for e in first[2:]]


def test_an_order_is_there_if_all_of_it_is():
    kept, _ = keeper()
    fill(kept, orders(3, 2))
    found, missing, _ = kept.find(STAGE, orders(4, 1), FROZEN)
    assert [part.nodes for part in found] == [(7,)]
    assert missing == [0]
    assert kept.find(STAGE, orders(1, 1, test=True), FROZEN)[:2] == ([], [0, 1])


def test_rows_that_cannot_be_read_shift_no_others():
    kept, _ = keeper()
    fill(kept, orders(4, 2))
    (part,), _, examples = kept.find(STAGE, orders(3, 2, left_out={0: (1,)}), FROZEN)
    assert sorted(examples[0]) == [0, 2, 3]
    assert part.outputs["labels"].value[:3, 0].tolist() == examples[0]


def test_the_order_of_an_epoch_is_made_once(monkeypatch):
    kept, _ = keeper()
    made, order_of = [], WorkOrder.order_of
    monkeypatch.setattr(WorkOrder, "order_of", lambda order, size: made.append(order.client) or order_of(order, size))
    steps = [kept.find(STAGE, orders(1, 1, start=start), FROZEN)[2] for start in (0, 1)]
    assert made == [0, 7]
    assert {row for step in steps for row in step[1]} == {0, 1}
    for other in ({"epoch": 1}, {"epoch": 1, "left_out": {0: (1,), 7: (0,)}}, {"test": True}):
        kept.find(STAGE, orders(1, 1, **other), FROZEN)
    assert made == [0, 7] * 4


def test_other_data_or_other_weights_are_asked_for_anew():
    kept, described = keeper()
    fill(kept, orders(4, 2))
    described[7] = replace(described[7], num_examples=3)
    assert kept.find(STAGE, orders(4, 2), FROZEN)[1] == [1]
    assert kept.find(STAGE, orders(4, 2), [Weights({}, {}, "2", "c")])[1] == [1]  # what trains is another part's
    assert kept.find(STAGE, orders(4, 2), [Weights({}, {}, "2", "d")])[1] == [0, 1]
    assert kept.num_bytes() == 0


def test_orders_by_class_are_refused():
    by_class = orders(1, 1, class_starts=np.zeros((2, 1), int), class_counts=np.ones((2, 1), int))
    with pytest.raises(ConfigError, match="orders by class: use another sampler"):
        keeper()[0].find(STAGE, by_class, FROZEN)


def test_what_is_known_of_a_cut_model():
    halves = SimpleNamespace(parts=(None, SimpleNamespace(takes=(True, False))))
    clients = SimpleNamespace(members={3: SimpleNamespace(description="said")})
    kept = KeptRows.of(clients, halves)
    assert (kept._describe(3), kept._long) == ("said", (True, False))
