"""The model and the data of the benchmark: a Llama with adapters, and texts of random tokens, all of one length."""

import psl_flower.torchvision_compat  # noqa: F401 # isort: skip  (transformers' models import torchvision)
import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from psl_flower import PadTexts, causal_lm_loss

BATCH, LENGTH, TOKENS = 64, 32, 500
CUT = "base_model.model.model.layers.1"
LOSS = {"loss": causal_lm_loss, "classification": False}

pad = PadTexts()


def make_model(width, layers):
    """Return a Llama with adapters on the attention's queries and values, as in SplitLoRA (arXiv 2407.00952)."""
    config = LlamaConfig(
        vocab_size=TOKENS,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    return get_peft_model(LlamaForCausalLM(config), LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))


def optimizer(parameters):
    return torch.optim.AdamW(parameters, lr=1e-3)


def centralised(width, layers):
    """Return a function that takes a step of the uncut model, from the rows to the new weights."""
    model, rows, rng = make_model(width, layers).train(), texts(512, seed=99), np.random.default_rng(0)
    optimizer_of_adapters = optimizer([p for p in model.parameters() if p.requires_grad])

    def step():
        batch = pad([rows[i] for i in rng.choice(len(rows), BATCH)])
        labels = batch.pop("labels")
        optimizer_of_adapters.zero_grad()
        LOSS["loss"](model(**batch), labels).backward()
        optimizer_of_adapters.step()

    return step


def texts(number, seed):
    rows = np.random.default_rng(seed).integers(0, TOKENS, (number, LENGTH)).tolist()
    return [{"input_ids": ids, "labels": ids} for ids in rows]


def adapters(model):
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def bytes_of_step(model, width, processes):
    """Return the bytes of a step, sent and received: SplitLoRA's, then what is beside them.

    Hidden states go up and their gradients come down; the head's adapters go down and their gradients come up, once a
    process of clients. Beside them, masks and labels go up.
    """
    hidden = 4 * BATCH * LENGTH * width
    head = sum(4 * p.numel() for name, p in adapters(model).items() if ".layers.0." in name)
    theirs = hidden + processes * head
    return {"sent": theirs, "received": theirs, "masks and labels": 2 * 8 * BATCH * LENGTH}
