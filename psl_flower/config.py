"""The default app's configuration, read once from the run config that ``flwr run`` hands to every process."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from psl_flower.callbacks.registry import check_loggers
from psl_flower.checks import check_choice, check_float, check_int, check_options
from psl_flower.errors import ConfigError
from psl_flower.exchange.streams import StreamOptions
from psl_flower.exchange.transport import TRANSPORTS
from psl_flower.faults import FaultPolicy
from psl_flower.samplers.base import Sampler
from psl_flower.samplers.registry import SAMPLERS, make_sampler
from psl_flower.stragglers import DELAY_MODELS, DelayModel, delay_model

AUGMENTATIONS = ("none", "crop-flip")
DATASETS = ("digits", "fashion-mnist", "cifar10", "cifar100")
MODELS = ("tiny-cnn", "cnn", "resnet18", "resnet34")
OPTIMIZERS = ("sgd", "adam")
PARTITIONS = ("iid", "mild", "severe")

# (classes a client, Dirichlet concentration) of the label-skewed splits, METHOD section 5
_LABEL_SKEW = {"mild": (5, 3.0), "severe": (2, 3.0)}

# An option of the sampler's or the delay model's class, by its name there: defaults and checks are the class's own.
Option = float | str  # "": not given


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What ``[tool.flwr.app.config]`` may hold; a field's key is its name with dashes.

    An empty string, and 0 for a number that must be positive, mean "choose automatically".

    Raises
    ------
    ConfigError
        If a value is of the wrong type, out of range, not one of the allowed ones, or does not go with the others.
    """

    num_server_rounds: int = 5  # a round is one epoch of the pooled data
    evaluate_every: int = 1  # rounds between two split evaluations on the clients' test data; 0: never
    min_available_nodes: int = 2  # SuperNodes to wait for before training starts

    sampler: str = "ugs"
    batch_size: int = 64  # examples in a step's global batch, over all clients
    seed: int = 0  # of the model's first weights, the data split, every epoch's batches and who is slow

    # options of the sampler, explained in the docstring of its class
    sampler_delta: Option = ""  # lds: how hard stragglers are favoured
    sampler_c: Option = ""  # lds: confidence in the prior
    sampler_sample_size: Option = ""  # lds: labels the posterior counts as seen
    sampler_method: str = ""  # lb: "auto", "flow" or "greedy"
    sampler_targets: str = ""  # lb, aligned: "random" or "stratified"
    sampler_tilt: Option = ""  # aligned: how far slow steps may lean toward slow clients' classes
    sampler_order: str = ""  # lds, lb, aligned: "shuffled" or "natural"

    delays: str = "none"  # how slow clients are: a model of psl_flower.stragglers; simulated, unless "measured"
    delays_fraction: Option = ""  # slow-fraction: share of slow clients
    delays_latency: Option = ""  # seconds a step of a fast client (slow-fraction), the median (lognormal)
    delays_latency_factor: Option = ""  # slow-fraction: how many times as much a slow client takes
    delays_latency_sigma: Option = ""  # lognormal: standard deviation of the logarithm
    delays_per_sample: Option = ""  # seconds an example; the rest as for the latency
    delays_per_sample_factor: Option = ""
    delays_per_sample_sigma: Option = ""
    delays_path: str = ""  # csv: file with the columns client_id, latency, per_sample, read by the ServerApp
    simulated_delays: str = (
        ""  # with delays "measured": how slow the clients are made to look; delays-* are its numbers
    )
    sleep: bool = False  # whether clients really wait for their simulated delays

    transport: str = "auto"  # how requests travel: "streams", "messages", or streams where clients can open them
    stream_bind: str = "127.0.0.1:0"  # where the ServerApp listens for streams; port 0: any free one
    stream_address: str = ""  # host or host:port that clients connect to; "": that of stream-bind
    wire_dtype: str = "float32"  # of activations and their gradients on streams: float16, bfloat16, int8 save bytes

    # what to do about faults, explained in the docstring of psl_flower.FaultPolicy
    tolerate_faults: bool = True  # whether a step goes on without clients that fail; false: they end the run
    step_timeout: float = 0.0  # seconds clients have for one exchange of a step; 0: an hour, Flower's timeout
    min_batch_fraction: float = 0.5  # of a step's examples; if fewer arrive, it is redone
    patience: float = 30.0  # seconds without a completed step after which the rest of an epoch is given up
    join: str = "epoch"  # when new clients enter: with the next "epoch", or the next "step"
    non_finite_loss: str = "stop"  # or "skip" such steps
    max_gradient_norm: float = 0.0  # of a client's mean gradient, larger ones are scaled down; 0: no limit

    checkpoint_every: int = 0  # steps between two checkpoints within a round; 0: only at its end
    keep_checkpoints: int = 2  # the last ones, in the output-dir; 0: none are written
    resume_from: str = ""  # "latest" in the output-dir, or the path of a checkpoint

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
    threads: int = 0  # torch threads of the ServerApp; 0: as many as there are cores, see psl_flower.threads
    loggers: str = ""  # beside metrics.jsonl and CSV: "tensorboard", "wandb" or both, separated by a comma
    output_dir: str = "outputs"  # relative to the working directory of the SuperLink

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.type == "str" and not isinstance(getattr(self, field.name), str):
                raise ConfigError(f"{_key(field.name)} must be a string, got {getattr(self, field.name)!r}")
        for name, least in _LEAST.items():
            object.__setattr__(self, name, check_int(getattr(self, name), _key(name), least=least))
        for name, allowed in _ALLOWED.items():
            check_choice(getattr(self, name), _key(name), allowed)
        for name in ("sleep", "tolerate_faults"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{_key(name)} must be true or false, got {getattr(self, name)!r}")
        self.fault_policy()
        if self.augment:
            check_choice(self.augment, "augment", AUGMENTATIONS)
        object.__setattr__(self, "learning_rate", check_float(self.learning_rate, "learning-rate", above=0.0))
        object.__setattr__(self, "dirichlet_alpha", check_float(self.dirichlet_alpha, "dirichlet-alpha", least=0.0))
        object.__setattr__(self, "momentum", check_float(self.momentum, "momentum", least=0.0))
        if self.momentum >= 1:
            raise ConfigError(f"momentum must be below 1, got {self.momentum}")
        check_loggers(self.loggers)
        self.stream_options()  # refuses addresses without a port, and unknown dtypes
        if not self.output_dir:
            raise ConfigError("output-dir must name a folder, got an empty string")
        if self.partition == "iid" and (self.classes_per_client or self.dirichlet_alpha):
            raise ConfigError(
                "classes-per-client and dirichlet-alpha shape the partitions 'mild' and 'severe', got "
                f"{self.classes_per_client} and {self.dirichlet_alpha} with partition 'iid': choose another partition"
            )
        for name in ("data_path", "delays_path"):
            path = getattr(self, name)
            if path and not Path(path).expanduser().is_absolute():
                raise ConfigError(
                    f"{_key(name)} must be absolute, got {path!r}: every process has a working directory of its own"
                )
        self._check_delays(self.make_sampler())

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

    def fault_policy(self) -> FaultPolicy:
        """Return what to do about faults."""
        try:
            return FaultPolicy(
                tolerate=self.tolerate_faults,
                step_timeout=None if self.step_timeout == 0 else self.step_timeout,
                min_batch_fraction=self.min_batch_fraction,
                patience=self.patience,
                join=self.join,
                non_finite_loss=self.non_finite_loss,
                max_gradient_norm=None if self.max_gradient_norm == 0 else self.max_gradient_norm,
            )
        except ConfigError as exc:
            raise ConfigError(_key(str(exc))) from exc

    def stream_options(self) -> StreamOptions:
        """Return how streams are configured."""
        return StreamOptions(bind=self.stream_bind, advertise=self.stream_address, wire_dtype=self.wire_dtype)

    def label_skew(self) -> tuple[int, float] | None:
        """Return (classes a client, Dirichlet alpha) of the data split, or None for IID."""
        if self.partition == "iid":
            return None
        classes, alpha = _LABEL_SKEW[self.partition]
        return self.classes_per_client or classes, self.dirichlet_alpha or alpha

    # --- samplers and delays -----------------------------------------------------------------------------------------
    def make_sampler(self) -> Sampler:
        """Make the configured sampler."""
        kind = type(make_sampler(self.sampler, self.batch_size, self.seed))  # refuses an unknown name
        options = self._options("sampler", f"sampler {self.sampler!r}", kind, SAMPLERS)
        with _naming("sampler"):
            return make_sampler(self.sampler, self.batch_size, self.seed, **options)

    def make_delays(self) -> tuple[DelayModel | None, DelayModel | None]:
        """Make the delays that the sampler plans with, and the simulated ones; None where there are none.

        Raises
        ------
        ConfigError
            If the file with the delays cannot be read.
        """
        name, options = self._simulation()
        with _naming("delays"):
            simulated = None if name == "none" else delay_model(name, **options)
        return delay_model("measured") if self.delays == "measured" else simulated, simulated

    def _simulation(self) -> tuple[str, dict[str, Any]]:
        """Return the model of the simulated delays by name, and its options."""
        name = (self.simulated_delays or "none") if self.delays == "measured" else self.delays
        kind, key = DELAY_MODELS[name], "simulated-delays" if self.delays == "measured" else "delays"
        models = {other: model for other, model in DELAY_MODELS.items() if other != "measured"}
        options = self._options("delays", f"{key} {name!r}", kind, models)
        if "path" in options:
            options["path"] = Path(options["path"]).expanduser()
        if "seed" in _parameters(kind):
            options["seed"] = self.seed
        with _naming("delays"):
            check_options(options, kind, f"{key} {name!r}")
        return name, options

    def _options(
        self, group: str, chosen: str, kind: Callable[..., Any], others: Mapping[str, Callable[..., Any]]
    ) -> dict[str, Any]:
        """Return the options in this group of keys, for `kind`, what was chosen; refuse those of others."""
        options = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if not field.name.startswith(f"{group}_") or value == "":
                continue
            option = field.name.removeprefix(f"{group}_")
            if option not in _parameters(kind):
                takers = [repr(other) for other, its in others.items() if option in _parameters(its)]
                raise ConfigError(
                    f"{_key(field.name)} is for {group} {' and '.join(takers)}, got {value!r} with {chosen}: leave it "
                    f"empty, or choose one of those"
                )
            options[option] = value
        return options

    def _check_delays(self, sampler: Sampler) -> None:
        """Refuse what does not go together."""
        check_choice(self.delays, "delays", DELAY_MODELS)
        if self.simulated_delays:
            check_choice(self.simulated_delays, "simulated-delays", [n for n in DELAY_MODELS if n != "measured"])
            if self.delays != "measured":
                raise ConfigError(
                    f"simulated-delays goes with delays 'measured', got {self.simulated_delays!r} with delays "
                    f"{self.delays!r}: other delays are simulated themselves, leave one out"
                )
        if sampler.needs_delays and self.delays == "none":
            names = ", ".join(repr(name) for name in DELAY_MODELS if name != "none")
            raise ConfigError(
                f"sampler {self.sampler!r} plans with delays, got delays 'none': set delays to one of {names}"
            )
        simulated, _ = self._simulation()
        if simulated != "csv":  # that file is the ServerApp's to read: clients may not have it
            self.make_delays()
        if self.sleep and simulated == "none":
            key = "simulated-delays" if self.delays == "measured" else "delays"
            raise ConfigError(f"sleep needs simulated delays to wait for, got none: set {key}, or leave sleep out")
        if self.delays == "measured" and simulated != "none" and not self.sleep:
            raise ConfigError(
                f"delays are measured where clients take them, got simulated-delays {simulated!r} without sleep: set "
                f"sleep to true, or delays to {simulated!r}"
            )


@contextmanager
def _naming(group: str) -> Iterator[None]:
    """Say in a refusal which keys the refused option may come from."""
    try:
        yield
    except ConfigError as exc:
        raise ConfigError(f"the keys {group}-*: {exc}") from exc


def _parameters(kind: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(kind).parameters


_LEAST = {
    "num_server_rounds": 1,
    "evaluate_every": 0,
    "min_available_nodes": 1,
    "batch_size": 1,
    "seed": 0,
    "classes_per_client": 0,
    "threads": 0,
    "checkpoint_every": 0,
    "keep_checkpoints": 0,
}
_ALLOWED = {
    "transport": TRANSPORTS,
    "dataset": DATASETS,
    "partition": PARTITIONS,
    "model": MODELS,
    "optimizer": OPTIMIZERS,
}


def _key(name: str) -> str:
    return name.replace("_", "-")
