"""A small vision transformer made from a configuration; adapters on all layers but the first, and a new classifier."""

import psl_flower.torchvision_compat  # noqa: F401 # isort: skip  (transformers' models import torchvision)
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import ViTConfig, ViTForImageClassification

# The patches and the first layer are the clients', and frozen: clients are asked for no gradients.
CUT = "base_model.model.vit.layers.1"


def make_base() -> ViTForImageClassification:
    """Return the model that is to be fine-tuned, with random weights.

    Where there is a hub, this is ``ViTForImageClassification.from_pretrained(name)``.
    """
    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_labels=10,
    )
    return ViTForImageClassification(config)


def with_adapters(base: ViTForImageClassification) -> PeftModel:
    """Return it with what trains: adapters in all layers but the first, and the classifier."""
    config = LoraConfig(
        r=16,
        lora_alpha=32,
        target_modules=r".*\.layers\.[123]\..*(q_proj|k_proj|v_proj|o_proj|fc1|fc2)",
        modules_to_save=["classifier"],
    )
    return get_peft_model(base, config)


def make_model() -> PeftModel:
    """Return the model as client and server cut it."""
    return with_adapters(make_base())


def pretrain(base: ViTForImageClassification, images: torch.Tensor, labels: torch.Tensor, epochs: int = 25) -> None:
    """Train a base model on public pictures."""
    optimizer = torch.optim.AdamW(base.parameters(), lr=2e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(base(images[batch]).logits, labels[batch]).backward()
            optimizer.step()
