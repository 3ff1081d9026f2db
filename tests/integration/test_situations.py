"""What people bring, a case of each kind: it trains as with all data in one place, or is refused in a sentence.

The right value is centralised training on the same examples, the loss of all test data pooled, or a count.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import random
import re
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flwr.app import ArrayRecord, MetricRecord
from support import fast_sgd as sgd
from support import largest_difference
from torch import nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset, default_collate, random_split

from psl_flower import (
    FaultPolicy,
    InProcessGrid,
    ParallelSplitLearning,
    SplitModel,
    UniformGlobalSampler,
    split_client_app,
)
from psl_flower.callbacks import BestModel, EarlyStopping
from psl_flower.errors import ConfigError, CutError, DivergenceError, MembershipError, StepError
from psl_flower.samplers import AlignedSampler, Population
from psl_flower.split import cut_model
from psl_flower.stragglers import SlowFractionDelays
from psl_flower.torchvision_compat import import_torchvision

SIZES = (20, 30, 40)
TOTAL = sum(SIZES)
GENERATOR = torch.Generator().manual_seed(1)
X = torch.randn(TOTAL, 8, generator=GENERATOR, dtype=torch.float64)
Y = torch.randint(0, 3, (TOTAL,), generator=GENERATOR)
TOKENS = torch.randint(0, 20, (TOTAL, 6), generator=GENERATOR)
TAGS = torch.randint(0, 4, (TOTAL, 6), generator=GENERATOR)


class Net(nn.Module):
    """A body of one's own, cut before the head."""

    def __init__(self, body=None, outputs=3):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 16), nn.SiLU()) if body is None else body
        self.head = nn.Linear(16, outputs)
        self.double()

    def forward(self, x):
        return self.head(self.body(x))


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.middle, self.head = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.double()

    def forward(self, tokens):
        return self.head(self.middle(self.embedding(tokens)).tanh()).transpose(1, 2)


class Three(nn.Module):
    """For a U shape: cut before the middle, its tail is the head."""

    def __init__(self, head=None, outputs=3):
        super().__init__()
        self.body, self.middle = nn.Linear(8, 16), nn.Sequential(nn.SiLU(), nn.Linear(16, 8))
        self.head = nn.Linear(8, outputs) if head is None else head
        self.double()

    def forward(self, x):
        return self.head(self.middle(self.body(x)).tanh())


class Lambda(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.linear, self.function = nn.Linear(8, 16), function

    def forward(self, x):
        return self.function(self.linear(x))


def parts(*tensors):
    """Return a dataset for each client."""
    bounds = np.cumsum((0, *SIZES))
    return [TensorDataset(*(t[a:b] for t in tensors)) for a, b in itertools.pairwise(bounds)]


def partition(context):
    return context.node_config["partition-id"]


def fresh(model_fn):
    torch.manual_seed(0)
    return model_fn()


def train(
    datasets,
    model_fn=Net,
    *,
    tests=None,
    rounds=1,
    cut="head",
    tail=None,
    client=None,
    start=None,
    grid=InProcessGrid,
    **options,
):
    """Train split; return the result."""

    def data_fn(context):
        train = datasets(context) if callable(datasets) else datasets[partition(context)]
        return train if tests is None else (train, tests[partition(context)])

    client = dict(client or {})
    if tail is not None:  # the loss is the clients'
        client |= {name: options.pop(name) for name in ("loss", "classification") if name in options}
    app = split_client_app(model_fn, cut=cut, tail=tail, data_fn=data_fn, **client)
    options.setdefault("sampler", UniformGlobalSampler(batch_size=16, seed=0))
    strategy = ParallelSplitLearning(fresh(model_fn), cut=cut, tail=tail, **options)
    nodes = grid(app, len(SIZES) if callable(datasets) else len(datasets))
    return strategy.start(
        nodes, ArrayRecord(fresh(model_fn).state_dict()), num_rounds=rounds, timeout=60, **(start or {})
    )


def centralised(datasets, model_fn=Net, *, rounds=1, loss=F.cross_entropy, optimizer=sgd, after_step=None):
    """Return the weights of the whole model, trained on the same batches, row by row as each dataset gives them."""
    model = fresh(model_fn).train()
    stepper = optimizer([p for p in model.parameters() if p.requires_grad])
    scheduler = after_step(stepper) if after_step else None
    sampler = UniformGlobalSampler(batch_size=16, seed=0)
    for epoch in range(rounds):
        orders = [iter(np.random.default_rng([0, epoch, k]).permutation(len(d))) for k, d in enumerate(datasets)]
        for step in sampler.plan(Population(np.arange(len(datasets)), [len(d) for d in datasets]), epoch):
            rows = [
                datasets[k][int(next(orders[k]))]
                for k, n in zip(step.clients, step.quotas, strict=True)
                for _ in range(n)
            ]
            *inputs, labels = default_collate(rows)
            stepper.zero_grad()
            loss(model(*inputs), labels).backward()
            stepper.step()
            if scheduler:
                scheduler.step()
    return model.state_dict()


def check_exact(datasets, model_fn=Net, *, loss=F.cross_entropy, optimizer=sgd, rounds=1, **options):
    result = train(datasets, model_fn, loss=loss, optimizer=optimizer, rounds=rounds, **options)
    weights = result.arrays.to_torch_state_dict()
    reference = centralised(datasets, model_fn, loss=loss, optimizer=optimizer, rounds=rounds)
    assert largest_difference(weights, reference) < 1e-9
    assert largest_difference(weights, fresh(model_fn).state_dict()) > 1e-3  # it did train
    return result


def check_told(result, tensors, model_fn, loss):
    """The loss that is told of the test data is that of all of them pooled, with the weights of the end."""
    model = fresh(model_fn)
    model.load_state_dict(result.arrays.to_torch_state_dict())
    *inputs, labels = tensors
    told = list(result.evaluate_metrics_clientapp.values())[-1]
    with torch.no_grad():
        assert told["loss"] == pytest.approx(loss(model.eval()(*inputs), labels).item(), rel=1e-9)
    return told


U_SHAPE = {"cut": "middle", "tail": "head"}


def unseen(result):
    return [metrics["examples_unseen"] for metrics in result.train_metrics_clientapp.values()]


# --- A: the forward and the backward pass of a step agree ------------------------------------------------------------
class Checkpointed(Net):
    reentrant = False

    def forward(self, x):
        return self.head(checkpoint(self.body, x, use_reentrant=self.reentrant))


def test_activation_checkpointing():
    check_exact(parts(X, Y), Checkpointed)


def test_the_other_kind_of_checkpointing_is_refused():
    class Reentrant(Checkpointed):
        reentrant = True

    with pytest.raises(CutError, match="use_reentrant=False"):
        train(parts(X, Y), Reentrant)


class Augmented(Dataset):
    def __init__(self, offset, size):
        self.offset, self.size = offset, size

    def __len__(self):
        return self.size

    def __getitem__(self, i):
        noise = random.random() + np.random.rand(8) + torch.rand(8, dtype=torch.float64).numpy()  # noqa: NPY002
        return X[self.offset + i] + torch.from_numpy(noise), Y[self.offset + i]


def test_augmentation_is_the_same_on_every_carrier():
    data = [Augmented(0, 20), Augmented(20, 30), Augmented(50, 40)]
    before = random.getstate()
    weights = [train(data, transport=t).arrays.to_torch_state_dict() for t in ("messages", "streams")]
    assert largest_difference(*weights) < 1e-12
    assert random.getstate() == before


def test_compiled_submodules():
    check_exact(parts(X, Y), lambda: Net(torch.compile(nn.Linear(8, 16), backend="eager")))
    model = Net()
    model.compile(backend="eager")  # in place: a copy goes on without
    assert cut_model(model, "head").client(X)[0].shape == (TOTAL, 16)
    with pytest.raises(ConfigError, match=r"torch\.compile has wrapped"):
        train(parts(X, Y), lambda: torch.compile(Net(), backend="eager"))


# --- B: a dataset's own items are what is trained on -----------------------------------------------------------------
class Turned(TensorDataset):
    """Transforms inputs and labels."""

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return 2 * x + 1, 2 - y


class Listed(Turned):
    """Lists its raw labels, as torchvision's datasets do beside a target_transform."""

    def __init__(self, *tensors):
        super().__init__(*tensors)
        self.targets = tensors[1].tolist()


def halved(dataset):
    return random_split(dataset, [len(dataset) - 6, 6], generator=torch.Generator().manual_seed(0))[0]


SHAPES = {
    "subclass": lambda d: d,
    "random_split": halved,
    "subset of a subset": lambda d: Subset(Subset(d, torch.arange(18)), np.arange(3, 15)),
    "concatenation": lambda d: ConcatDataset([d, d]),
    "list": lambda d: [d[i] for i in range(len(d))],
}


@pytest.mark.parametrize("shape", SHAPES)
def test_items_are_read(shape):
    check_exact([SHAPES[shape](Turned(*d.tensors)) for d in parts(X, Y)])


def test_samplers_by_class_count_the_labels_of_items():
    data = [Listed(*d.tensors) for d in parts(X, torch.where(Y == 2, 0, Y))]  # of classes 0 and 1, as items 2 and 1
    sampler = AlignedSampler(batch_size=16, seed=0)
    result = train(data, sampler=sampler, delays=SlowFractionDelays(fraction=0.25))
    assert unseen(result) == [0]
    # the sampler's target for class 0 is met by what are really items of class 0 only if raw labels are not believed
    assert result.train_metrics_clientapp[1]["deviation_mean"] < 0.5


def test_getitems_must_return_rows():
    class Batches(TensorDataset):
        def __getitem__(self, index):
            return super().__getitem__(index)

        def __getitems__(self, indices):
            return super().__getitem__(indices)

    with pytest.raises(StepError, match=r"__getitems__ must return a list .*get_batch"):
        train([Batches(*d.tensors) for d in parts(X, Y)])


# --- C: optimizers and schedulers ------------------------------------------------------------------------------------
def groups(parameters):
    matrices, vectors = ([p for p in parameters if (p.ndim > 1) is kind] for kind in (True, False))
    return torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "lr": 0.05}], lr=0.01)


