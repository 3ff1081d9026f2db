"""The default app's configuration, read once from the run config that ``flwr run`` hands to every process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from psl_flower.checks import check_choice, check_float, check_int
from psl_flower.errors import ConfigError
from psl_flower.samplers.registry import make_sampler

AUGMENTATIONS = ("none", "crop-flip")
DATASETS = ("digits", "fashion-mnist", "cifar10", "cifar100")
MODELS = ("cnn", "resnet18", "resnet34")
OPTIMIZERS = ("sgd", "adam")
PARTITIONS = ("iid", "mild", "severe")

# (classes a client, Dirichlet concentration) of the label-skewed splits, METHOD section 5
_LABEL_SKEW = {"mild": (5, 3.0), "severe": (2, 3.0)}


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What ``[tool.flwr.app.config]`` may hold; a field's key is its name with dashes.

    An empty string, and 0 for a number that must be positive, mean "choose automatically".

    Raises
    ------
    ConfigError
        If a value is of the wrong type, out of range or not one of the allowed ones.
    """

    num_server_rounds: int = 5  # a round is one epoch of the pooled data
    evaluate_every: int = 1  # rounds between two split evaluations on the clients' test data; 0: never
    min_available_nodes: int = 2  # SuperNodes to wait for before training starts

    sampler: str = "ugs"
    batch_size: int = 64  # examples in a step's global batch, over all clients
    seed: int = 0  # of the model's first weights, the data split and every epoch's batches

    dataset: str = "digits"
    data_path: str = ""  # folder with the dataset's idx or parquet files; "": scikit-learn's or torchvision's copy
    augment: str = ""  # "": crop-flip for cifar10 and cifar100, none for the others

    partition: str = "iid"
    classes_per_client: int = 0  # 0: 5 for mild, 2 for severe
    dirichlet_alpha: float = 0.0  # concentration of a class's examples over its holders; 0: 3 for mild and severe

    model: str = "cnn"
    cut: str = ""  # qualified name of the first server-side module; "": after the model's first stage

    optimizer: str = "sgd"
    learning_rate: float = 0.02
    momentum: float = 0.9  # of sgd; adam has its own

    device: str = "auto"  # of the server half: "auto", or a torch device such as "cuda:0"
    threads: int = 1  # torch threads of the ServerApp; more than one often slows a simulation down on the same machine
    output_dir: str = "outputs"  # relative to the working directory of the SuperLink

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.type == "str" and not isinstance(getattr(self, field.name), str):
                raise ConfigError(f"{_key(field.name)} must be a string, got {getattr(self, field.name)!r}")
        for name, least in _LEAST.items():
            object.__setattr__(self, name, check_int(getattr(self, name), _key(name), least=least))
        for name, allowed in _ALLOWED.items():
            check_choice(getattr(self, name), _key(name), allowed)
        make_sampler(self.sampler, self.batch_size, self.seed)  # refuses an unknown name
        if self.augment:
            check_choice(self.augment, "augment", AUGMENTATIONS)
        object.__setattr__(self, "learning_rate", check_float(self.learning_rate, "learning-rate", above=0.0))
        object.__setattr__(self, "dirichlet_alpha", check_float(self.dirichlet_alpha, "dirichlet-alpha", least=0.0))
        object.__setattr__(self, "momentum", check_float(self.momentum, "momentum", least=0.0))
        if self.momentum >= 1:
            raise ConfigError(f"momentum must be below 1, got {self.momentum}")
        if not self.output_dir:
            raise ConfigError("output-dir must name a folder, got an empty string")
        if self.partition == "iid" and (self.classes_per_client or self.dirichlet_alpha):
            raise ConfigError(
                "classes-per-client and dirichlet-alpha shape the partitions 'mild' and 'severe', got "
                f"{self.classes_per_client} and {self.dirichlet_alpha} with partition 'iid': choose another partition"
            )
        if self.data_path and not Path(self.data_path).expanduser().is_absolute():
            raise ConfigError(
                f"data-path must be absolute, got {self.data_path!r}: every process has a working directory of its own"
            )

    @classmethod
    def read(cls, run_config: Mapping[str, Any]) -> RunConfig:
        """Read a Flower run config (``context.run_config``); keys it lacks keep their defaults.

        Raises
        ------
        ConfigError
            If a key is unknown or a value is refused.
        """
        names = {_key(field.name): field.name for field in fields(cls)}
        for key in run_config:
            check_choice(key, "a configuration key", names)
        return cls(**{names[key]: value for key, value in run_config.items()})

    def as_run_config(self) -> dict[str, str | int | float]:
        """Return every key with its value, as `read` takes them."""
        return {_key(field.name): getattr(self, field.name) for field in fields(self)}

    def label_skew(self) -> tuple[int, float] | None:
        """Return (classes a client, Dirichlet alpha) of the data split, or None for IID."""
        if self.partition == "iid":
            return None
        classes, alpha = _LABEL_SKEW[self.partition]
        return self.classes_per_client or classes, self.dirichlet_alpha or alpha


_LEAST = {
    "num_server_rounds": 1,
    "evaluate_every": 0,
    "min_available_nodes": 1,
    "batch_size": 1,
    "seed": 0,
    "classes_per_client": 0,
    "threads": 1,
}
_ALLOWED = {
    "dataset": DATASETS,
    "partition": PARTITIONS,
    "model": MODELS,
    "optimizer": OPTIMIZERS,
}


def _key(name: str) -> str:
    return name.replace("_", "-")
