"""The default app's configuration, read once from the run config that ``flwr run`` hands to every process."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from psl_flower.callbacks.registry import LOGGERS, check_loggers
from psl_flower.checks import check_choice, check_options
from psl_flower.config.key import ABSOLUTE_PATH, OneOf, dashed, key, refusing
from psl_flower.errors import ConfigError
from psl_flower.exchange.streams.options import WIRE_DTYPES, StreamOptions
from psl_flower.exchange.transport import TRANSPORTS
from psl_flower.faults import JOIN, NON_FINITE_LOSS, FaultPolicy
from psl_flower.methods import METHODS
from psl_flower.precision import PRECISIONS
from psl_flower.privacy import DPSGD
from psl_flower.privacy.defences import DEFENCES, parse_defences
from psl_flower.samplers.base import Sampler
from psl_flower.samplers.registry import NAMED, make_sampler
from psl_flower.stragglers import DELAY_MODELS, DelayModel, delay_model

AUGMENTATIONS = ("none", "crop-flip")
DATASETS = ("digits", "fashion-mnist", "cifar10", "cifar100")
MODELS = ("tiny-cnn", "strided-cnn", "cnn", "resnet18", "resnet34")
OPTIMIZERS = ("sgd", "adam")
PARTITIONS = ("iid", "mild", "severe")
SIMULATED_DELAYS = tuple(name for name in DELAY_MODELS if name != "measured")

# (classes a client, Dirichlet concentration) of the label-skewed splits, docs/method.md, 5
_LABEL_SKEW = {"mild": (5, 3.0), "severe": (2, 3.0)}


# An option of the sampler's or the delay model's class, by its name there: defaults and checks are the class's own.
Option = int | float | str  # "": not given


@refusing
@dataclass(frozen=True, kw_only=True, config=ConfigDict(strict=True, allow_inf_nan=False))
class RunConfig:
    """What ``[tool.flwr.app.config]`` may hold; a field's key is its name with dashes.

    An empty string, and 0 for a number that must be positive, mean "choose automatically". Here a key is defined, once;
    ``python -m psl_flower.config`` then writes pyproject.toml's block and docs/settings.md anew.

    Raises
    ------
    ConfigError
        If a value is of the wrong type, out of range, not one of the allowed ones, or does not go with the others.
    """

    num_server_rounds: int = key(
        5, "How long to train; a round is one epoch of the pooled data", section="Rounds", unit="rounds", ge=1
    )
    evaluate_every: int = key(
        1, "Time between two split evaluations on the clients' test data; 0: never", unit="rounds", ge=0
    )
    min_available_nodes: int = key(2, "How many to wait for before training starts", unit="clients", ge=1)

    dataset: Annotated[str, OneOf(DATASETS)] = key("digits", "Images to learn", section="Data")
    data_path: Annotated[str, ABSOLUTE_PATH] = key(
        "", "Folder with the dataset's idx or parquet files; empty: scikit-learn's digits, torchvision's download"
    )
    augment: Annotated[str, OneOf(AUGMENTATIONS, or_empty=True)] = key(
        "", "Augmentation of training images; empty: crop-flip for cifar10 and cifar100, none for the others"
    )
    partition: Annotated[str, OneOf(PARTITIONS)] = key(
        "iid", "How training data is split among clients: evenly, or skewed by label"
    )
    classes_per_client: int = key(0, "How many a client has, with mild and severe; 0: 5 and 2", unit="classes", ge=0)
    dirichlet_alpha: float = key(
        0.0, "How evenly a class is spread over the clients that hold it, with mild and severe; 0: 3", ge=0
    )

    model: Annotated[str, OneOf(MODELS)] = key("cnn", "The network", section="Model and optimizer")
    cut: str = key("", "Qualified name of the first server-side module; empty: after the model's first stage")
    tail: str = key(
        "", "First module that is back on the clients, where labels and loss then stay (the U shape); empty: none"
    )
    method: Annotated[str, OneOf(METHODS)] = key(
        "parallel", "The way of splitting; all but parallel go with sampler ugs, batch-size is that of a client's batch"
    )
    secure_aggregation: bool = key(
        False, "Whether clients mask their parameter gradients, so that the server sees sums over all of a step only"
    )
    label_epsilon: float = key(
        0.0,
        "With a tail and sampler lds, lb or aligned: privacy of the noisy class counts that clients tell; 0: none",
        ge=0,
    )
    defences: str = key(
        "", f"What clients do to what leaves them, 'GaussianNoise(0.1), TopK(64)', say, of {', '.join(DEFENCES)}"
    )
    target_epsilon: float = key(
        0.0, "Differential privacy of the model: epsilon after num-server-rounds, by DP-SGD; 0: none", ge=0
    )
    dp_delta: float = key(1e-5, "With target-epsilon: delta", gt=0, lt=1)
    dp_examples: int = key(0, "With target-epsilon and sampler poisson: of all clients together", unit="examples", ge=0)
    dp_clip: float = key(1.0, "With target-epsilon: largest norm of one example's gradient", gt=0)
    optimizer: Annotated[str, OneOf(OPTIMIZERS)] = key("sgd", "The optimizer over both halves")
    learning_rate: float = key(0.02, "Step size of the optimizer", gt=0)
    momentum: float = key(0.9, "Momentum of sgd; adam has its own", ge=0, lt=1)
    seed: int = key(0, "Decides the first weights, the data split, every epoch's batches, and who is slow", ge=0)

    sampler: str = key(
        "ugs",
        f"How batches are put together: {', '.join(NAMED)}, or module:Class; lds, lb, aligned need delays",
        section="Sampler; its options are those of its class, empty for the class's own default",
    )
    batch_size: int = key(64, "Size of a step's global batch, over all clients", unit="examples", ge=1)
    sampler_delta: Option = key("", "lds: how hard stragglers are favoured")
    sampler_c: Option = key("", "lds: confidence in the prior")
    sampler_sample_size: Option = key("", "lds: labels that the posterior counts as seen")
    sampler_method: str = key("", "lb: auto, flow or greedy")
    sampler_targets: str = key("", "lb, aligned: random or stratified")
    sampler_tilt: Option = key("", "aligned: how far slow steps may lean toward slow clients' classes")
    sampler_order: str = key("", "lds, lb, aligned: shuffled or natural")

    delays: Annotated[str, OneOf(DELAY_MODELS)] = key(
        "none",
        "How slow clients are: on a virtual clock, or really with sleep; measured: as their replies show",
        section="Stragglers; the options are those of the model of delays, empty for its own default",
    )
    delays_fraction: Option = key("", "slow-fraction: share of slow clients")
    delays_latency: Option = key("", "Seconds a step of a fast client (slow-fraction), their median (lognormal)")
    delays_latency_factor: Option = key("", "slow-fraction: how many times as long a slow client takes")
    delays_latency_sigma: Option = key("", "lognormal: standard deviation of the logarithm")
    delays_per_sample: Option = key("", "Seconds an example; the rest as for the latency")
    delays_per_sample_factor: Option = key("", "slow-fraction: how many times as long a slow client takes")
    delays_per_sample_sigma: Option = key("", "lognormal: standard deviation of the logarithm")
    delays_path: Annotated[str, ABSOLUTE_PATH] = key(
        "", "csv: file with the columns client_id, latency, per_sample, read by the ServerApp"
    )
    simulated_delays: Annotated[str, OneOf(SIMULATED_DELAYS, or_empty=True)] = key(
        "", "With delays measured: how slow clients are made to look; delays-* are its numbers"
    )
    sleep: bool = key(False, "Whether clients really wait for their simulated delays")

    transport: Annotated[str, OneOf(TRANSPORTS)] = key(
        "auto",
        "How requests travel; auto: streams, or messages where a client cannot open its stream",
        section="Transport; over several machines, stream-bind and stream-address need what clients can reach",
    )
    stream_bind: str = key("127.0.0.1:0", "host:port that the ServerApp listens on; port 0: any free one")
    stream_address: str = key("", "host or host:port that clients connect to; empty: that of stream-bind")
    wire_dtype: Annotated[str, OneOf(WIRE_DTYPES)] = key(
        "float32", "Format of activations and their gradients on streams; all but float32 send fewer bytes"
    )

    tolerate_faults: bool = key(
        True,
        "Whether a step goes on without clients that fail; false: they end the run",
        section="Faults; see psl_flower.FaultPolicy",
    )
    step_timeout: float = key(
        0.0, "Time that clients have for one exchange of a step; 0: an hour, Flower's timeout", unit="seconds", ge=0
    )
    min_batch_fraction: float = key(0.5, "Share of a step's examples that must arrive, else it is redone", ge=0, le=1)
    patience: float = key(
        30.0, "Time without a completed step after which the rest of an epoch is given up", unit="seconds", ge=0
    )
    join: Annotated[str, OneOf(JOIN)] = key("epoch", "When new clients enter: with the next epoch, or the next step")
    non_finite_loss: Annotated[str, OneOf(NON_FINITE_LOSS)] = key(
        "stop", "Whether a step with a NaN or infinite loss ends the run, or is left out"
    )
    max_gradient_norm: float = key(
        0.0, "Largest norm of a client's mean gradient, others are scaled down to it; 0: no limit", ge=0
    )
    outlier_bound: float = key(
        10.0,
        "Robust deviations above the median that norms of what clients send may lie, in logarithms; 0, or with "
        "target-epsilon: any",
        ge=0,
    )

    checkpoint_every: int = key(
        0, "Time between two checkpoints within a round; 0: only at its end", section="Checkpoints", unit="steps", ge=0
    )
    keep_checkpoints: int = key(
        2, "How many of the last are kept, in the output-dir; 0: none are written", unit="checkpoints", ge=0
    )
    resume_from: str = key("", "latest in the output-dir, or the path of a checkpoint; empty: begin anew")

    device: str = key(
        "auto", "Where the server half computes: auto, or a torch device such as cuda:0", section="Machine and output"
    )
    precision: Annotated[str, OneOf(PRECISIONS)] = key(
        "full", "How all parts compute: in the weights' own precision, or under autocast to bfloat16"
    )
    threads: int = key(
        0,
        "How many torch has in the ServerApp; 0: as many as there are cores, see psl_flower.threads",
        unit="threads",
        ge=0,
    )
    loggers: str = key(
        "", f"What to write beside metrics.jsonl and CSV: {', '.join(LOGGERS)}, or both, separated by a comma"
    )
    output_dir: str = key("outputs", "Where results go, relative to the SuperLink's working directory", min_length=1)

    def __post_init__(self) -> None:
        self.fault_policy()
        self.stream_options()  # refuses addresses without a port
        parse_defences(self.defences)
        check_loggers(self.loggers)
        if self.partition == "iid" and (self.classes_per_client or self.dirichlet_alpha):
            raise ConfigError(
                "classes-per-client and dirichlet-alpha shape the partitions 'mild' and 'severe', got "
                f"{self.classes_per_client} and {self.dirichlet_alpha} with partition 'iid': choose another partition"
            )
        sampler = self.make_sampler()
        if self.dp_examples and not sampler.clients_draw:
            raise ConfigError(
                f"dp-examples goes with sampler 'poisson', got {self.dp_examples} with sampler {self.sampler!r}, which "
                "does not draw by chance: leave one out"
            )
        self._check_delays(sampler)

    @classmethod
    def read(cls, run_config: Mapping[str, Any]) -> RunConfig:
        """Read a Flower run config (``context.run_config``); keys it lacks keep their defaults.

        Raises
        ------
        ConfigError
            If a key is unknown or a value is refused.
        """
        names = {dashed(field.name): field.name for field in fields(cls)}
        for given in run_config:
            check_choice(given, "a configuration key", names)
        return cls(**{names[given]: value for given, value in run_config.items()})

    def as_run_config(self) -> dict[str, str | int | float]:
        """Return every key with its value, as `read` takes them."""
        return {dashed(field.name): getattr(self, field.name) for field in fields(self)}

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
                outlier_bound=None if self.outlier_bound == 0 or self.target_epsilon else self.outlier_bound,
            )
        except ConfigError as exc:
            raise ConfigError(dashed(str(exc))) from exc

    def private(self) -> DPSGD | None:
        """Return how the model is trained with differential privacy; None where it is not."""
        if not self.target_epsilon:
            return None
        return DPSGD.for_epsilon(
            self.target_epsilon,
            rounds=self.num_server_rounds,
            clip=self.dp_clip,
            batch_size=self.batch_size,
            examples=self._dp_examples(),
            delta=self.dp_delta,
        )

    def _dp_examples(self) -> int | None:
        """Return what steps are counted for, where they are drawn by chance."""
        if not self.make_sampler().clients_draw:
            return None
        if not self.dp_examples:
            raise ConfigError(
                f"with target-epsilon and sampler {self.sampler!r}, dp-examples must be the number of examples of all "
                "clients together, got 0"
            )
        return self.dp_examples

    def stream_options(self) -> StreamOptions:
        """Return how streams are configured."""
        with _naming("stream"):
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
        options = self._options("sampler", f"sampler {self.sampler!r}", kind, NAMED)
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

    def _delays_key(self) -> str:
        """Return the key that names the model of the simulated delays."""
        return "simulated-delays" if self.delays == "measured" else "delays"

    def _simulation(self) -> tuple[str, dict[str, Any]]:
        """Return the model of the simulated delays by name, and its options."""
        name = (self.simulated_delays or "none") if self.delays == "measured" else self.delays
        kind, chosen = DELAY_MODELS[name], f"{self._delays_key()} {name!r}"
        models = {other: model for other, model in DELAY_MODELS.items() if other != "measured"}
        options = self._options("delays", chosen, kind, models)
        if "path" in options:
            options["path"] = Path(options["path"]).expanduser()
        if "seed" in _parameters(kind):
            options["seed"] = self.seed
        with _naming("delays"):
            check_options(options, kind, chosen)
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
                    f"{dashed(field.name)} is for {group} {' and '.join(takers)}, got {value!r} with {chosen}: leave "
                    f"it empty, or choose one of those"
                )
            options[option] = value
        return options

    def _check_delays(self, sampler: Sampler) -> None:
        """Refuse what does not go together."""
        if self.simulated_delays and self.delays != "measured":
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
            raise ConfigError(
                f"sleep needs simulated delays to wait for, got none: set {self._delays_key()}, or leave sleep out"
            )
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