@pytest.mark.parametrize("optimizer", [groups, lambda p: torch.optim.Adam(p, lr=0.01, foreach=True)])
def test_optimizers(optimizer):
    check_exact(parts(X, Y), optimizer=optimizer, rounds=2)


def test_frozen_layers():
    def frozen():
        model = Net(nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 16)))
        return model.requires_grad_(True) if model.body[0].requires_grad_(False) is None else model

    weights = check_exact(parts(X, Y), frozen).arrays.to_torch_state_dict()
    assert torch.equal(weights["body.0.weight"], fresh(frozen).state_dict()["body.0.weight"])


def test_a_scheduler_by_step():
    def warmup(optimizer):
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 10))

    result = train(
        parts(X, Y), optimizer=sgd, rounds=2, scheduler=lambda o: {"scheduler": warmup(o), "interval": "step"}
    )
    reference = centralised(parts(X, Y), rounds=2, after_step=warmup)
    assert largest_difference(result.arrays.to_torch_state_dict(), reference) < 1e-9


class NeedsClosure(torch.optim.SGD):
    def step(self, closure=None):
        if closure is None:
            raise RuntimeError("sharpness-aware steps need a closure")


def elsewhere(parameters):
    return torch.optim.SGD(Net().parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"optimizer": elsewhere}, "built over the parameters it is given"),
        ({"optimizer": lambda p: (sgd(p), None)}, "one torch optimizer"),
        (
            {"optimizer": lambda model: sgd(model.parameters())},
            r"optimizer failed: .*called with the list of parameters",
        ),
        (
            {"scheduler": torch.optim.lr_scheduler.StepLR},
            "scheduler failed: .*'step_size'; it is called with the optim",
        ),
        ({"optimizer": torch.optim.LBFGS}, "needs a closure"),
        ({"optimizer": lambda p: NeedsClosure(p, lr=0.1)}, "NeedsClosure, failed: .*need a closure"),
        (
            {
                "scheduler": lambda o: {
                    "scheduler": torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=3),
                    "interval": "step",
                }
            },
            "the scheduler, OneCycleLR, failed: .*total steps is 3",
        ),
        ({"loss": lambda o, y: F.cross_entropy(o, y).detach()}, "the loss has no gradient"),
        ({"loss": nn.CrossEntropyLoss(reduction="none")}, r"must be the mean over the batch, .* got shape \(\d+,\)"),
    ],
)
def test_what_cannot_train_is_refused(options, text):
    with pytest.raises(ConfigError, match=text):
        train(parts(X, Y), **options)
    if "loss" in options:
        with pytest.raises(StepError, match=rf"client 0 \(node 2\) and 2 others likewise: .*{text}"):
            train(parts(X, Y), Three, **options, **U_SHAPE)


@pytest.mark.parametrize(
    ("loss", "text"),
    [
        ("cross_entropy", "must be callable, got 'cross_entropy': pass a function of"),
        (nn.CrossEntropyLoss, r"got the class CrossEntropyLoss: call it, loss=CrossEntropyLoss\(\)"),
        (lambda o, y, weight: F.cross_entropy(o, y), r"takes \(o, y, weight\): missing a required argument: 'weight'"),
    ],
)
def test_what_is_no_loss_is_told_on_both_sides(loss, text):
    with pytest.raises(ConfigError, match=text):
        ParallelSplitLearning(Net(), cut="head", loss=loss)
    with pytest.raises(ConfigError, match=text):
        split_client_app(Net, cut="head", data_fn=lambda context: None, loss=loss)


