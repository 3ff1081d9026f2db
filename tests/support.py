"""What several tests share: a small residual network, data for many clients, centralised training to compare with."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from psl_flower.callbacks import Callback
from psl_flower.samplers import (
    AlignedSampler,
    BatchPlan,
    Delays,
    FixedLocalSampler,
    FixedProportionalSampler,
    LatencyBudgetedSampler,
    LatentDirichletSampler,
    Population,
    Sampler,
    UniformGlobalSampler,
)
from psl_flower.stragglers import SlowFractionDelays

NUM_CLASSES = 4
SIDE = 6  # pixels


class Block(nn.Module):
    """A residual block, with the norm layer given.

    Its activation is smooth: where a ReLU's input is zero but for rounding, its gradient is not the same twice.
    """

    def __init__(self, channels: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), norm(channels)
        self.conv2, self.norm2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), norm(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.silu(self.norm1(self.conv1(x)))
        return nn.functional.silu(x + self.norm2(self.conv2(y)))


class TinyResNet(nn.Module):
    """GroupNorm before "layer2" (the cut), BatchNorm behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.layer1 = Block(4, lambda c: nn.GroupNorm(2, c))
        self.layer2 = Block(4, nn.BatchNorm2d)
        self.head = nn.Linear(4, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer2(self.layer1(self.stem(x))).mean(dim=(2, 3)))


def tiny_resnet(dtype: torch.dtype = torch.float32, seed: int = 0) -> TinyResNet:
    """Return a TinyResNet with weights that depend on `seed` alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return TinyResNet().to(dtype)


def tiny_resnet_64() -> TinyResNet:
    return tiny_resnet(torch.float64)


CUT = "layer2"


def client_sizes(num_clients: int) -> list[int]:
    """Return unequal sizes, 400 examples or so in all; one client has none if there are many."""
    base = max(24, 400 // num_clients)
    sizes = [base + 2 * (k % 3) for k in range(num_clients)]
    if num_clients > 4:
        sizes[3] = 0
    return sizes


def client_data(client: int, num_clients: int, dtype: torch.dtype = torch.float32) -> TensorDataset:
    """Return a client's training data: classes are skewed by client."""
    rng = np.random.default_rng([7, client])
    size = client_sizes(num_clients)[client]
    labels = (rng.integers(0, 2, size) + client) % NUM_CLASSES
    images = rng.normal(size=(size, 1, SIDE, SIDE)) + labels[:, None, None, None] * 0.5
    return TensorDataset(torch.tensor(images, dtype=dtype), torch.tensor(labels))


def load_partition(context):
    config = context.node_config
    return client_data(config["partition-id"], config["num-partitions"])


def load_partition_64(context):
    config = context.node_config
    return client_data(config["partition-id"], config["num-partitions"], torch.float64)


