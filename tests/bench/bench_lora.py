"""Steps of split fine-tuning with LoRA against centralised ones of the same run, and bytes against what they must be.

    python tests/bench/bench_lora.py [--clients 8] [--steps 30] [--width 128] [--layers 4] [--transport streams]

A Llama with adapters on the attention's queries and values, in two parts, 64 texts of up to 32 tokens a step, in one
process (InProcessGrid). After each split step comes a centralised one of the whole model on as many texts; medians are
compared. The bytes of a step are those of SplitLoRA (arXiv 2407.00952): hidden states up, their gradients down, and the
head's adapters both ways, as often as there are processes: one here. Besides, masks and labels go up.
"""

import argparse
import logging
import statistics
import time

import numpy as np
import torch
from flwr.app import ArrayRecord

import psl_flower.torchvision_compat  # noqa: F401 # isort: skip  (transformers' models import torchvision)
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from psl_flower import (
    Callback,
    InProcessGrid,
    PadTexts,
    ParallelSplitLearning,
    UniformGlobalSampler,
    causal_lm_loss,
    split_client_app,
)

BATCH, LENGTH, TOKENS = 64, 32, 500
CUT = "base_model.model.model.layers.1"


def make_model(width, layers):
    config = LlamaConfig(
        vocab_size=TOKENS,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    return get_peft_model(LlamaForCausalLM(config), LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))


def texts(number, seed):
    rng = np.random.default_rng(seed)
    rows = [rng.integers(0, TOKENS, rng.integers(LENGTH // 2, LENGTH + 1)).tolist() for _ in range(number)]
    return [{"input_ids": ids, "labels": ids} for ids in rows]


class Central(Callback):
    """Takes a centralised step after every split one."""

    def __init__(self, model):
        self.model, self.rows, self.rng = model, texts(512, 99), np.random.default_rng(0)
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        self.records, self.seconds = [], []

    def on_step(self, record):
        self.records.append(record)
        begin = time.perf_counter()
        batch = PadTexts()([self.rows[i] for i in self.rng.choice(len(self.rows), BATCH)])
        labels = batch.pop("labels")
        self.optimizer.zero_grad()
        causal_lm_loss(self.model.train()(**batch), labels).backward()
        self.optimizer.step()
        self.seconds.append(time.perf_counter() - begin)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--transport", default="streams")
    options = parser.parse_args()
    logging.getLogger("flwr").setLevel(logging.WARNING)
    each, loss = BATCH * options.steps // options.clients, {"loss": causal_lm_loss, "classification": False}
    app = split_client_app(
        lambda: make_model(options.width, options.layers),
        cut=CUT,
        data_fn=lambda context: texts(each, int(context.node_config["partition-id"])),
        collate_fn=PadTexts(),
        **loss,
    )
    model = make_model(options.width, options.layers)
    central = Central(make_model(options.width, options.layers))
    begin = time.perf_counter()
    strategy = ParallelSplitLearning(
        model,
        cut=CUT,
        sampler=UniformGlobalSampler(BATCH),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
        transport=options.transport,
        state="trainable",
        min_available_nodes=options.clients,
        evaluate_every=0,
        callbacks=[central],
        **loss,
    )
    cutting = time.perf_counter() - begin
    adapters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    strategy.start(InProcessGrid(app, options.clients), ArrayRecord(adapters), num_rounds=1)
    settled = slice(len(central.records) // 5, None)
    split = statistics.median(record.seconds_real for record in central.records[settled])
    alone = statistics.median(central.seconds[settled])
    head = sum(p.numel() * 4 for name, p in adapters.items() if "layers.0." in name)
    hidden = BATCH * LENGTH * options.width * 4
    sent, received = (
        statistics.median(getattr(record, f"bytes_{way}") for record in central.records[settled])
        for way in ("sent", "received")
    )
    frozen = sum(p.numel() * 4 for p in model.parameters() if not p.requires_grad)
    print(f"{options.clients} clients, {len(central.records)} steps of {BATCH} texts; cut in {cutting:.1f} s")
    print(f"step        split {1e3 * split:.1f} ms, centralised {1e3 * alone:.1f} ms, ratio {split / alone:.2f}")
    print(f"bytes sent  {sent:,.0f}; gradients of hidden states and adapters: {hidden + head:,}")
    print(f"  received  {received:,.0f}; hidden states and adapters: {hidden + head:,}; masks and labels: ", end="")
    print(f"{2 * 8 * BATCH * LENGTH:,}")
    print(f"frozen      {frozen:,} bytes, of which 0 a step")


if __name__ == "__main__":
    main()
