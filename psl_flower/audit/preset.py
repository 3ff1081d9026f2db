"""What the command audits by name: options that need not be given then."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from typing import Any

from psl_flower.presets import preset_text


@dataclass(frozen=True, kw_only=True)
class Preset:
    """What is trained and attacked; the names are those of the command's options."""

    title: str
    dataset: str
    model: str = "cnn"
    cuts: tuple[str, ...]
    defences: tuple[str, ...] = ("none",)
    attacks: tuple[str, ...] = ()  # all
    num_clients: int = 8
    rounds: int
    examples: int
    batch_size: int = 64
    learning_rate: float = 0.02
    momentum: float = 0.9
    seeds: int = 1


def read_preset(name: str) -> Preset:
    """Return the audit's preset of that name.

    Raises
    ------
    ConfigError
        If there is none.
    """
    table = tomllib.loads(preset_text(name, "audit"))
    options: dict[str, Any] = {}
    for key, value in table.items():
        options[key.replace("-", "_")] = tuple(value) if isinstance(value, list) else value
    return Preset(**options)
