"""The loggers that can be had by name, beside JSONL and CSV, which are always there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from psl_flower.callbacks.base import Callback
from psl_flower.callbacks.tensorboard import TensorBoardLogger
from psl_flower.callbacks.wandb_logger import WandbLogger
from psl_flower.checks import check_choice

LOGGERS: dict[str, Callable[[Path], Callback]] = {"tensorboard": TensorBoardLogger, "wandb": WandbLogger}


def check_loggers(names: str) -> list[str]:
    """Return the names in a comma-separated list, or raise ConfigError if one is unknown."""
    return [check_choice(name.strip(), "loggers", LOGGERS) for name in names.split(",") if name.strip()]


def make_loggers(names: str, folder: str | Path) -> list[Callback]:
    """Make the loggers of a comma-separated list; each writes into a folder of its name in `folder`.

    Raises
    ------
    ConfigError
        If one is unknown, or not installed.
    """
    return [LOGGERS[name](Path(folder) / name) for name in check_loggers(names)]