def test_a_loss_of_what_does_not_train_is_told(caplog):
    mine = Net()

    def decayed(outputs, labels):
        return F.cross_entropy(outputs, labels) + sum(p.square().sum() for p in mine.parameters())

    train(parts(X, Y), loss=decayed)
    said = [r.getMessage() for r in caplog.records if "do not train here" in r.getMessage()]
    assert len(said) == 1
    assert "depends on 4 tensors" in said[0]
    assert "(16, 8), (16,), (3, 16), (3,)" in said[0]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_modes_of_torch_outside_are_not_those_of_a_run(mode):
    with mode():
        result = train(parts(X, Y), optimizer=sgd)
    weights = result.arrays.to_torch_state_dict()
    assert largest_difference(weights, centralised(parts(X, Y))) < 1e-9
    with (
        torch.autocast("cpu"),
        pytest.raises(ConfigError, match=r"must not be under torch\.autocast.*precision='bf16'"),
    ):
        train(parts(X, Y))


class Annealed:
    """A loss that counts its calls, and weighs less with each."""

    def __init__(self):
        self.calls = 0

    def __call__(self, outputs, labels):
        self.calls += 1
        return F.mse_loss(outputs.softmax(1), F.one_hot(labels, 3).to(outputs)) / self.calls


def test_a_loss_that_keeps_a_state_is_called_once_a_step():
    weights = train(parts(X, Y), loss=Annealed(), optimizer=sgd).arrays.to_torch_state_dict()
    assert largest_difference(weights, centralised(parts(X, Y), loss=Annealed())) < 1e-9


def test_a_number_beside_the_outputs():
    class Numbered(Net):
        def forward(self, x):
            return super().forward(x), 0.5

    check_exact(parts(X, Y), Numbered, loss=lambda o, y: o[1] * F.cross_entropy(o[0], y))


# --- D: what is classification, and what is not ----------------------------------------------------------------------
def flat_cross_entropy(outputs, labels):
    return F.cross_entropy(outputs.transpose(1, 2).flatten(0, 1), labels.flatten())


def binary(outputs, labels):
    return F.binary_cross_entropy_with_logits(outputs, labels.double())


@pytest.mark.parametrize(
    ("tensors", "model_fn", "loss", "accuracy"),
    [
        ((TOKENS, TAGS), Tagger, F.cross_entropy, True),
        ((TOKENS, TAGS), Tagger, flat_cross_entropy, True),
        ((X, torch.stack([Y == 0, Y == 1, Y == 2], 1).long()), Net, binary, False),  # several labels a row
        ((X, (Y > 0).long()[:, None]), lambda: Net(outputs=1), binary, False),  # one logit
        ((X, torch.arange(TOTAL)[:, None]), lambda: Net(outputs=1), lambda o, y: F.mse_loss(o, y.to(o) / 90), False),
        ((X, Y), Net, nn.CrossEntropyLoss(label_smoothing=0.1), True),
    ],
)
def test_accuracy_is_told_of_classes_only(tensors, model_fn, loss, accuracy):
    result = check_exact(parts(*tensors), model_fn, loss=loss, tests=parts(*tensors))
    told = result.evaluate_metrics_clientapp[1]
    assert ("accuracy" in told) is accuracy
    model = fresh(model_fn)
    model.load_state_dict(result.arrays.to_torch_state_dict())
    inputs, labels = tensors
    assert told["loss"] == pytest.approx(loss(model(inputs), labels).item())
    if accuracy:
        assert told["accuracy"] == pytest.approx((model(inputs).argmax(1) == labels).double().mean().item())


def test_a_collection_of_metrics_is_named_one_by_one(caplog):
    import_torchvision()  # torchmetrics imports it where it is installed
    from torchmetrics import MetricCollection  # here: it takes seconds
    from torchmetrics.classification import MulticlassAUROC, MulticlassF1Score

    collection = MetricCollection({"f1": MulticlassF1Score(3, average="macro"), "auroc": MulticlassAUROC(3)})
    assert math.isnan(train(parts(X, Y), metrics={"all": collection}).train_metrics_clientapp[1]["all"])
    assert "metrics['all'] failed: it must return one number, got a dict: name each by itself" in caplog.text
    told = train(parts(X, Y), metrics=dict(collection)).train_metrics_clientapp[1]
    assert {"f1", "auroc"} <= set(told)


@pytest.mark.parametrize(("name", "options"), [("MulticlassF1Score", {"average": "macro"}), ("MulticlassAUROC", {})])
def test_torchmetrics_are_told_of_all_examples(name, options):
    import_torchvision()  # torchmetrics imports it where it is installed
    from torchmetrics import classification  # here: it takes seconds

    metric = getattr(classification, name)(3, **options)
    result = train(parts(X, Y), tests=parts(X, Y), metrics={"mine": metric}, evaluate_batch_size=30)
    model = fresh(Net)
    model.load_state_dict(result.arrays.to_torch_state_dict())
    told = result.evaluate_metrics_clientapp[1]["mine"]
    assert told == pytest.approx(metric(model(X), Y).item())
    assert 0 < result.train_metrics_clientapp[1]["mine"] < 1


# --- E: rows that cannot be used -------------------------------------------------------------------------------------
class Spoilt(Dataset):
    """Some rows raise, or are NaN; `once` rows raise when they are read first."""

    def __init__(self, dataset, raising=(), nan=(), nan_label=(), once=()):
        self.dataset, self.raising, self.nan, self.nan_label = dataset, raising, nan, nan_label
        self.once = set(once)

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, i):
        if i in self.raising or i in self.once:
            self.once.discard(i)
            raise OSError(f"cannot identify image file 'img_{i}.png'")
        x, y = self.dataset[i]
        return x * (np.nan if i in self.nan else 1), y * (np.nan if i in self.nan_label else 1)


def test_bad_rows_are_left_out_and_all_others_used(caplog):
    a, b, c = parts(X, Y)
    result = train([a, Spoilt(b, raising=(7, 8, 20)), Spoilt(c, nan=(0, 39))], rounds=2)
    assert unseen(result) == [5, 5]
    assert [m["num_examples"] for m in result.train_metrics_clientapp.values()] == [TOTAL - 5] * 2
    said = [r.getMessage() for r in caplog.records if "client 1 (node 3): example 7 is left out" in r.getMessage()]
    assert len(said) == 1
    assert "in __getitem__: OSError: cannot identify image file 'img_7.png'" in said[0]


