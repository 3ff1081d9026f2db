"""Ten clients, each with digits of its own, fine-tune a vision transformer whose first layers are frozen."""
