"""scikit-learn's handwritten digits, 8 by 8 pixels: 0 to 4 are public, and the clients have some of all ten."""

import torch
from sklearn.datasets import load_digits
from torch import Tensor

_TEST, _PUBLIC = 300, 600


def load() -> tuple[Tensor, Tensor]:
    """Return pictures, (n, 1, 8, 8), and their digits, in an order that is the same everywhere."""
    pixels, digits = load_digits(return_X_y=True)
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(pixels / 16 - 0.3, dtype=torch.float32).view(-1, 1, 8, 8)
    return images[order], torch.tensor(digits)[order]


def test_data() -> tuple[Tensor, Tensor]:
    """Return what nobody trains on."""
    images, digits = load()
    return images[:_TEST], digits[:_TEST]


def public_data() -> tuple[Tensor, Tensor]:
    """Return pictures of the digits 0 to 4."""
    images, digits = (part[_TEST : _TEST + _PUBLIC] for part in load())
    return images[digits < 5], digits[digits < 5]


def client_data(client: int, clients: int) -> list[dict[str, Tensor]]:
    """Return a client's pictures, as rows of the model's inputs and a label."""
    images, digits = (part[_TEST + _PUBLIC :][client::clients] for part in load())
    return [{"pixel_values": image, "label": digit} for image, digit in zip(images, digits, strict=True)]
