"""The default app's clients."""

from __future__ import annotations

from typing import Any

import torch
from flwr.app import Context
from torch import nn

from psl_flower.app import demands
from psl_flower.app.task import cut_of, load_partition, make_model, make_optimizer, method_of
from psl_flower.client import split_client_app
from psl_flower.config import RunConfig


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


app = split_client_app(
    model_fn,
    cut=cut_fn,
    tail=tail_fn,
    data_fn=load_partition,
    method=method_fn,
    optimizer=optimizer_fn,
    secure_aggregation=demands.secure_aggregation,
    label_noise=demands.label_noise,
    defences=demands.defences,
    private=demands.private,
)
