"""Who hears what a run does: loggers, early stopping, the best model, and whatever a user adds."""

from psl_flower.callbacks.base import Callback, CallbackGroup
from psl_flower.callbacks.best_model import BestModel
from psl_flower.callbacks.csv_logger import CsvLogger
from psl_flower.callbacks.early_stopping import EarlyStopping
from psl_flower.callbacks.jsonl import JsonlLogger
from psl_flower.callbacks.registry import LOGGERS, check_loggers, make_loggers
from psl_flower.callbacks.tensorboard import TensorBoardLogger
from psl_flower.callbacks.wandb_logger import WandbLogger

__all__ = [
    "LOGGERS",
    "BestModel",
    "Callback",
    "CallbackGroup",
    "CsvLogger",
    "EarlyStopping",
    "JsonlLogger",
    "TensorBoardLogger",
    "WandbLogger",
    "check_loggers",
    "make_loggers",
]
