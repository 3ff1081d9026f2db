"""What the command audits by name: the command's options, where they are not given."""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "digits": {"dataset": "digits", "model": "cnn", "cuts": ["stage2", "stage3", "head"], "rounds": 3},
    "fashion-mnist": {
        "dataset": "fashion-mnist",
        "model": "cnn",
        "cuts": ["stage2", "stage3", "head"],
        "rounds": 5,
        "examples": 4000,
    },
    "cifar10": {
        "dataset": "cifar10",
        "model": "cnn",
        "cuts": ["stage2", "stage3", "head"],
        "rounds": 8,
        "examples": 8000,
    },
}
