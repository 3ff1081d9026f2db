"""A small language model made from a configuration, with LoRA adapters on all its layers."""

import psl_flower.torchvision_compat  # noqa: F401 # isort: skip  (transformers' models import torchvision)
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from llm_lora.texts import PAD, TOKENS, encoded
from psl_flower import PadTexts, causal_lm_loss

# The first layer is the clients', the next two are the server's, what follows is the clients' again.
CUT, TAIL = "base_model.model.model.layers.1", "base_model.model.model.layers.3"


def make_base() -> LlamaForCausalLM:
    """Return the model that is to be fine-tuned, with random weights.

    Where there is a hub, this is ``AutoModelForCausalLM.from_pretrained(name)``.
    """
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=32,
        pad_token_id=PAD,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def with_adapters(base: LlamaForCausalLM) -> PeftModel:
    """Return it with adapters, which alone will train; without dropout, clients of a process run as one."""
    config = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear", lora_dropout=0.0)
    return get_peft_model(base, config)


def make_model() -> PeftModel:
    """Return the model as client and server cut it."""
    return with_adapters(make_base())


def pretrain(base: LlamaForCausalLM, steps: int = 200) -> None:
    """Teach a base model the language from public texts, in which the topics are mixed."""
    rows, pad = encoded(2000, seed=1), PadTexts(PAD)
    optimizer = torch.optim.AdamW(base.parameters(), lr=3e-3)
    for step in range(steps):
        batch = pad([rows[(step * 32 + i) % len(rows)] for i in range(32)])
        labels = batch.pop("labels")
        optimizer.zero_grad()
        causal_lm_loss(base(**batch), labels).backward()
        optimizer.step()
