"""Parallel split learning for Flower: activations and gradients exchanged every mini-batch, batch quotas by the server.

See README.md for the tour. Samplers, metrics and splits are pure numpy: ``psl_flower.samplers`` and its neighbours
import neither torch nor flwr, and the names here are loaded on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from psl_flower.callbacks import BestModel, Callback, EarlyStopping
    from psl_flower.client import SplitClient, split_client_app
    from psl_flower.data import PadTexts
    from psl_flower.errors import (
        BadRowsError,
        ConfigError,
        CutError,
        DivergenceError,
        LabelError,
        MembershipError,
        ProtocolError,
        PSLError,
        StepError,
        StopTraining,
    )
    from psl_flower.exchange.streams import StreamOptions
    from psl_flower.faults import FaultPolicy
    from psl_flower.grid import InProcessGrid
    from psl_flower.partition import ExtendedDirichletPartitioner
    from psl_flower.privacy import SecureAggregation
    from psl_flower.samplers import (
        AlignedSampler,
        BatchPlan,
        Delays,
        FixedLocalSampler,
        FixedProportionalSampler,
        LatencyBudgetedSampler,
        LatentDirichletSampler,
        PlanStep,
        PoissonGlobalSampler,
        Population,
        Sampler,
        UniformGlobalSampler,
    )
    from psl_flower.server import accumulate, causal_lm_loss
    from psl_flower.split import Cut, SplitModel, export_halves, replace_batch_norm, split_module
    from psl_flower.strategy import ParallelSplitLearning

__version__ = "0.1.0"

_HOME = {
    "callbacks": ["BestModel", "Callback", "EarlyStopping"],
    "client": ["SplitClient", "split_client_app"],
    "data": ["PadTexts"],
    "errors": [
        "BadRowsError",
        "ConfigError",
        "CutError",
        "DivergenceError",
        "LabelError",
        "MembershipError",
        "PSLError",
        "ProtocolError",
        "StepError",
        "StopTraining",
    ],
    "faults": ["FaultPolicy"],
    "grid": ["InProcessGrid"],
    "partition": ["ExtendedDirichletPartitioner"],
    "exchange.streams": ["StreamOptions"],
    "privacy": ["SecureAggregation"],
    "samplers": [
        "AlignedSampler",
        "BatchPlan",
        "Delays",
        "FixedLocalSampler",
        "FixedProportionalSampler",
        "LatencyBudgetedSampler",
        "LatentDirichletSampler",
        "PlanStep",
        "PoissonGlobalSampler",
        "Population",
        "Sampler",
        "UniformGlobalSampler",
    ],
    "server": ["accumulate", "causal_lm_loss"],
    "split": ["Cut", "SplitModel", "export_halves", "replace_batch_norm", "split_module"],
    "strategy": ["ParallelSplitLearning"],
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "AlignedSampler",
    "BadRowsError",
    "BatchPlan",
    "BestModel",
    "Callback",
    "ConfigError",
    "Cut",
    "CutError",
    "Delays",
    "DivergenceError",
    "EarlyStopping",
    "ExtendedDirichletPartitioner",
    "FaultPolicy",
    "FixedLocalSampler",
    "FixedProportionalSampler",
    "InProcessGrid",
    "LabelError",
    "LatencyBudgetedSampler",
    "LatentDirichletSampler",
    "MembershipError",
    "PSLError",
    "PadTexts",
    "ParallelSplitLearning",
    "PlanStep",
    "PoissonGlobalSampler",
    "Population",
    "ProtocolError",
    "Sampler",
    "SecureAggregation",
    "SplitClient",
    "SplitModel",
    "StepError",
    "StopTraining",
    "StreamOptions",
    "UniformGlobalSampler",
    "accumulate",
    "causal_lm_loss",
    "export_halves",
    "replace_batch_norm",
    "split_client_app",
    "split_module",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
