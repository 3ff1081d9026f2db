"""A Flower strategy that exchanges messages within ``start``, not once a round."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NoReturn

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from psl_flower.errors import ConfigError


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
