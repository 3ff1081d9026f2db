"""What the command audits by name: options that need not be given then."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Preset:
    """What is trained; the names are the command's options."""

    dataset: str
    model: str = "cnn"
    cuts: tuple[str, ...] = ("stage2", "stage3", "head")
    rounds: int
    examples: int


PRESETS = {
    "digits": Preset(dataset="digits", rounds=3, examples=2000),
    "fashion-mnist": Preset(dataset="fashion-mnist", rounds=5, examples=4000),
    "cifar10": Preset(dataset="cifar10", rounds=8, examples=8000),
}