@pytest.mark.parametrize("transport", ["messages", "streams"])
def test_a_read_that_fails_once_is_made_again(transport):
    a, b, c = parts(X, Y)
    result = train([a, Spoilt(b, once=(3, 9, 29)), c], optimizer=sgd, transport=transport)
    assert unseen(result) == [0]
    assert largest_difference(result.arrays.to_torch_state_dict(), centralised([a, b, c])) < 1e-9


def test_bad_test_rows_are_told_once_and_the_rest_is_evaluated(caplog):
    a, b, c = parts(X, Y)
    result = train([a, b, c], tests=[a, Spoilt(b, raising=(7,)), Spoilt(c, nan=(0, 39), once=(3,))], rounds=2)
    good = [i for i in range(TOTAL) if i not in (20 + 7, 50, 89)]
    told = check_told(result, (X[good], Y[good]), Net, F.cross_entropy)
    assert told["num_examples"] == TOTAL - 3
    said = [r.getMessage() for r in caplog.records if "is left out" in r.getMessage()]
    assert sorted(text[: text.index(" is")] for text in said) == [
        "client 1 (node 3): test example 7",
        "client 2 (node 4): test example 0",
        "client 2 (node 4): test example 39",
    ]


def test_a_client_without_any_usable_row():
    a, b, c = parts(X, Y)
    data = [a, Spoilt(b, raising=range(30)), c]
    with pytest.raises(StepError, match=r"client 1 \(node 3\): the training data cannot be read: .*OSError: .* 'img_"):
        train(data)
    result = train(data, faults=FaultPolicy(mistakes="exclude"))
    assert unseen(result) == [30]
    assert result.train_metrics_clientapp[1]["num_examples"] == TOTAL - 30


def test_rows_of_other_shapes_are_told_with_both():
    rows = [list(d) for d in parts(X, Y)]
    rows[1][5] = (torch.zeros(9, dtype=torch.float64), rows[1][5][1])
    with pytest.raises(StepError, match=r"rows must be alike in shape: row\[0\] is \([89],\) in example") as caught:
        train(rows)
    assert "\n  client 1 (node 3): " in str(caught.value)
    assert "example 5" in str(caught.value)
    assert "collate_fn that pads" in str(caught.value)


def test_a_nan_label_is_a_bad_row():
    a, b, c = parts(X, X[:, :1])
    result = train([a, Spoilt(b, nan_label=(7,)), c], lambda: Net(outputs=1), loss=F.mse_loss, classification=False)
    assert unseen(result) == [1]


def test_bad_rows_under_a_sampler_by_class():
    a, b, c = parts(X, Y)
    data = [a, Spoilt(b, raising=(7, 8)), Spoilt(c, nan=(3,))]
    for name in ("items", "list"):
        if name == "list":
            for one, whole in zip(data[1:], (b, c), strict=True):
                one.targets = whole.tensors[1]
        sampler = AlignedSampler(batch_size=16, seed=0)
        assert unseen(train(data, sampler=sampler, delays=SlowFractionDelays(fraction=0.25), rounds=2)) == [3, 3]


# --- F: a loss is a sum over what counts -----------------------------------------------------------------------------
IGNORED = torch.where(torch.arange(TOTAL)[:, None].lt(50) & torch.arange(6).gt(0), -100, TAGS)  # uneven by client
NONE_OF_CLIENT_0 = torch.where(torch.arange(TOTAL)[:, None].lt(20), -100, TAGS)


def by_count(outputs, labels):
    return F.cross_entropy(outputs, labels, reduction="sum") / max(1, (labels != -100).sum().item())


def weighted_classes(outputs, labels):
    return F.cross_entropy(outputs, labels, weight=torch.tensor([1.0, 5.0, 0.1, 1.0], dtype=outputs.dtype))


def smoothed(outputs, labels):
    weight = torch.tensor([1.0, 5.0, 0.1, 1.0], dtype=outputs.dtype)
    return F.cross_entropy(outputs, labels, weight=weight, label_smoothing=0.2)


POOLED = {
    "ignored": (IGNORED, F.cross_entropy),
    "nothing counts at a client": (NONE_OF_CLIENT_0, F.cross_entropy),
    "by count": (IGNORED, by_count),
    "by count, none at a client": (NONE_OF_CLIENT_0, by_count),
    "class weights": (IGNORED, weighted_classes),
    "label smoothing": (IGNORED, smoothed),
    "sums": (IGNORED, nn.CrossEntropyLoss(reduction="sum")),
}


def slow_sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.01)


@pytest.mark.parametrize("shape", [{}, U_SHAPE], ids=["plain", "U shape"])
@pytest.mark.parametrize("case", POOLED)
def test_a_loss_is_that_of_all_examples_pooled(case, shape, caplog):
    labels, loss = POOLED[case]
    data = parts(TOKENS, labels)
    result = check_exact(data, Tagger, loss=loss, optimizer=slow_sgd, tests=data, evaluate_batch_size=30, **shape)
    check_told(result, (TOKENS, labels), Tagger, loss)
    assert sum("the loss is the sum over a batch" in r.getMessage() for r in caplog.records) == (case == "sums")


def test_a_batch_of_which_nothing_counts():
    """A sum of nothing divided by 1 is a loss of 0: momentum goes on."""
    some = torch.where(torch.arange(TOTAL)[:, None].lt(80), -100, TAGS)  # many batches hold none
    check_exact(parts(TOKENS, some), Tagger, loss=by_count, optimizer=sgd)


def dice(outputs, labels):
    share, wanted = outputs.softmax(1)[:, 1], (labels == 1).to(outputs)
    return 1 - 2 * (share * wanted).sum() / (share.sum() + wanted.sum())


def two_that_count_differently(outputs, labels):
    return F.cross_entropy(outputs, labels) + 0.1 * outputs.square().mean()


def multiplied(outputs, labels):
    return F.cross_entropy(outputs, labels, reduction="sum") * (1 / (labels != -100).sum().item())


def contrastive(outputs, labels):
    logits = outputs @ outputs.T
    return F.cross_entropy(logits, torch.arange(len(outputs))) + F.cross_entropy(outputs, labels)


NOT_PUT_TOGETHER = {
    "of the batch": (X, Y, Three, dice),
    "a root of a mean": (X, Y, Three, lambda o, y: F.cross_entropy(o, y).sqrt()),
    "two that count differently": (TOKENS, IGNORED, Tagger, two_that_count_differently),
    "multiplied": (TOKENS, IGNORED, Tagger, multiplied),
    "contrastive": (X, Y, Three, contrastive),
}


