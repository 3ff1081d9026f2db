"""Rows as people have them, from the data_fn to the trained model: equal to centralised training on the same rows."""

import datasets
import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord
from support import largest_difference, sgd
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import DataLoader

from psl_flower import InProcessGrid, ParallelSplitLearning, UniformGlobalSampler, split_client_app, tree
from psl_flower.errors import StepError
from psl_flower.samplers import Population

K, N = 2, 12
SAMPLER = UniformGlobalSampler(8, seed=3)
RNG = np.random.default_rng(0)
VECTORS = torch.tensor(RNG.normal(size=(K, N, 6)))
LABELS = torch.tensor(RNG.integers(0, 3, (K, N)))


class Vectors(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.rest = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.rest(torch.tanh(self.first(x)))


class Pairs(Vectors):
    """Takes two inputs."""

    def forward(self, left, right):
        return super().forward(left * 2 - right)


class Rows(Vectors):
    """Takes the whole dict of a row, as models of many a Lightning project do."""

    def forward(self, batch):
        return super().forward(batch["x"] * 2 - batch["kind"][:, None] if "kind" in self.names else batch["x"])


class OneNamed(Rows):
    names = ("x",)


class BothNamed(Rows):
    names = ("x", "kind")


class Text(nn.Module):
    """Takes tokens and their mask by the names that tokenizers give them."""

    def __init__(self):
        super().__init__()
        self.embed, self.rest = nn.Embedding(10, 5), nn.Linear(5, 3)

    def forward(self, input_ids, attention_mask):
        mask = attention_mask[..., None]
        return self.rest((self.embed(input_ids) * mask).sum(1) / mask.sum(1))


def images(k):
    """Return a dataset as flwr-datasets gives it, with Flower's way to transform it."""
    table = datasets.Dataset.from_dict({"img": VECTORS[k].tolist(), "label": LABELS[k].tolist()})
    return table.with_transform(lambda b: {**b, "img": [torch.tensor(v, dtype=torch.float64) for v in b["img"]]})


def tokens(k):
    ids = (VECTORS[k].abs() * 4).long() % 10
    mask = torch.arange(6)[None] < (LABELS[k][:, None] + 2)
    rows = zip(ids, mask.long(), LABELS[k], strict=True)
    return [{"input_ids": i, "attention_mask": m, "labels": y} for i, m, y in rows]


def inputs_of_pairs(k):
    return [(x, x.flip(0), int(y)) for x, y in zip(VECTORS[k], LABELS[k], strict=True)]


def tensor_labels(k):
    return [(x, x[:3] * 2) for x in VECTORS[k]]


def named_target(k):
    return [{"x": x, "kind": int(y), "label": -1} for x, y in zip(VECTORS[k], LABELS[k], strict=True)]


def one_named(k):
    return [{"x": x, "label": int(y)} for x, y in zip(VECTORS[k], LABELS[k], strict=True)]


def both_named(k):
    return [{"x": x, "kind": int(y), "label": int(y)} for x, y in zip(VECTORS[k], LABELS[k], strict=True)]


def without_label(rows):
    return {"x": torch.stack([row["x"] for row in rows]), "kind": torch.tensor([row["kind"] for row in rows])}


CASES = {
    "dict rows of Hugging Face": (Vectors, images, {}, lambda k, r: ((VECTORS[k][r],), LABELS[k][r])),
    "tokens": (
        Text,
        tokens,
        {},
        lambda k, r: (
            tuple(torch.stack([tokens(k)[i][n] for i in r]) for n in ("input_ids", "attention_mask")),
            LABELS[k][r],
        ),
    ),
    "several inputs": (Pairs, inputs_of_pairs, {}, lambda k, r: ((VECTORS[k][r], VECTORS[k][r].flip(1)), LABELS[k][r])),
    "a dict of one": (OneNamed, one_named, {}, lambda k, r: (({"x": VECTORS[k][r]},), LABELS[k][r])),
    "a dict": (
        BothNamed,
        both_named,
        {},
        lambda k, r: (({"x": VECTORS[k][r], "kind": LABELS[k][r]},), LABELS[k][r]),
    ),
    "tensors as labels": (Vectors, tensor_labels, {}, lambda k, r: ((VECTORS[k][r],), VECTORS[k][r][:, :3] * 2)),
    "target and collate_fn": (
        Vectors,
        named_target,
        {"target": "kind", "collate_fn": without_label},
        lambda k, r: ((VECTORS[k][r],), LABELS[k][r]),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_centralised_training(name):
    model_class, data, options, batch_of = CASES[name]
    regression = name == "tensors as labels"
    loss = mse_loss if regression else cross_entropy

    def make():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return model_class().double()

    cut = "rest"
    app = split_client_app(make, cut=cut, data_fn=lambda context: data(context.node_config["partition-id"]), **options)
    strategy = ParallelSplitLearning(
        make(), cut=cut, sampler=SAMPLER, optimizer=sgd, loss=loss, classification=not regression, device="cpu"
    )
    result = strategy.start(InProcessGrid(app, K), ArrayRecord(make().state_dict()), num_rounds=1)

    model, used = make(), [0] * K
    optimizer = sgd(model.parameters())
    for step in SAMPLER.plan(Population(list(range(K)), [N] * K), 0):
        parts = []
        for k, quota in zip(step.clients, step.quotas, strict=True):
            order = np.random.default_rng([3, 0, k]).permutation(N)
            parts.append(batch_of(k, order[used[k] : used[k] + quota]))
            used[k] += quota
        inputs = [tree.join(column, "inputs") for column in zip(*(x for x, _ in parts), strict=True)]
        optimizer.zero_grad()
        loss(model(*inputs), torch.cat([y for _, y in parts])).backward()
        optimizer.step()
    assert used == [N] * K
    assert largest_difference(result.arrays.to_torch_state_dict(), model.state_dict()) < 1e-9
    assert largest_difference(model.state_dict(), make().state_dict()) > 1e-3


def load_data(partition_id, num_partitions):
    """Return loaders of dict batches, as the load_data of Flower's PyTorch quickstart does."""
    assert num_partitions == K
    table = datasets.Dataset.from_dict({"img": VECTORS[partition_id].tolist(), "label": LABELS[partition_id].tolist()})
    parts = table.train_test_split(test_size=0.25, seed=42)

    def apply_transforms(batch):
        batch["img"] = [torch.tensor(v, dtype=torch.float32) for v in batch["img"]]
        return batch

    parts = parts.with_transform(apply_transforms)
    return DataLoader(parts["train"], batch_size=4, shuffle=True), DataLoader(parts["test"], batch_size=4)


def test_the_load_data_of_flowers_quickstart_is_taken_as_it_is():
    def data_fn(context):
        return load_data(context.node_config["partition-id"], context.node_config["num-partitions"])

    app = split_client_app(Vectors, cut="rest", data_fn=data_fn)
    strategy = ParallelSplitLearning(Vectors(), cut="rest", sampler=SAMPLER, device="cpu")
    result = strategy.start(InProcessGrid(app, K), ArrayRecord(Vectors().state_dict()), num_rounds=1)
    assert result.train_metrics_clientapp[1]["num_examples"] == K * 9
    assert result.evaluate_metrics_clientapp[1]["num_examples"] == K * 3


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")
def test_a_module_that_wants_the_dict_of_one_input_says_what_to_annotate():
    class First(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 5)

        def forward(self, rows):
            return self.layer(rows["x"])

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.rest = First(), nn.Linear(5, 3)

        def forward(self, rows):
            return self.rest(self.first(rows))

    app = split_client_app(Whole, cut="rest", data_fn=lambda context: one_named(0))
    strategy = ParallelSplitLearning(Whole(), cut="rest", sampler=SAMPLER, optimizer=sgd, device="cpu")
    with pytest.raises(
        StepError, match=r"test_rows.py:\d+ in forward: .* \(given was the rows' one input 'x'; .*rows: dict"
    ):
        strategy.start(InProcessGrid(app, K), ArrayRecord(Whole().state_dict()), num_rounds=1)
