"""Transformers, trained over clients with texts of many lengths, equal centralised training on the padded batches."""

import copy

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord
from safetensors.torch import load_file
from support import Steps, largest_difference
from support import fast_sgd as sgd
from transformer_models import TOKENS, gpt2, llama, lora_llama, texts

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


def trained(model_fn, cut, tail=None, collate_fn=None, rounds=1, start_from=None, **options):
    """Return the result of some rounds."""
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
    return strategy.start(InProcessGrid(app, K), ArrayRecord(start_from or model.state_dict()), rounds)


CASES = [
    (double_gpt2, "transformer.h.1", "lm_head", apart, 1e-12),
    (double_gpt2, "transformer.h.1", "lm_head", None, 1e-12),
    (double_llama, "model.layers.1", None, None, 1e-6),  # its norms compute in float32
    (double_llama, "model.layers.1", None, apart, 1e-6),
]


@pytest.mark.parametrize(
    ("model_fn", "cut", "tail", "collate_fn", "tolerance"),
    [case if i < 1 else pytest.param(*case, marks=pytest.mark.slow) for i, case in enumerate(CASES)],
)
def test_texts_of_many_lengths(model_fn, cut, tail, collate_fn, tolerance):
    result = trained(model_fn, cut, tail, collate_fn)
    reference = centralised(model_fn())
    assert largest_difference(result.arrays.to_torch_state_dict(), reference) < tolerance
    assert largest_difference(reference, model_fn().state_dict()) > 1e-2


@pytest.mark.slow
def test_dropout_is_drawn_as_the_work_orders_say():
    """Also where a client's first batch is too small to show whether rows are treated one by one."""
    one, other = (
        trained(lambda: gpt2(dropout=0.2), "transformer.h.1", "lm_head").arrays.to_torch_state_dict() for _ in range(2)
    )
    assert largest_difference(one, other) == 0
    assert largest_difference(one, centralised(gpt2())) > 1e-3


@pytest.mark.slow
def test_weights_in_bfloat16():
    def model_fn():
        return gpt2().bfloat16()

    first = {name: t.float() for name, t in model_fn().state_dict().items()}
    result = trained(model_fn, "transformer.h.1", "lm_head", transport="streams", start_from=first)
    reference = centralised(model_fn())
    assert largest_difference(result.arrays.to_torch_state_dict(), reference) < 0.004  # a rounding of the largest
    assert largest_difference(reference, first) > 0.05


def frozen_head():
    model = gpt2().double()
    model.lm_head.weight = torch.nn.Parameter(
        model.lm_head.weight.detach().clone()
    )  # of its own: the embedding is on clients
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("h.1" in name or "ln_f" in name)
    return model


@pytest.mark.slow
def test_activations_of_texts_are_kept_as_long_as_the_texts_are():
    """The second epoch has other texts in a step, and so another longest one."""
    one, other = (
        trained(frozen_head, "transformer.h.1", None, rounds=2, transport="streams", cache_activations=cache)
        for cache in (False, True)
    )
    assert largest_difference(one.arrays.to_torch_state_dict(), other.arrays.to_torch_state_dict()) < 1e-12
    assert largest_difference(one.arrays.to_torch_state_dict(), frozen_head().state_dict()) > 1e-3


# --- only what trains travels ----------------------------------------------------------------------------------------
LAYERS = "base_model.model.model.layers"


def adapters():
    return lora_llama(dropout=0.0).double()


def frozen_below():
    """Adapters in the second layer only."""
    model = adapters()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and f"{LAYERS}.1" in name)
    return model


def trainable(model):
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def hidden_states(rows):
    """Return the least and the most bytes of the hidden states of so many texts."""
    return tuple(16 * 8 * length * rows for length in (3, 9))


def test_only_adapters_travel_and_peft_loads_what_comes_of_it(tmp_path):
    peft = pytest.importorskip("peft")

    model, steps = adapters(), Steps()
    before = trainable(model)
    head = {name: t for name, t in before.items() if f"{LAYERS}.0" in name}
    result = trained(
        adapters,
        f"{LAYERS}.1",
        transport="streams",
        state="trainable",
        start_from=before,
        callbacks=[steps],
        output_dir=tmp_path / "run",
    )
    arrays = result.arrays.to_torch_state_dict()
    assert arrays.keys() == before.keys()
    reference = centralised(model)
    assert max(float((arrays[name] - reference[name]).abs().max()) for name in arrays) < 1e-6
    assert max(float((arrays[name] - before[name]).abs().max()) for name in arrays) > 1e-2
    of_head, base = (sum(t.numel() * 8 for t in some.values()) for some in (head, model.state_dict()))
    assert len(steps.records) >= 4
    assert steps.records[0].bytes_sent > base / 4  # the frozen part of the head, once
    for record in steps.records[1:]:
        least, most = hidden_states(record.batch_size)
        labels_and_masks = 2 * 8 * 9 * record.batch_size
        assert of_head + least <= record.bytes_sent <= of_head + most + 500
        assert of_head + least <= record.bytes_received <= of_head + most + labels_and_masks + 500
    held = load_file(tmp_path / "run" / "model.safetensors")
    assert held.keys() == before.keys()
    # what people do with adapters: peft's own format, onto the base model they know
    model.load_state_dict(arrays, strict=False)
    model.save_pretrained(tmp_path / "adapters")
    assert (tmp_path / "adapters" / "adapter_model.safetensors").exists()
    loaded = peft.PeftModel.from_pretrained(llama().double(), tmp_path / "adapters").eval()
    batch = texts(2, 5)
    assert torch.equal(loaded(**batch).logits, model.eval()(**batch).logits)
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = type(llama()).from_pretrained(tmp_path / "merged", dtype=torch.float64).eval()
    assert torch.allclose(merged(**batch).logits, loaded(**batch).logits, atol=1e-6)


@pytest.mark.slow
def test_a_frozen_head_is_never_asked_for_gradients(tmp_path):
    steps, options = Steps(), {"transport": "streams", "state": "trainable"}
    before = trainable(frozen_below())
    folder = {"output_dir": tmp_path, "checkpoint_every": 2}
    whole = trained(frozen_below, f"{LAYERS}.1", rounds=2, start_from=before, callbacks=[steps], **options)
    for record in steps.records[1:]:
        assert record.bytes_sent < 500 * K  # orders, and no gradient
        assert record.bytes_received > hidden_states(record.batch_size)[0]
    reference = centralised(frozen_below())
    first = trained(frozen_below, f"{LAYERS}.1", start_from=before, **folder, **options)
    arrays = first.arrays.to_torch_state_dict()
    assert max(float((arrays[name] - reference[name]).abs().max()) for name in arrays) < 1e-6
    resumed = trained(
        frozen_below, f"{LAYERS}.1", rounds=2, start_from=before, resume_from="latest", **folder, **options
    )
    assert largest_difference(resumed.arrays.to_torch_state_dict(), whole.arrays.to_torch_state_dict()) == 0
