"""Who hears what a run does: loggers, and whatever a user adds."""

from psl_flower.callbacks.base import Callback, CallbackGroup
from psl_flower.callbacks.csv_logger import CsvLogger
from psl_flower.callbacks.jsonl import JsonlLogger
from psl_flower.callbacks.registry import LOGGERS, check_loggers, make_loggers
from psl_flower.callbacks.tensorboard import TensorBoardLogger
from psl_flower.callbacks.wandb_logger import WandbLogger

__all__ = [
    "LOGGERS",
    "Callback",
    "CallbackGroup",
    "CsvLogger",
    "JsonlLogger",
    "TensorBoardLogger",
    "WandbLogger",
    "check_loggers",
    "make_loggers",
]
