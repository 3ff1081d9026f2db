"""Transformers, trained over clients with texts of many lengths, equal centralised training on the padded batches."""

import copy

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord
from support import largest_difference
from transformer_models import TOKENS, gpt2, llama

from psl_flower import (
    InProcessGrid,
    PadTexts,
    ParallelSplitLearning,
    Population,
    UniformGlobalSampler,
    causal_lm_loss,
    split_client_app,
)

K, PAD = 3, 1
SAMPLER = UniformGlobalSampler(8, seed=2)


def client_texts(client):
    """Return a client's texts, of 3 to 9 tokens; of some the beginning is no target."""
    rng = np.random.default_rng([5, client])
    rows = []
    for _ in range(10 + client):
        ids = rng.integers(2, TOKENS, rng.integers(3, 10)).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * int(rng.integers(0, 2)) + ids[-len(ids) :]})
        rows[-1]["labels"] = rows[-1]["labels"][: len(ids)]
    return rows


def load(context):
    return client_texts(context.node_config["partition-id"])


def double_llama():
    return llama().double()


def double_gpt2():
    return gpt2().double()


def apart(rows):
    """Pad, without telling the client how: its batches are not joined with those of others in its process."""
    return PadTexts(PAD)(rows)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def centralised(model, optimizer=sgd):
    """Train on the global batches, padded by hand."""
    data = [client_texts(k) for k in range(K)]
    plan = SAMPLER.plan(Population(range(K), [len(each) for each in data]), 0)
    orders = [np.random.default_rng([2, 0, k]).permutation(len(data[k])) for k in range(K)]
    used, model = [0] * K, copy.deepcopy(model).train()
    step = optimizer([p for p in model.parameters() if p.requires_grad])
    for each in plan:
        rows = []
        for k, quota in zip(each.clients, each.quotas, strict=True):
            rows += [data[k][i] for i in orders[k][used[k] : used[k] + quota]]
            used[k] += quota
        longest = max(len(row["input_ids"]) for row in rows)
        ids, labels, mask = (torch.full((len(rows), longest), fill) for fill in (PAD, -100, 0))
        for i, row in enumerate(rows):
            n = len(row["input_ids"])
            ids[i, :n], labels[i, :n], mask[i, :n] = torch.tensor(row["input_ids"]), torch.tensor(row["labels"]), 1
        step.zero_grad()
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
        torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels[:, 1:]).backward()
        step.step()
    return model.state_dict()


def trained(model_fn, cut, tail=None, collate_fn=None, **options):
    """Return the result of one round."""
    model, loss = model_fn(), {"loss": causal_lm_loss, "classification": False}
    app = split_client_app(
        model_fn, cut=cut, tail=tail, data_fn=load, collate_fn=collate_fn or PadTexts(PAD), device="cpu", **loss
    )
    strategy = ParallelSplitLearning(
        model,
        cut=cut,
        tail=tail,
        sampler=SAMPLER,
        optimizer=sgd,
        device="cpu",
        min_available_nodes=K,
        evaluate_every=0,
        **({} if tail else loss),
        **options,
    )
    return strategy.start(InProcessGrid(app, K), ArrayRecord(model.state_dict()), 1)


CASES = [
    (double_llama, "model.layers.1", None, None, 1e-6),  # its norms compute in float32
    (double_gpt2, "transformer.h.1", "lm_head", apart, 1e-12),
    (double_gpt2, "transformer.h.1", "lm_head", None, 1e-12),
    (double_llama, "model.layers.1", None, apart, 1e-6),
]


@pytest.mark.parametrize(
    ("model_fn", "cut", "tail", "collate_fn", "tolerance"),
    [case if i < 2 else pytest.param(*case, marks=pytest.mark.slow) for i, case in enumerate(CASES)],
)
def test_texts_of_many_lengths(model_fn, cut, tail, collate_fn, tolerance):
    result = trained(model_fn, cut, tail, collate_fn)
    reference = centralised(model_fn())
    assert largest_difference(result.arrays.to_torch_state_dict(), reference) < tolerance
    assert largest_difference(reference, model_fn().state_dict()) > 1e-2
