"""A real training to be attacked: clients, strategy and carrier of the package, and a recording of what crosses."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, Context
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from psl_flower.audit.recording import Recording, RecordingGrid, witness
from psl_flower.audit.scene import Scene
from psl_flower.audit.target_epsilon import TargetEpsilon, apart
from psl_flower.client import split_client_app
from psl_flower.methods import SplitMethod
from psl_flower.privacy import Defence
from psl_flower.samplers.base import Sampler
from psl_flower.samplers.poisson import PoissonGlobalSampler
from psl_flower.samplers.uniform import UniformGlobalSampler
from psl_flower.split import replace_batch_norm
from psl_flower.split.model import cut_model
from psl_flower.strategy import ParallelSplitLearning
from psl_flower.typing import IntArray

Data = tuple[Tensor, Tensor]  # (N, ...) inputs, (N,) int64 labels


@dataclass(frozen=True, eq=False, kw_only=True)
class Setting:
    """What is trained.

    Parameters
    ----------
    model : nn.Module
        With its first weights.
    cut, tail : str, optional
    train, test : Data
    num_classes : int
    num_clients : int
        K; training data is dealt out to them at random, evenly.
    num_shadow : int
        How many of them are in league with the server.
    num_rounds, batch_size : int
    optimizer : callable
    secure_aggregation : bool
    defences : sequence
        Of the clients; `TargetEpsilon` among them is of the model.
    seed : int
    """

    model: nn.Module
    cut: str | None
    tail: str | None = None
    train: Data
    test: Data
    num_classes: int
    num_clients: int = 8
    num_shadow: int = 4
    num_rounds: int = 3
    batch_size: int = 64
    optimizer: Callable[[Any], torch.optim.Optimizer]
    secure_aggregation: bool = False
    defences: Sequence[Defence | TargetEpsilon] = ()
    seed: int = 0


@dataclass(frozen=True, eq=False, kw_only=True)
class Rehearsal:
    """What came of a training.

    Parameters
    ----------
    scene : Scene
        For attackers.
    accuracy : float
        On the clients' test data, of what they send of it (with all that they do to it), by their true labels.
    bytes_a_round : int
        Of tensors, both ways.
    seconds : float
        Of the training, of a processor: server and all clients, recording included.
    epsilon : float or None
        Of the model, where it is trained with differential privacy.
    """

    scene: Scene
    accuracy: float
    bytes_a_round: int
    seconds: float
    epsilon: float | None = None


def rehearse(setting: Setting, server_method: SplitMethod | None = None, *, from_round: int | None = None) -> Rehearsal:
    """Train, and record the last round.

    Parameters
    ----------
    setting : Setting
    server_method : SplitMethod, optional
        The server's end, where it does not follow the protocol; the clients have the honest one.
    from_round : int, optional
        The first round that is recorded, from 1; by default the last.
    """
    defences, target = apart(setting.defences)
    model, private = prepared(setting.model, setting.cut, setting.tail), None
    sampler: Sampler = UniformGlobalSampler(batch_size=setting.batch_size, seed=setting.seed)
    if target is not None:
        model, sampler = replace_batch_norm(model), PoissonGlobalSampler(setting.batch_size, seed=setting.seed)
        examples = len(setting.train[1])
        private = target.options(rounds=setting.num_rounds, batch_size=setting.batch_size, examples=examples)
    rounds = setting.num_rounds
    recording = Recording(first_epoch=(rounds if from_round is None else from_round) - 1)
    app = split_client_app(
        lambda: model,
        cut=setting.cut,
        tail=setting.tail,
        data_fn=_data_fn(setting),
        client_class=witness(recording),
        secure_aggregation=setting.secure_aggregation,
        defences=defences,
        private=private,
        device="cpu",
    )
    strategy = ParallelSplitLearning(
        model,
        cut=setting.cut,
        tail=setting.tail,
        method=server_method,
        sampler=sampler,
        private=private,
        optimizer=setting.optimizer,
        secure_aggregation=setting.secure_aggregation,
        transport="messages",
        evaluate_every=setting.num_rounds,
        min_available_nodes=setting.num_clients,
        device="cpu",
    )
    grid, begin = RecordingGrid(app, setting.num_clients, recording), time.process_time()
    result = strategy.start(grid, ArrayRecord(model.state_dict()), num_rounds=rounds)
    seconds = time.process_time() - begin
    halves = cut_model(model, setting.cut, setting.tail)
    halves.load(result.arrays.to_torch_state_dict())
    told = result.train_metrics_clientapp[rounds]
    scene = Scene(
        recording=recording,
        halves=halves,
        test=setting.test,
        shadow=frozenset(range(setting.num_shadow)),
        num_classes=setting.num_classes,
        seed=setting.seed,
    )
    return Rehearsal(
        scene=scene,
        accuracy=_accuracy(scene, result.evaluate_metrics_clientapp[rounds]),
        bytes_a_round=int(told["bytes_sent"]) + int(told["bytes_received"]),  # type: ignore[arg-type]
        seconds=seconds,
        epsilon=None if private is None else float(told["epsilon"]),  # type: ignore[arg-type]
    )


def _accuracy(scene: Scene, told: Mapping[str, Any]) -> float:
    """Return the share of right answers; what the clients tell, where the server cannot see what the model says."""
    found = scene.answers(test=True)
    return float(told["accuracy"]) if found is None else float((found[0] == found[1].labels).mean())


def prepared(model: nn.Module, cut: str | None, tail: str | None) -> nn.Module:
    """Return a model that can be cut there: a copy without batch norm on the clients; as it is, if cut by hand."""
    return replace_batch_norm(model, before=cut, tail=tail) if cut else model


def dealt(setting: Setting) -> tuple[list[IntArray], list[IntArray]]:
    """Return which training and which test examples each client holds: dealt out at random, evenly."""
    rng = np.random.default_rng(setting.seed)
    train, test = (
        np.array_split(rng.permutation(len(labels)), setting.num_clients) for _, labels in (setting.train, setting.test)
    )
    return train, test


def _data_fn(setting: Setting) -> Callable[[Context], tuple[TensorDataset, TensorDataset]]:
    shares = dealt(setting)

    def data(context: Context) -> tuple[TensorDataset, TensorDataset]:
        client = int(context.node_config["partition-id"])
        train, test = (
            TensorDataset(inputs[torch.from_numpy(of[client])], labels[torch.from_numpy(of[client])])
            for (inputs, labels), of in zip((setting.train, setting.test), shares, strict=True)
        )
        return train, test

    return data
