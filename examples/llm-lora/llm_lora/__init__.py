"""Eight clients, each with texts of its own topic, fine-tune one language model with LoRA; the texts stay there."""
