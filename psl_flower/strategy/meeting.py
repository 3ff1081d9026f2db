"""The clients as one call of a strategy meets them: who they are, what they are sent, and what is done if they fail."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

import numpy as np
from flwr.app import ConfigRecord
from flwr.serverapp import Grid

from psl_flower.checks import check_mapping
from psl_flower.errors import ConfigError
from psl_flower.exchange import Carrier, Clients
from psl_flower.faults import FaultPolicy
from psl_flower.flower import is_deployment
from psl_flower.methods import SplitMethod
from psl_flower.privacy import DPSGD, SecureAggregation
from psl_flower.protocol import Config
from psl_flower.samplers.base import Sampler
from psl_flower.server import LocalBackend
from psl_flower.split import Halves, signature
from psl_flower.strategy.evaluation import Evaluator
from psl_flower.strategy.kept import KeptRows
from psl_flower.strategy.labels import LabelCounts
from psl_flower.strategy.membership import Membership
from psl_flower.strategy.private import default_mistakes
from psl_flower.strategy.secure import SecureSums
from psl_flower.strategy.summary import RunSummary


def config_values(config: Mapping[str, Any] | None, name: str) -> Config:
    """Return a configuration as Flower's ConfigRecord has it; numpy's numbers as Python's.

    Raises
    ------
    ConfigError
        If a value is of a type that Flower does not send.
    """
    found = check_mapping(config, name)
    plain = {key: value.item() if isinstance(value, np.generic) else value for key, value in found.items()}
    for key, value in plain.items():
        try:
            ConfigRecord({key: value})
        except (TypeError, ValueError):
            raise ConfigError(
                f"{name} must hold numbers, strings, bytes or lists of one of these by name, as a ConfigRecord, "
                f"got {key!r:.80}: {value!r:.80}"
            ) from None
    return plain


class Settings(Protocol):
    """What is read of a strategy."""

    method: SplitMethod
    halves: Halves
    sampler: Sampler
    faults: FaultPolicy
    private: DPSGD | None
    secure_aggregation: SecureAggregation | None
    label_counts: LabelCounts
    evaluate_batch_size: int
    metrics: dict[str, Any]
    cache_activations: bool


@dataclass(frozen=True, eq=False)
class Meeting:
    """What training, evaluation and prediction share in one call of a strategy.

    Parameters
    ----------
    membership : Membership
    policy : FaultPolicy
    config : dict
        Sent to the clients.
    summary : RunSummary
    secure : SecureSums or None
        Where clients mask their sums.
    kept : KeptRows or None
        What a frozen head made of examples, where the server keeps it.
    """

    membership: Membership
    policy: FaultPolicy
    config: Config
    summary: RunSummary
    secure: SecureSums | None
    kept: KeptRows | None

    @classmethod
    def of(
        cls,
        strategy: Settings,
        grid: Grid,
        carrier: Carrier,
        config: Mapping[str, Any] | None,
        *,
        once: bool = False,
    ) -> Self:
        """Return what a strategy's settings say, `once` if each example is asked for once; nobody is asked yet."""
        deployment, options = is_deployment(grid), strategy.secure_aggregation
        mistakes = strategy.faults.mistakes or default_mistakes(strategy.private, deployment)
        policy, config = replace(strategy.faults, mistakes=mistakes), config_values(config, "train_config")
        secure = None if options is None else SecureSums(options, policy.max_gradient_norm)
        clients = Clients(
            carrier,
            label_counts=strategy.sampler.needs_label_counts,
            given_counts=strategy.label_counts,
            config=config,
            tolerate=policy.tolerate,
            tolerate_mistakes=policy.mistakes != "stop",
            may_grow=deployment,
            method=strategy.method.name,
            private="" if strategy.private is None else repr(strategy.private),
            model=signature(strategy.halves),
            session="" if secure is None else secure.session,
        )
        kept = KeptRows.of(clients, strategy.halves) if strategy.cache_activations and not once else None
        return cls(Membership(clients), policy, config, RunSummary(), secure, kept)

    def shared(self) -> dict[str, Any]:
        """Return what whoever asks clients is given of it, as arguments."""
        names = "policy", "config", "summary", "secure", "kept"
        return {name: getattr(self, name) for name in names}

    def evaluator(
        self,
        strategy: Settings,
        backend: LocalBackend,
        timeout: float,
        evaluate_config: Mapping[str, Any] | None,
    ) -> Evaluator:
        """Return what evaluates the model of a backend."""
        return Evaluator(
            strategy.method,
            backend,
            self.membership,
            batch_size=strategy.evaluate_batch_size,
            timeout=timeout,
            evaluate_config=config_values(evaluate_config, "evaluate_config"),
            metrics=strategy.metrics,
            **self.shared(),
        )