def load_partition_with_test(context):
    config = context.node_config
    k, num = config["partition-id"], config["num-partitions"]
    test = client_data(k, num)
    return client_data(k, num), TensorDataset(*(t[: len(t) // 2] for t in test.tensors))


def population(num_clients: int, sampler: Sampler | type[Sampler] = UniformGlobalSampler) -> Population:
    """Return what the server learns of these clients for a sampler."""
    data = [client_data(k, num_clients) for k in range(num_clients)]
    ids, counts, delays = np.arange(num_clients), None, None
    if sampler.needs_label_counts:
        counts = [np.bincount(d.tensors[1].numpy(), minlength=NUM_CLASSES) for d in data]
    if sampler.needs_delays:
        delays = DELAYS.delays(ids)
    return Population(ids, [len(d) for d in data], counts, delays)


def population_of(counts, latency, per_sample) -> Population:
    """Return clients with these class counts, (K, C), and delays."""
    counts = np.array(counts)
    return Population(np.arange(len(counts)), counts.sum(axis=1), counts, Delays(latency, per_sample))


def planned_batches(
    plan: BatchPlan, num_clients: int, *, seed: int, epoch: int, dtype: torch.dtype
) -> Iterable[tuple[Tensor, Tensor]]:
    """Yield the global batches of a plan as a centralised trainer would see them.

    Written from the rule in DESIGN (the order of an epoch's examples), not with the client's code.
    """
    data = [client_data(k, num_clients, dtype).tensors for k in range(num_clients)]
    orders = [np.random.default_rng([seed, epoch, k]).permutation(len(d[1])) for k, d in enumerate(data)]
    used = np.zeros(num_clients, dtype=int)
    used_by_class = np.zeros((num_clients, NUM_CLASSES), dtype=int)
    for step in plan:
        images, labels = [], []
        for i, (k, quota) in enumerate(zip(step.clients, step.quotas, strict=True)):
            if step.class_quotas is None:
                rows = orders[k][used[k] : used[k] + quota]
                used[k] += quota
            else:
                picked = []
                for c, n in enumerate(step.class_quotas[i]):
                    of_class = [j for j in orders[k] if data[k][1][j] == c]
                    picked += of_class[used_by_class[k, c] : used_by_class[k, c] + n]
                    used_by_class[k, c] += n
                rows = np.array(picked, dtype=int)
            images.append(data[k][0][rows])
            labels.append(data[k][1][rows])
        yield torch.cat(images), torch.cat(labels)


def train_centralised(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
) -> dict[str, Tensor]:
    """Train the uncut model on `batches` and return its state dict."""
    step = optimizer(model.parameters())
    model.train()
    for x, y in batches:
        step.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        step.step()
    return model.state_dict()


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.02, momentum=0.9)


def fast_sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def adam(parameters):
    return torch.optim.Adam(parameters, lr=0.01)


def state_of(result) -> dict[str, Tensor]:
    """Return the weights that a run has come to."""
    return result.arrays.to_torch_state_dict()


class Steps(Callback):
    """Keeps the record of every step."""

    def __init__(self) -> None:
        self.records = []

    def on_step(self, record) -> None:
        self.records.append(record)


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Return the largest absolute difference of two state dicts of the same names."""
    assert list(a) == list(b)
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


# --- exactness: what every carrier is compared by --------------------------------------------------------------------
@dataclass(frozen=True)
class ExactnessCase:
    """One training run of at least 20 steps, to be equal to a centralised one."""

    sampler_class: type[Sampler]
    num_clients: int
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
    dtype: torch.dtype
    tolerance: float

    @property
    def sampler(self) -> Sampler:
        """What the strategy's `sampler` must be; made when asked for, as most cases of a process never are."""
        return sampler_for_20_steps(self.sampler_class, self.num_clients)

    @property
    def delays(self) -> SlowFractionDelays | None:
        """What the strategy's `delays` must be."""
        return DELAYS if self.sampler.needs_delays else None

    def reference(self) -> dict[str, Tensor]:
        """Return the weights of centralised training on the same batches."""
        sampler = self.sampler
        plan = sampler.plan(population(self.num_clients, sampler), 0)
        batches = list(planned_batches(plan, self.num_clients, seed=sampler.seed, epoch=0, dtype=self.dtype))
        assert len(batches) >= 20
        return train_centralised(tiny_resnet(self.dtype), batches, self.optimizer)


DELAYS = SlowFractionDelays(fraction=0.25)
SAMPLERS = (
    FixedLocalSampler,
    FixedProportionalSampler,
    UniformGlobalSampler,
    LatentDirichletSampler,
    LatencyBudgetedSampler,
    AlignedSampler,
)


def exactness_cases(num_clients: int, transport: str = "streams") -> dict[str, ExactnessCase]:
    """Return the cases for a number of clients, by name: every sampler with SGD and Adam.

    Over messages, which are slow, only UGS has them all.
    """
    cases = {}
    for sampler_class in SAMPLERS:
        name, case = sampler_class.__name__, partial(ExactnessCase, sampler_class, num_clients)
        cases[f"{name}-sgd-64"] = case(sgd, torch.float64, 1e-9)
        if transport == "messages" and sampler_class is not UniformGlobalSampler:
            continue
        cases[f"{name}-adam-64"] = case(adam, torch.float64, 1e-9)
        if not sampler_class(batch_size=1).needs_delays:
            cases[f"{name}-sgd-32"] = case(sgd, torch.float32, 1e-5)
    return cases


def exactness_params(num_clients: Iterable[int]) -> list:
    """Return the (name, number of clients) of all cases, as parameters; what others tell as well is slow.

    Each sampler with SGD, and one with all optimizers and dtypes, is enough: samplers know neither. Two clients show
    what one and many do, and all samplers give one client the same.
    """
    import pytest  # here: Flower apps import this module, too

    quick = {(name, number) for name in exactness_cases(2, "messages") for number in num_clients if number > 2}
    quick.add(("UniformGlobalSampler-sgd-64", 1))
    return [
        pytest.param(name, number, marks=() if (name, number) in quick else pytest.mark.slow)
        for name in exactness_cases(2)
        for number in num_clients
    ]


def sampler_for_20_steps(sampler_class: type[Sampler], num_clients: int) -> Sampler:
    """Return the sampler with the largest batch that makes an epoch of 20 steps.

    None of its batches is tiny: batch norm over two or three examples amplifies rounding beyond any tolerance.
    """
    return sampler_class(_batch_size_for_20_steps(sampler_class, num_clients), seed=3)


@cache  # some plan for a second, and many tests ask
def _batch_size_for_20_steps(sampler_class: type[Sampler], num_clients: int) -> int:
    for batch_size in range(sum(client_sizes(num_clients)) // 8, 1, -1):
        sampler = sampler_class(batch_size, seed=3)
        plan = sampler.plan(population(num_clients, sampler), 0)
        if len(plan) >= 20 and plan.batch_sizes().min() >= 5:
            return batch_size
    raise ValueError(f"no batch size makes 20 steps of {sampler_class.__name__} with {num_clients} clients")
