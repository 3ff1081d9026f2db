"""What one training of an experiment is: a run's configuration, and what only experiments have."""

from __future__ import annotations

from dataclasses import dataclass

from psl_flower.checks import check_choice, check_int
from psl_flower.config import RunConfig
from psl_flower.errors import ConfigError
from psl_flower.precision import FULL

ALGORITHMS = ("psl", "centralised", "sl", "splitfed-v1", "splitfed-v2", "fedavg")

# Keys that say how real clients are reached, kept waiting or mistrusted, and the one value that goes without them.
_WITHOUT_CLIENTS = {
    "method": "parallel",
    "tail": "",
    "sleep": False,
    "wire_dtype": "float32",
    "non_finite_loss": "stop",
    "max_gradient_norm": 0.0,
    "checkpoint_every": 0,
    "resume_from": "",
}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One training: an algorithm on the data, model, optimizer, delays and seed of a run's configuration.

    Parameters
    ----------
    config : RunConfig
        As for ``flwr run``; a round is an epoch of the pooled data. `sampler` is read by "psl" alone. What concerns
        transport, faults, checkpoints and output is not read: there are no clients to reach, no files are written.
    num_clients : int
        K.
    algorithm : str
        One of `ALGORITHMS`.
    local_batch_size : int
        Examples in a batch of one client, for the algorithms whose clients train on batches of their own ("psl" and
        "centralised" do not). 0: automatic, see `batch_size_of_clients`.
    local_epochs : int
        Passes over a client's data in a round, for the same algorithms.
    examples : int
        Train on that many examples of the training set, a subset that depends on the seed alone; 0: on all of it.
    double : bool
        Whether weights, images and all that is computed are in float64, for comparisons.
    channels_last : bool
        Whether images and weights lie in the memory format that tensor cores prefer. The numbers are the same but for
        rounding.

    Raises
    ------
    ConfigError
        If a value is out of range, or does not go with the others.
    """

    config: RunConfig
    num_clients: int
    algorithm: str = "psl"
    local_batch_size: int = 0
    local_epochs: int = 1
    examples: int = 0
    double: bool = False
    channels_last: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.config, RunConfig):
            raise ConfigError(f"config must be a RunConfig, got {self.config!r:.80}")
        check_choice(self.algorithm, "algorithm", ALGORITHMS)
        least = {"num_clients": 1, "local_batch_size": 0, "local_epochs": 1, "examples": 0}
        for name, minimum in least.items():
            object.__setattr__(self, name, check_int(getattr(self, name), name, least=minimum))
        for name in ("double", "channels_last"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be true or false, got {getattr(self, name)!r}")
        if self.double and self.config.precision != FULL:
            raise ConfigError(
                f"double computes in float64, precision {self.config.precision!r} does not: leave one out"
            )
        if self.config.delays == "measured":
            raise ConfigError("delays 'measured' needs clients that take time: simulate them, or leave delays out")
        for name, value in _WITHOUT_CLIENTS.items():
            if getattr(self.config, name) != value:
                raise ConfigError(
                    f"{name.replace('_', '-')} {getattr(self.config, name)!r} needs clients apart from the server, "
                    f"experiments have none: leave it {value!r}"
                )
        if self.algorithm == "psl" and self.config.make_sampler().clients_draw:
            raise ConfigError(
                f"sampler {self.config.sampler!r} has clients draw their examples themselves, experiments have none: "
                "use another"
            )
        needed = max(self.config.batch_size, self.num_clients)
        if self.examples and self.examples < needed:
            raise ConfigError(
                f"examples must be at least {needed}, the larger of batch-size and num_clients, got {self.examples}"
            )

    @property
    def batch_size_of_clients(self) -> int:
        """Examples in a batch of one client, at most.

        Automatic is the global batch size B for sequential split learning, where one client's batch is all that an
        update sees, and min(B, 32) for the algorithms that average: with B, a client that holds N/K examples would
        make N/(K B) updates between two averages, 3 at N = 50,000 and K = B = 128, and averaging lives on having more
        (McMahan et al. 2017, table 2); with B/K, which matches the updates a round to those of a global batch, a client
        would train on single examples. 32 is what Flower's own examples of FedAvg use.
        """
        if self.local_batch_size:
            return self.local_batch_size
        batch_size = self.config.batch_size
        return batch_size if self.algorithm == "sl" else min(batch_size, 32)
