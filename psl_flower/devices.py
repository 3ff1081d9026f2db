"""Where torch computes, and with which randomness."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from psl_flower.errors import ConfigError


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's global generators for a while, and put them back."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        if device.type == "cpu":
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs too, for good
        else:
            torch.manual_seed(seed)
        yield


def pick_device(device: str | torch.device) -> torch.device:
    """Return the device named; "auto" is the first GPU if there is one, else the CPU.

    Raises
    ------
    ConfigError
        If torch does not know the device.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(device)
    except RuntimeError as exc:
        raise ConfigError(f"device must be 'auto' or a torch device such as 'cpu' or 'cuda:0', got {device!r}") from exc
