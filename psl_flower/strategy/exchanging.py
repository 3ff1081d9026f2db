"""A Flower strategy that exchanges messages within ``start``, not once a round."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import wraps
from typing import NoReturn, ParamSpec

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from psl_flower.errors import ConfigError

P = ParamSpec("P")

_ALL_TAKE_PART = "every client that is there takes part, and the sampler decides how much: leave it out"
_EVALUATION = "evaluate_every says in how many rounds once all clients are evaluated, 0 is never"
_METRICS = 'the server computes metrics: pass metrics={"name": a function of (outputs, labels)}'
_OF_START = "is an argument of start(grid, initial_arrays, num_rounds=..., ...)"
_CONFIG = "pass train_config or evaluate_config to start; a callback is told of every round"
_OPTIMIZER = (
    "one optimizer steps the whole model: pass optimizer=lambda parameters: torch.optim.Adam(parameters, lr=...)"
)
_NOT_NEEDED = "there is no choice: leave it out"
_NODES = "it is called min_available_nodes"

# What Flower's strategies of one message a round are given, of today's API and of the one before it; docs/tutorial.md.
_INSTEAD = {
    **dict.fromkeys(("fraction_train", "min_train_nodes", "fraction_fit", "min_fit_clients"), _ALL_TAKE_PART),
    **dict.fromkeys(("fraction_evaluate", "min_evaluate_nodes", "min_evaluate_clients"), _EVALUATION),
    "min_available_clients": _NODES,
    "weighted_by_key": "every example counts the same: leave it out",
    **dict.fromkeys(("train_metrics_aggr_fn", "evaluate_metrics_aggr_fn"), _METRICS),
    **dict.fromkeys(("fit_metrics_aggregation_fn", "evaluate_metrics_aggregation_fn"), _METRICS),
    **dict.fromkeys(("arrayrecord_key", "configrecord_key"), _NOT_NEEDED),
    **dict.fromkeys(("on_fit_config_fn", "on_evaluate_config_fn"), _CONFIG),
    **dict.fromkeys(("initial_arrays", "num_rounds", "timeout", "train_config", "evaluate_config"), f"it {_OF_START}"),
    "evaluate_fn": f"it {_OF_START}",
    "initial_parameters": f"initial_arrays {_OF_START}",
    "accept_failures": "pass faults=FaultPolicy(...), which says what is tolerated",
    **dict.fromkeys(("eta", "eta_l", "beta_1", "beta_2", "tau"), _OPTIMIZER),
    **dict.fromkeys(("server_learning_rate", "server_momentum"), _OPTIMIZER),
    "proximal_mu": "clients keep no weights that could drift: leave it out",
}


def telling_instead(init: Callable[P, None]) -> Callable[P, None]:
    """Make an ``__init__`` tell of options of Flower's other strategies what stands for them here."""

    @wraps(init)
    def checked(*args: P.args, **options: P.kwargs) -> None:
        if foreign := [name for name in options if name in _INSTEAD]:
            told = "; ".join(f"{name}: {_INSTEAD[name]}" for name in foreign)
            raise ConfigError(f"ParallelSplitLearning does not take all that FedAvg does. {told}")
        init(*args, **options)

    return checked


class ExchangingStrategy(Strategy):
    """What a strategy of one message a round would override is refused here: `start` is all there is to call."""

    def _exchanges_in_start(self) -> NoReturn:
        raise ConfigError(
            "ParallelSplitLearning exchanges messages every mini-batch, not once a round: "
            "call strategy.start(grid, initial_arrays, num_rounds=...) instead"
        )

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Refuse: use `start`."""
        self._exchanges_in_start()

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Refuse: use `start`."""
        self._exchanges_in_start()

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Refuse: use `start`."""
        self._exchanges_in_start()

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Refuse: use `start`."""
        self._exchanges_in_start()