@pytest.mark.parametrize("case", NOT_PUT_TOGETHER)
def test_a_loss_that_cannot_be_put_together_is_the_servers_alone(case):
    inputs, labels, model, loss = NOT_PUT_TOGETHER[case]
    check_exact(parts(inputs, labels), model, loss=loss, optimizer=slow_sgd, cut="middle")
    with pytest.raises(StepError, match="cannot be put together from the clients': take one that is"):
        train(parts(inputs, labels), model, loss=loss, **U_SHAPE)


def diverging(outputs, labels):
    return F.mse_loss(outputs, labels) * (np.nan if (labels > 90).any() else 1.0)


def test_a_loss_that_is_not_finite_is_the_same_matter_wherever_it_is_computed(tmp_path):
    labels = X[:, :1].clone()
    labels[30] = 99.0
    data, model = parts(X, labels), lambda: Three(outputs=1)
    options = {"loss": diverging, "classification": False, "cut": "middle", "transport": "messages"}
    # no bound: where the clients take the loss, the one whose it is would be left out of the step
    skip = {"faults": FaultPolicy(non_finite_loss="skip", outlier_bound=None), "optimizer": slow_sgd}
    plain, u_shaped = (train(data, model, **options, **skip, tail=tail) for tail in (None, "head"))
    weights = plain.arrays.to_torch_state_dict()
    assert largest_difference(weights, u_shaped.arrays.to_torch_state_dict()) < 1e-12
    assert largest_difference(weights, fresh(model).state_dict()) > 1e-4
    for result in (plain, u_shaped):
        assert TOTAL - 16 <= result.train_metrics_clientapp[1]["num_examples"] < TOTAL
    for tail in (None, "head"):
        with pytest.raises(DivergenceError, match="training diverges, lower the learning rate"):
            train(data, model, **options, faults=FaultPolicy(outlier_bound=None), tail=tail)


# --- G: mistakes -----------------------------------------------------------------------------------------------------
class Grid:
    """Of no kind that a run knows as its own."""

    def __init__(self, client_app, num_nodes):
        self._nodes = InProcessGrid(client_app, num_nodes)

    def __getattr__(self, name):
        return getattr(self._nodes, name)


class Deployed(Grid):
    """Its nodes are other people's."""


def fails_in_data_fn(context):
    if partition(context) == 1:
        return {}["missing"]
    return parts(X, Y)[partition(context)]


def labels_from_one(context):
    return parts(X, Y + 1 if partition(context) == 1 else Y)[partition(context)]


def test_client_code_that_fails_is_told_once_with_its_place():
    place = r"test_situations\.py:\d+ in fails_in_data_fn: KeyError: 'missing'"
    with pytest.raises(MembershipError, match=rf"client 1 \(node 3\): {place}$") as caught:
        train(fails_in_data_fn)
    assert str(caught.value).count("missing") == 1
    with pytest.raises(MembershipError, match=r"client 0 \(node 2\) and 2 others likewise: .*: KeyError: 'nobody'$"):
        train(lambda context: {}["nobody"])


class Exits(TensorDataset):
    def __getitem__(self, index):
        sys.exit("no such file")


@pytest.mark.parametrize("transport", ["messages", "streams"])
def test_client_code_that_exits_does_not_end_the_server(transport):
    """Which in one process would be the end of the whole program, without a word."""
    with pytest.raises(MembershipError, match=r"in nobody: SystemExit: no data"):
        train(nobody, transport=transport)
    with pytest.raises(StepError, match=r"in __getitem__: SystemExit: no such file"):
        train([Exits(*d.tensors) for d in parts(X, Y)], transport=transport)


def nobody(context):
    sys.exit("no data")


def test_nodes_without_the_configuration_of_a_simulation_are_told_how_to_get_it():
    class Bare(InProcessGrid):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            for context in self._contexts.values():
                context.node_config.clear()

    remedy = "KeyError: 'partition-id' is not in the configuration of this node: start it with --node-config"
    with pytest.raises(MembershipError, match=rf"and 2 others likewise: .*in partition: {remedy}"):
        train(parts(X, Y), grid=Bare)


def test_two_runs_at_once_on_one_grid():
    data = parts(X, Y)
    nodes = InProcessGrid(split_client_app(Net, cut="head", data_fn=lambda context: data[partition(context)]), 3)
    options = {"cut": "head", "optimizer": sgd, "sampler": UniformGlobalSampler(batch_size=16, seed=0)}
    strategies = [ParallelSplitLearning(Net(), **options) for _ in range(2)]
    arrays = ArrayRecord(fresh(Net).state_dict())
    with ThreadPoolExecutor(2) as threads:
        runs = [threads.submit(strategy.start, nodes, arrays, num_rounds=1) for strategy in strategies]
    ends = [one.result().arrays.to_torch_state_dict() for one in runs]
    assert [largest_difference(end, centralised(data)) < 1e-9 for end in ends] == [True, True]


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_gradients_that_are_off_where_the_run_is_started(off):
    with off():
        weights = train(parts(X, Y), optimizer=sgd).arrays.to_torch_state_dict()
    assert largest_difference(weights, centralised(parts(X, Y))) < 1e-9


def test_a_loss_that_is_not_told_is_explained(caplog):
    """In a U shape one client's own loss would show its labels."""
    result = train(parts(X, Y)[:1], Three, tests=parts(X, Y)[:1], **U_SHAPE, min_available_nodes=1)
    assert math.isnan(result.train_metrics_clientapp[1]["loss"])
    assert sum("of one client only" in record.getMessage() for record in caplog.records) == 1


class Buggy(TensorDataset):
    def __getitem__(self, index):
        return {"image": super().__getitem__(index)}[f"picture of {len(self.tensors[0])}"]


def test_one_mistake_is_one_message(caplog):
    place = r"test_situations\.py:\d+ in __getitem__: KeyError: 'picture of 20'"
    with pytest.raises(StepError, match=rf"\n  client 0 \(node 2\) and 2 others likewise: .*{place}$") as caught:
        train([Buggy(*d.tensors) for d in parts(X, Y)])
    assert list(caught.value.failures) == [0, 1, 2]
    assert str(caught.value).count("picture") == 1
    assert not [r for r in caplog.records if r.levelname == "WARNING"]


def test_labels_that_are_no_classes_are_a_mistake():
    rule = "labels must be class indices from 0 to 2, as the model has 3 outputs"
    with pytest.raises(StepError, match=rf"\n  client 1 \(node 3\): {rule}.*, got 3"):
        train(labels_from_one)


