"""The default app's clients."""

from __future__ import annotations

from typing import Any

import torch
from flwr.app import Context
from torch import nn

from psl_flower.app.datasets import SPECS
from psl_flower.app.task import cut_of, load_partition, make_model, make_optimizer, method_of
from psl_flower.client import split_client_app
from psl_flower.config import RunConfig
from psl_flower.privacy import DPSGD, Defence, LabelNoise, parse_defences


def model_fn(context: Context) -> nn.Module:
    """Build the model that the server trains."""
    return make_model(RunConfig.read(context.run_config))


def cut_fn(context: Context) -> str:
    """Return where the server cuts it."""
    return cut_of(RunConfig.read(context.run_config))


def method_fn(context: Context) -> str:
    """Return how the server splits."""
    return method_of(RunConfig.read(context.run_config))


def tail_fn(context: Context) -> str | None:
    """Return where the clients' tail begins, if there is one."""
    return RunConfig.read(context.run_config).tail or None


def optimizer_fn(parameters: Any, context: Context) -> torch.optim.Optimizer:
    """Make the optimizer of what clients train themselves: the server's."""
    return make_optimizer(RunConfig.read(context.run_config), parameters)


def secure_fn(context: Context) -> bool:
    """Return whether the server aggregates securely."""
    return RunConfig.read(context.run_config).secure_aggregation


def noise_fn(context: Context) -> LabelNoise | None:
    """Return how class counts are told where labels stay here."""
    config = RunConfig.read(context.run_config)
    classes = SPECS[config.dataset].num_classes
    return LabelNoise(epsilon=config.label_epsilon, classes=classes) if config.label_epsilon else None


def defences_fn(context: Context) -> tuple[Defence, ...]:
    """Return what clients do to what leaves them."""
    return parse_defences(RunConfig.read(context.run_config).defences)


def private_fn(context: Context) -> DPSGD | None:
    """Return how the model is trained with differential privacy."""
    return RunConfig.read(context.run_config).private()


app = split_client_app(
    model_fn,
    cut=cut_fn,
    tail=tail_fn,
    data_fn=load_partition,
    method=method_fn,
    optimizer=optimizer_fn,
    secure_aggregation=secure_fn,
    label_noise=noise_fn,
    defences=defences_fn,
    private=private_fn,
)
