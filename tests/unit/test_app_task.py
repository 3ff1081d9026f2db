import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Context, RecordDict
from torch import nn

from psl_flower.app import server_app
from psl_flower.app.images import crop_flip
from psl_flower.app.task import central_test, cut_of, load_partition, make_model, make_optimizer, split_indices
from psl_flower.config import RunConfig
from psl_flower.errors import ConfigError
from psl_flower.privacy import RandomizedResponse


def context(partition_id, num_partitions, **config):
    return Context(
        run_id=1,
        node_id=1,
        node_config={"partition-id": partition_id, "num-partitions": num_partitions},
        state=RecordDict(),
        run_config=RunConfig(**config).as_run_config(),
    )


@pytest.mark.parametrize("partition", ["iid", "mild", "severe"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_every_example_belongs_to_exactly_one_client(partition, split):
    parts = split_indices(RunConfig(partition=partition), split, 16)
    assert len(parts) == 16
    assert sorted(np.concatenate(parts)) == list(range(1437 if split == "train" else 360))


def test_clients_hold_what_the_split_says():
    config = RunConfig(partition="severe")
    held = [load_partition(context(k, 16, partition="severe")) for k in range(16)]
    assert sum(len(train) for train, _ in held) == 1437
    assert sum(len(test) for _, test in held) == 360
    assert all(len(np.unique(train.targets)) <= 2 for train, _ in held)
    indices = split_indices(config, "train", 16)
    assert [len(train) for train, _ in held] == [len(part) for part in indices]


def test_test_data_is_spread_evenly_however_skewed_the_training_data_is():
    sizes = [len(part) for part in split_indices(RunConfig(partition="severe"), "test", 16)]
    assert max(sizes) - min(sizes) <= 1


def test_more_clients_than_test_examples_leaves_some_without():
    sizes = [len(part) for part in split_indices(RunConfig(), "test", 400)]
    assert sum(sizes) == 360
    assert min(sizes) == 0


def test_the_split_is_a_function_of_the_seed():
    def parts(seed):
        split_indices.cache_clear()
        return split_indices(RunConfig(seed=seed), "train", 4)

    assert all(map(np.array_equal, parts(0), parts(0)))
    assert not all(map(np.array_equal, parts(0), parts(1)))


def test_training_and_test_images_are_read_once_for_all_clients_of_a_process():
    first, second = (load_partition(context(k, 2)) for k in range(2))
    assert all(np.shares_memory(a._images, b._images) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("node_config", [{}, {"partition-id": 0}, {"partition-id": "0", "num-partitions": 2}])
def test_a_node_that_does_not_say_its_partition_is_told_how(node_config):
    without = context(0, 2)
    without.node_config = node_config
    with pytest.raises(ConfigError, match='--node-config "partition-id=0 num-partitions=2"'):
        load_partition(without)


def test_a_partition_out_of_range_is_refused():
    with pytest.raises(ConfigError, match="got 2 of 2"):
        load_partition(context(2, 2))


@pytest.mark.parametrize(
    ("dataset", "augment", "expected"),
    [("digits", "", None), ("digits", "crop-flip", crop_flip), ("cifar10", "", crop_flip), ("cifar10", "none", None)],
)
def test_only_training_images_are_augmented_and_only_where_it_helps(dataset, augment, expected, monkeypatch):
    arrays = np.zeros((20, 3, 32, 32) if dataset == "cifar10" else (20, 1, 8, 8), dtype=np.uint8), np.arange(20) % 10
    monkeypatch.setattr("psl_flower.app.task.load_arrays", lambda *args: arrays)
    split_indices.cache_clear()
    train, test = load_partition(context(0, 2, dataset=dataset, augment=augment))
    split_indices.cache_clear()
    assert train._augment is expected
    assert test._augment is None


def test_the_client_half_has_no_batch_statistics_wherever_the_cut_is():
    model = make_model(RunConfig(model="resnet18", cut="layer3"))
    kinds = {name: type(module) for name, module in model.named_modules()}
    assert kinds["layer2.0.bn1"] is nn.GroupNorm
    assert kinds["layer3.0.bn1"] is nn.BatchNorm2d


@pytest.mark.parametrize(("model", "cut"), [("cnn", "stage2"), ("resnet18", "layer2"), ("resnet34", "layer2")])
def test_the_cut_follows_the_models_first_stage_unless_chosen(model, cut):
    assert cut_of(RunConfig(model=model)) == cut
    assert cut_of(RunConfig(model=model, cut="fc")) == "fc"


def test_optimizers():
    weights = [nn.Parameter(torch.zeros(1))]
    sgd = make_optimizer(RunConfig(learning_rate=0.5, momentum=0.25), weights)
    assert isinstance(sgd, torch.optim.SGD)
    assert (sgd.defaults["lr"], sgd.defaults["momentum"]) == (0.5, 0.25)
    adam = make_optimizer(RunConfig(optimizer="adam", learning_rate=0.125), weights)
    assert isinstance(adam, torch.optim.Adam)
    assert adam.defaults["lr"] == 0.125


def test_the_central_test_counts_right_answers():
    config = RunConfig()
    model = make_model(config)
    with torch.no_grad():  # a model that always answers 3, with certainty p = e / (e + 9)
        for parameter in model.parameters():
            parameter.zero_()
        model.head[2].bias[3] = 1.0
    metrics = central_test(config)(1, ArrayRecord(model.state_dict()))
    share = 37 / 360  # of threes in the test split
    assert metrics["accuracy"] == pytest.approx(share)
    assert metrics["loss"] == pytest.approx(np.log(np.e + 9) - share)


def test_the_loss_takes_into_account_that_labels_are_replaced():
    assert server_app.loss_of(RunConfig(defences="GaussianNoise(0.1)")) is torch.nn.functional.cross_entropy
    stay = RunConfig(defences="RandomizedResponse(2.0, 10)", tail="head")
    assert server_app.loss_of(stay) is torch.nn.functional.cross_entropy  # the clients take it
    replaced = RunConfig(defences="GaussianNoise(0.1), RandomizedResponse(2.0, 10)")
    assert server_app.make_strategy(replaced).loss.__self__ == RandomizedResponse(2.0, 10)