def test_in_a_deployment_whoever_makes_a_mistake_is_left_out(tmp_path, caplog):
    result = train(labels_from_one, grid=Deployed, output_dir=tmp_path)
    metrics = result.train_metrics_clientapp[1]
    assert (metrics["num_examples"], metrics["examples_unseen"]) == (TOTAL - 30, 30)
    assert list(json.loads((tmp_path / "summary.json").read_text())["excluded"]) == ["1"]
    assert "The run went without clients that made a mistake: client 1 (node 3): labels must be" in caplog.text


class Numbered(Dataset):
    """Knows no number of some labels."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        x, name = self.dataset[index]
        return x, {"healthy": 0}[name]


def test_a_wrong_label_stays_with_its_client(caplog):
    labels = torch.where(torch.arange(TOTAL) == 33, 77, Y)
    with pytest.raises(StepError, match=r"client 1 \(node 3\): labels must be class indices from 0 to 2") as caught:
        train(parts(X, labels), Three, **U_SHAPE)
    assert "77" not in str(caught.value)
    assert any(r.levelname == "ERROR" and "got 77" in r.getMessage() for r in caplog.records)  # on the client

    names = [[(x, {0: "benign", 1: "unclear", 2: "malignant"}[int(y)]) for x, y in d] for d in parts(X, Y)]
    for data in (names, [Numbered(d) for d in names]):
        with pytest.raises(
            StepError, match=r"must hold tensors, .* is the string '\.\.\.'|in __getitem__: KeyError"
        ) as caught:
            train(data, Three, **U_SHAPE)
        assert not re.search("benign|unclear|malignant", str(caught.value))

    def loss(outputs, labels):
        raise ValueError(f"never seen {labels.tolist()}")

    with pytest.raises(
        StepError, match=r"the loss failed on labels torch.int64 .* in loss: ValueError; what"
    ) as caught:
        train(parts(X, labels), Three, loss=loss, **U_SHAPE)
    assert "never seen" not in str(caught.value)


# --- H: rows are treated one by one ----------------------------------------------------------------------------------
MIXING = {
    "mean": lambda h: h - h.mean(0),
    "batch norm": lambda h: F.batch_norm(h, None, None, training=True),
    "softmax": lambda h: h.softmax(0),
    "mixup": lambda h: 0.7 * h + 0.3 * h[torch.randperm(len(h))],
    "noise and mean": lambda h: h + torch.randn_like(h) - h.mean(0),
    "single row": lambda h: h * (2.0 if len(h) > 1 else 1.0),
    "noise and single row": lambda h: (h + torch.randn_like(h)) / len(h),
    "dropout and mean": lambda h: F.dropout(h - h.mean(0), 0.3),
}


@pytest.mark.parametrize("kind", MIXING)
def test_what_mixes_rows_is_refused(kind):
    with pytest.raises(StepError, match="the client half must treat examples one by one"):
        train(parts(X, Y), lambda: Net(Lambda(MIXING[kind])))


@pytest.mark.parametrize("kind", ["mean", "mixup"])
def test_what_mixes_rows_in_a_tail_is_refused(kind):
    with pytest.raises(StepError, match="the tail must treat examples one by one"):
        train(parts(X, Y), lambda: Three(Tail(MIXING[kind])), **U_SHAPE)


class Tail(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.linear, self.function = nn.Linear(8, 3), function

    def forward(self, x):
        return self.function(self.linear(x))


class Frozen(nn.BatchNorm1d):
    def train(self, mode=True):
        return super().train(False)


@pytest.mark.parametrize("layer", [lambda: Frozen(16), lambda: nn.GroupNorm(2, 16), lambda: nn.LayerNorm(16)])
def test_what_does_not_is_trained(layer):
    check_exact(parts(X, Y), lambda: Net(nn.Sequential(nn.Linear(8, 16), layer())))


def normed(kind=Net, frozen=True):
    """Return a net whose batch norm is frozen, or is in evaluation as all of it is after loading."""
    model = kind(nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16)))
    model.body[1].running_mean.fill_(0.5)
    (model.body[1] if frozen else model).eval()
    return model


class KeptFrozen(Net):
    def train(self, mode=True):
        super().train(mode).body[1].eval()
        return self


@pytest.mark.parametrize("cut", ["head", "body.1"])
def test_layers_that_are_given_in_evaluation_stay_so(cut, caplog):
    """As fine-tuning code freezes them; ``model.train()`` alone would thaw them."""
    weights = train(parts(X, Y), normed, cut=cut, optimizer=sgd).arrays.to_torch_state_dict()
    assert largest_difference(weights, centralised(parts(X, Y), lambda: normed(KeptFrozen))) < 1e-9
    assert weights["body.1.running_mean"].unique().tolist() == [0.5]
    assert "; in evaluation mode, by layer.eval() or the model's train(), stay 'body.1'" in caplog.text


def test_a_model_that_is_given_in_evaluation_trains(caplog):
    check_exact(parts(X, Y), lambda: normed(frozen=False), cut="body.1")
    assert "in evaluation mode" not in caplog.text


@pytest.mark.parametrize("norm", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.orthogonal])
def test_parametrized_layers(norm):
    check_exact(parts(X, Y), lambda: Net(nn.Sequential(norm(nn.Linear(8, 16)), nn.SiLU())))


def test_layers_with_a_state_are_for_the_server():
    spectral = nn.utils.parametrizations.spectral_norm
    with pytest.raises(StepError, match=r"the client half's forward pass changes its buffer 'body\.0\..*_u', but"):
        train(parts(X, Y), lambda: Net(nn.Sequential(spectral(nn.Linear(8, 16)), nn.SiLU())))

    class Server(Net):
        def __init__(self):
            super().__init__()
            self.head = spectral(nn.Linear(16, 3).double())

    check_exact(parts(X, Y), Server)


def test_weights_that_forward_changes_behind_torchs_back():
    class Clamped(nn.Linear):
        def forward(self, x):
            self.weight.data.clamp_(-0.1, 0.1)
            return super().forward(x)

    with pytest.raises(StepError, match=r"the client half's forward pass changes its parameter 'body\.weight', but"):
        train(parts(X, Y), lambda: Net(Clamped(8, 16)))


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
def test_a_model_that_cannot_be_copied():
    with pytest.raises(
        ConfigError, match=r"'0\.weight' was computed .*use torch\.nn\.utils\.parametrizations\.weight_"
    ):
        cut_model(nn.Sequential(nn.utils.weight_norm(nn.Linear(8, 16)), nn.Linear(16, 3)), "1")
    pruned = prune.l1_unstructured(nn.Linear(8, 16), "weight", 0.5)
    with pytest.raises(ConfigError, match=r"'0\.weight' was computed .*call prune\.remove\(module, name\)"):
        cut_model(nn.Sequential(pruned, nn.Linear(16, 3)), "1")


def test_a_model_that_has_been_run_before():
    class Keeping(nn.Linear):
        seen = None

        def forward(self, x):
            self.seen = super().forward(x)
            return self.seen

    def run_before():
        model = Net(Keeping(8, 16))
        model(X[:2]).sum().backward()
        return model

    check_exact(parts(X, Y), run_before)


@pytest.mark.parametrize("hook", ["register_hook", "register_post_accumulate_grad_hook"])
@pytest.mark.parametrize("of_hand", [False, True])
def test_hooks_on_parameters_are_refused_for_copies_lose_them(hook, of_hand):
    model = SplitModel(client=nn.Linear(8, 16), server=nn.Linear(16, 3)) if of_hand else Net()
    getattr(next(model.parameters()), hook)(lambda gradient: None)
    with pytest.raises(ConfigError, match=r"weight' has a gradient hook, .*register_step_pre_hook"):
        cut_model(model, None if of_hand else "head")


def test_gradients_changed_in_the_optimizer():
    """What the refusal of hooks on parameters advises: there, the gradient is that of the whole batch."""

    def clipped(parameters):
        optimizer = sgd(parameters)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        optimizer.register_step_pre_hook(lambda *_: nn.utils.clip_grad_value_(parameters, 1e-2))
        return optimizer

    check_exact(parts(X, Y), optimizer=clipped)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_models_in_wrappings_are_told_to_unpack():
    for wrapped, what in (
        (nn.DataParallel(Net()), "DataParallel has wrapped cannot be cut: pass model.module"),
        (torch.jit.trace(Net(), X[:2]), "torch.jit cannot be cut: pass the nn.Module"),
        (Net(torch.jit.script(nn.Linear(8, 16))), "'body' is a module of torch.jit, of which a copy does not train"),
        (Net().to("meta"), r"'body\.0\.weight' is on the device 'meta' and has no values"),
    ):
        with pytest.raises(ConfigError, match=what):
            cut_model(wrapped, "head")


NOISE = {
    "normal": lambda h: h + torch.randn_like(h),
    "numpy": lambda h: h + torch.from_numpy(np.random.rand(*h.shape)),  # noqa: NPY002
    "python": lambda h: h * (1 + random.random()),
    "gumbel": F.gumbel_softmax,
    "of what it holds": lambda h: F.rrelu(h, 0.1, 0.9, training=True),
}


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=pytest.mark.torch("2.10")) if k == "gumbel" else k for k in NOISE]
)
def test_noise_is_no_mixing_and_the_same_on_every_carrier(kind):
    data, model = parts(X, Y), lambda: Net(Lambda(NOISE[kind]))
    weights = [train(data, model, transport=t).arrays.to_torch_state_dict() for t in ("messages", "streams")]
    assert largest_difference(*weights) < 1e-12


# --- I: inputs, and labels that are not there ------------------------------------------------------------------------
class Masked(Net):
    def forward(self, x, mask=None, scale=2.0):
        h = self.body(x) * scale
        return self.head(h if mask is None else h * mask)


class Resized(nn.Module):
    """Brings its outputs to the size of the pictures, as nets for segmentation do."""

    def __init__(self):
        super().__init__()
        self.down, self.middle, self.up = nn.Conv2d(1, 4, 3, 2), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 3, 1)
        self.double()

    def forward(self, x):
        return F.interpolate(self.up(self.middle(self.down(x)).relu()), size=x.shape[-2:], mode="bilinear")


@pytest.mark.parametrize("options", [{"transport": "messages"}, {"transport": "streams", "tail": "up"}])
def test_sizes_that_cross(options):
    pictures = X.reshape(TOTAL, 1, 4, 2).repeat(1, 1, 1, 3)
    check_exact(parts(pictures, TOKENS.reshape(TOTAL, 1, 6).repeat(1, 4, 1) % 3), Resized, cut="middle", **options)


class Twins(Net):
    def forward(self, one, other):
        return self.head(self.body(one)) - self.head(self.body(other))


def test_siamese_nets():
    check_exact(parts(X, X.flip(1), Y), Twins)


def test_arguments_with_defaults():
    check_exact(parts(X, Y), Masked)


@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.int32, np.uint16])
def test_labels_of_any_integer_type(kind):
    data = [[(x.numpy(), kind(y)) for x, y in d] for d in parts(X, Y)]
    weights = train(data, optimizer=sgd).arrays.to_torch_state_dict()
    assert largest_difference(weights, centralised(parts(X, Y))) < 1e-9


def test_inputs_of_another_type_than_the_weights():
    for kind, text in (
        (torch.uint8, r"for pixels x\.to\(torch\.float64\) / 255"),
        (torch.float32, "x.to.torch.float64"),
    ):
        with pytest.raises(
            StepError,
            match=rf"failed on rows of {kind} \(8,\): .*; the weights are torch\.float64, the inputs {kind}: .*{text}",
        ):
            train(parts(X.to(kind), Y))


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        (TOKENS + 1, "IndexError: .*; an embedding has 20 rows, so its tokens must be from 0 to 19"),
        (TOKENS.float(), r"; an embedding takes whole numbers: x\.long\(\)"),
    ],
)
def test_tokens_that_an_embedding_cannot_take(tokens, text):
    with pytest.raises(StepError, match=rf"the client half failed on rows of torch\.\w+ \(6,\): .*{text}"):
        train(parts(tokens, TAGS), Tagger)


def test_rows_that_are_not_what_the_model_takes():
    with pytest.raises(
        StepError, match=r"training data have no label \(found a tuple of 1\): add one, or pass target="
    ):
        train(parts(X))
    with pytest.raises(StepError, match=r"forward takes \(x\), rows hold 2 inputs: .*leave others out of the rows"):
        train(parts(X, X, Y))


class AutoEncoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.head = nn.Linear(8, 4), nn.Linear(4, 8)
        self.double()

    def forward(self, x):
        return self.head(self.encoder(x).tanh())


@pytest.mark.parametrize("row", [lambda x: x, lambda x: (x, 0), lambda x: {"x": x}], ids=["alone", "pair", "dict"])
def test_autoencoders(row):
    data = [[row(x) for (x,) in d] for d in parts(X)]
    result = train(data, AutoEncoder, loss=F.mse_loss, optimizer=sgd, client={"target": "input"})
    reference = centralised(parts(X, X), AutoEncoder, loss=F.mse_loss)
    assert largest_difference(result.arrays.to_torch_state_dict(), reference) < 1e-9


def test_loaders_and_models_as_people_write_them():
    loaders = [DataLoader(Turned(*d.tensors), batch_size=4, shuffle=True) for d in parts(X, Y)]
    weights = train(loaders, optimizer=sgd).arrays.to_torch_state_dict()
    assert largest_difference(weights, centralised([Turned(*d.tensors) for d in parts(X, Y)])) < 1e-9
    with pytest.raises(ConfigError, match="got the class Net: call it"):
        ParallelSplitLearning(Net, cut="head")


def test_what_an_evaluate_fn_returns():
    with pytest.raises(ConfigError, match=r"evaluate_fn must return a MetricRecord, or None, got \(0\.5, "):
        train(parts(X, Y), start={"evaluate_fn": lambda server_round, arrays: (0.5, {"accuracy": 1.0})})
    computed = {"loss": torch.tensor(0.5), "n": np.int64(3), "each": [np.float32(0.25), 1.0], "good": True}
    result = train(parts(X, Y), start={"evaluate_fn": lambda server_round, arrays: computed})
    assert dict(result.evaluate_metrics_serverapp[1]) == {"loss": 0.5, "n": 3, "each": [0.25, 1.0], "good": 1}
    with pytest.raises(ConfigError, match=r"evaluate_fn must return numbers .*, got \('note', 'fine'\): leave out"):
        train(parts(X, Y), start={"evaluate_fn": lambda server_round, arrays: {"loss": 0.5, "note": "fine"}})

    def evaluate(server_round, arrays):
        torch.set_grad_enabled(False)  # and leaves it so: training goes on
        return {"loss": 0.5}

    train(parts(X, Y), start={"evaluate_fn": evaluate})
    assert torch.is_grad_enabled()


def test_an_evaluate_fn_may_use_up_its_arrays():
    """As with ``keep_input=False``, which frees them as they are converted."""
    result = train(parts(X, Y), start={"evaluate_fn": lambda server_round, arrays: arrays.clear()})
    assert len(result.arrays) == len(Net().state_dict())


# --- J: another run goes on ------------------------------------------------------------------------------------------
def test_settings_of_a_resumed_run(tmp_path, caplog):
    whole = train(parts(X, Y), optimizer=sgd, rounds=2, output_dir=tmp_path).arrays.to_torch_state_dict()
    options = {"output_dir": tmp_path, "resume_from": "latest"}
    again = train(parts(X, Y), optimizer=sgd, rounds=1, **options)  # fewer than done
    assert largest_difference(again.arrays.to_torch_state_dict(), whole) == 0
    slower = train(parts(X, Y), optimizer=lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9), rounds=3, **options)
    change = largest_difference(slower.arrays.to_torch_state_dict(), whole)
    as_before = largest_difference(centralised(parts(X, Y), rounds=3), whole)
    assert 0 < change < as_before / 2
    with pytest.raises(ConfigError, match=r"optimizer.*SGD.*Adam|optimizer.*Adam.*SGD"):
        train(parts(X, Y), optimizer=torch.optim.Adam, rounds=4, **options)
    train(parts(X, Y), lambda: Net(nn.Sequential(nn.Linear(8, 16), nn.Tanh())), rounds=3, **options)
    assert "layers: body.1 was 'SiLU()', now 'Tanh()'" in caplog.text


# --- K: no waiting without hope --------------------------------------------------------------------------------------
def test_too_few_nodes_are_told_at_once():
    with pytest.raises(MembershipError, match="min_available_nodes is 4, there are 3 nodes, and no more can come"):
        train(parts(X, Y), min_available_nodes=4)


def test_a_client_without_data():
    data = [*parts(X, Y), TensorDataset(X[:0], Y[:0])]
    check_exact(data)


# --- both sides cut the same model, and a run may end itself ---------------------------------------------------------
def test_another_cut_is_told_before_the_first_step():
    app = split_client_app(lambda: Net(), cut="body.1", data_fn=lambda context: parts(X, Y)[partition(context)])
    strategy = ParallelSplitLearning(Net(), cut="head")
    with pytest.raises(MembershipError, match=r"the server.*'head'.*'body\.1'"):
        strategy.start(InProcessGrid(app, 3), ArrayRecord(Net().state_dict()), num_rounds=1)


def test_a_run_ends_early_with_its_best_model(tmp_path):
    scores = {0: 9.0, 1: 3.0, 2: 1.0, 3: 2.0, 4: 2.0, 5: 0.0}
    best = BestModel(tmp_path / "best.safetensors", monitor="server/loss")
    result = train(
        parts(X, Y),
        rounds=5,
        start={"evaluate_fn": lambda server_round, arrays: MetricRecord({"loss": scores[server_round]})},
        callbacks=[EarlyStopping(monitor="server/loss", patience=2), best],
        output_dir=tmp_path,
    )
    assert list(result.train_metrics_clientapp) == [1, 2, 3, 4]
    assert best.best_round == 2
    assert (tmp_path / "summary.json").exists()


# --- L: what a copy of the model would lose --------------------------------------------------------------------------
def tripled(model, module):
    module.forward = lambda x: F.linear(3 * x, module.weight, module.bias)
    return model


def hooked(model, module):
    module.register_forward_hook(lambda *_: model.head.weight.sum())
    module.register_forward_hook(lambda *_: None)
    return model


def by_default(model, module):
    module.register_forward_hook(lambda _, __, out, other=model.head: out + other.weight.sum())
    return model


def by_keyword(model, module):
    def hook(_, __, out, *, other=model.head):
        return out + other.weight.sum()

    module.register_forward_hook(hook)
    return model


def in_a_list(model, module):
    layers = {"all": [(model.head,)]}
    module.register_forward_hook(lambda _, __, out: out + layers["all"][0][0].weight.sum())
    return model


def one_function_in_another(model, module):
    def inner(factor, other):
        return factor * other.weight.sum()

    total = functools.partial(inner, 2, other=model.head)
    module.register_forward_hook(lambda _, __, out: out + total())
    return model


def in_a_list_of_functions(model, module):
    module.more = [lambda: model.head.weight.sum()]
    return model


def of_an_object(model, module):
    extra_repr = model.head.extra_repr
    module.register_forward_hook(lambda *_: print(extra_repr()))
    return model


@pytest.mark.parametrize(
    ("change", "text"),
    [
        *((each, "a hook of body.0 is a function that holds 'head'") for each in (by_default, by_keyword, in_a_list)),
        (one_function_in_another, "a hook of body.0 is a function that holds 'head'"),
        (of_an_object, "a hook of body.0 is a function that holds 'head'"),
        (in_a_list_of_functions, "body.0.more is a function that holds 'the model'"),
        (tripled, r"body\.0\.forward is a function that holds 'body\.0'"),
        (hooked, r"a hook of body\.0 is a function that holds 'the model'"),
    ],
)
def test_a_model_whose_copy_would_be_another_is_refused(change, text):
    def make():
        model = Net()
        return change(model, model.body[0])

    with pytest.raises(ConfigError, match=text):
        cut_model(make(), "head")
