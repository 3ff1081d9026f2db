"""Train a small CNN on handwritten digits that are spread over many clients."""
