"""Small transformers, made from a configuration: what several tests cut and train."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from psl_flower.torchvision_compat import import_torchvision

TOKENS = 50


def transformers() -> ModuleType:
    """Return the package, which takes seconds to import: each process of pytest imports all tests."""
    import_torchvision()  # transformers' models import it
    return pytest.importorskip("transformers")


def llama(layers: int = 2) -> nn.Module:
    config = transformers().LlamaConfig(
        vocab_size=TOKENS,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
    return seeded(transformers().LlamaForCausalLM, config)


def gpt2(dropout: float = 0.0) -> nn.Module:
    config = transformers().GPT2Config(
        vocab_size=TOKENS,
        n_positions=32,
        n_embd=16,
        n_layer=2,
        n_head=2,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=0,
        eos_token_id=0,
    )
    return seeded(transformers().GPT2LMHeadModel, config)


def bert() -> nn.Module:
    config = transformers().BertConfig(
        vocab_size=TOKENS,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
        num_labels=3,
    )
    return seeded(transformers().BertForSequenceClassification, config)


def vit() -> nn.Module:
    config = transformers().ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=8,
        patch_size=4,
        num_labels=3,
    )
    return seeded(transformers().ViTForImageClassification, config)


def lora_llama(dropout: float = 0.1) -> nn.Module:
    peft = pytest.importorskip("peft")

    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = peft.LoraConfig(
            r=2, target_modules=["q_proj", "v_proj"], lora_dropout=dropout, init_lora_weights=False
        )
        return peft.get_peft_model(llama(), config)


def seeded(kind: type[nn.Module], config: object) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind(config)


def texts(rows: int, length: int, *, seed: int = 0) -> dict[str, Tensor]:
    """Return token ids and a mask, texts of all lengths from half to the whole of it padded at their end."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, TOKENS, (rows, length), generator=generator)
    lengths = torch.randint(length // 2, length + 1, (rows, 1), generator=generator)
    mask = (torch.arange(length) < lengths).long()
    return {"input_ids": ids * mask, "attention_mask": mask}
