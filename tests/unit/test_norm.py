"""Group normalisation in place of batch statistics."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from psl_flower.errors import ConfigError, CutError
from psl_flower.split import (
    SplitModel,
    batch_statistics_layers,
    check_client_half,
    cut_model,
    find_mixing,
    replace_batch_norm,
)
from psl_flower.split.norm import FeatureGroupNorm
from psl_flower.torchvision_compat import import_torchvision

models = import_torchvision().models


def batch_norms(model):
    return {name for name, layer in model.named_modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)}


def assert_per_example(model, x):
    """Assert that an example's output does not depend on the others in its batch, in training."""
    model.train()
    together = model(x)
    alone = torch.cat([model(row) for row in x.split(1)])
    torch.testing.assert_close(together, alone)


def test_the_whole_model():
    torch.manual_seed(0)
    model = models.resnet18().double()
    before = copy.deepcopy(model)
    replaced = replace_batch_norm(model)
    assert batch_norms(model) == batch_norms(before)
    assert not batch_norms(replaced)
    groups = {name for name, layer in replaced.named_modules() if isinstance(layer, nn.GroupNorm)}
    assert groups == batch_norms(model)
    assert_per_example(replaced, torch.randn(3, 3, 64, 64, dtype=torch.float64))
    assert {name for name, _ in replaced.named_parameters()} == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("channels", [1, 6, 24, 32, 64, 96])
def test_groups_values_and_flags(channels):
    layer = nn.BatchNorm2d(channels, eps=1e-3).bfloat16().eval()
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    layer.bias.requires_grad_(False)
    norm = replace_batch_norm(layer)
    assert type(norm) is nn.GroupNorm
    assert (norm.num_groups, norm.num_channels, norm.eps) == (math.gcd(32, channels), channels, 1e-3)
    assert torch.equal(norm.weight, layer.weight)
    assert torch.equal(norm.bias, layer.bias)
    assert norm.weight is not layer.weight
    assert norm.weight.dtype == torch.bfloat16
    assert (norm.weight.requires_grad, norm.bias.requires_grad) == (True, False)
    assert not norm.training
    plain = replace_batch_norm(nn.BatchNorm2d(channels, affine=False))
    assert plain.weight is None
    assert plain.training


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.BatchNorm1d(64), (4, 64)),
        (nn.BatchNorm1d(64), (4, 64, 5)),
        (nn.BatchNorm2d(64), (4, 64, 3, 3)),
        (nn.BatchNorm3d(64), (4, 64, 2, 2, 2)),
        (nn.SyncBatchNorm(64), (4, 64, 3, 3)),
        (nn.SyncBatchNorm(64), (4, 64)),
        (nn.InstanceNorm2d(64, affine=True, track_running_stats=True), (4, 64, 3, 3)),
    ],
)
def test_every_kind(layer, shape):
    norm = replace_batch_norm(nn.Sequential(layer))
    assert norm[0].num_groups == 32
    x = torch.randn(shape)
    assert_per_example(norm, x)
    output = norm(x)
    assert output.shape == shape
    # unit variance, and the examples still differ in more than signs: the signal went through
    torch.testing.assert_close(output.square().mean(), torch.tensor(1.0), rtol=0.02, atol=0)
    assert output.abs().detach().std() > 0.2


def test_only_before_the_cut():
    model = models.resnet18()
    replaced = replace_batch_norm(model, before="layer2.0.bn2")
    ours = {name for name in batch_norms(model) if name.startswith(("bn1", "layer1"))} | {"layer2.0.bn1"}
    assert batch_norms(model) - batch_norms(replaced) == ours
    halves = cut_model(replaced, "layer2.0.bn2")
    check_client_half(halves.client)
    assert batch_statistics_layers(halves.server)
    with pytest.raises(CutError, match="layer9"):
        replace_batch_norm(model, before="layer9")


def test_a_split_model():
    def make():
        return SplitModel(
            client=nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)),
            server=nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3)),
        )

    assert batch_norms(replace_batch_norm(make(), before="server")) == {"server.0"}
    assert batch_norms(replace_batch_norm(make())) == set()
    with pytest.raises(ConfigError, match="'server' for a SplitModel, got 'client'"):
        replace_batch_norm(make(), before="client")


def test_on_both_sides_of_a_u_shape():
    model = models.resnet18()
    replaced = replace_batch_norm(model, before="layer1", tail="layer4.1")
    ours = {"bn1", "layer4.1.bn1", "layer4.1.bn2"}
    assert batch_norms(model) - batch_norms(replaced) == ours
    halves = cut_model(replaced, "layer1", tail="layer4.1")
    check_client_half(halves.client)
    check_client_half(halves.tail)
    parts = {"client": nn.BatchNorm1d(4), "server": nn.BatchNorm1d(4), "tail": nn.BatchNorm1d(4)}
    assert batch_norms(replace_batch_norm(SplitModel(**parts), before="server")) == {"server"}
    with pytest.raises(ConfigError, match="tail='layer4' needs before"):
        replace_batch_norm(model, tail="layer4")


def test_a_model_that_cannot_be_traced():
    class Wild(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.norm, self.two = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)

        def forward(self, x):
            return self.two(self.norm(self.one(x)) if x.sum() > 0 else x)

    with pytest.raises(CutError, match="SplitModel"):
        replace_batch_norm(Wild(), before="two")
    assert not batch_norms(replace_batch_norm(Wild()))


def test_a_layer_with_two_names_stays_one():
    norm = nn.BatchNorm2d(4)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), norm, nn.Sequential(norm))
    replaced = replace_batch_norm(model)
    assert isinstance(replaced[1], nn.GroupNorm)
    assert replaced[1] is replaced[2][0]


def test_a_lazy_layer():
    with pytest.raises(ConfigError, match=r"'1\.weight' has no shape yet"):
        replace_batch_norm(nn.Sequential(nn.Linear(2, 2), nn.LazyBatchNorm1d()))


def test_check_client_half():
    halves = cut_model(models.resnet18(), "layer2")
    assert batch_statistics_layers(halves.client) == [
        name for name, _ in halves.client.named_modules() if name.split(".")[-1].startswith("bn")
    ]
    with pytest.raises(ConfigError, match=r"'bn1', 'layer1\.0\.bn1'.*replace_batch_norm\(model, before=cut\)"):
        check_client_half(halves.client)
    with pytest.raises(ConfigError, match="and 12 more"):
        check_client_half(models.resnet18())
    check_client_half(nn.Sequential(nn.GroupNorm(1, 4), nn.LayerNorm(4), nn.InstanceNorm2d(4)))
    tracking = nn.Sequential(nn.InstanceNorm2d(4, track_running_stats=True), nn.SyncBatchNorm(4))
    assert batch_statistics_layers(tracking) == ["0", "1"]


class Frozen(nn.Module):
    """Keeps a batch norm in evaluation mode, as fine-tuning code does."""

    def __init__(self, **options):
        super().__init__()
        self.stem, self.frozen, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4, **options), nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 2)

    def train(self, mode=True):
        super().train(mode)
        self.frozen.eval()
        return self

    def forward(self, x):
        return self.head(self.norm(self.frozen(self.stem(x))))


@pytest.mark.parametrize("make", [lambda model: model, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_frozen_layer_has_no_batch_statistics(make):
    model = Frozen().train()
    assert batch_statistics_layers(model) == ["norm"]
    assert model.norm.training
    half = make(cut_model(model, "norm").client.eval())
    check_client_half(half)
    assert not any(module.training for module in half.modules())
    assert not half.train().get_submodule("frozen").training
    replaced = replace_batch_norm(model)
    assert [type(layer) for layer in (replaced.frozen, replaced.norm)] == [nn.BatchNorm1d, FeatureGroupNorm]
    with pytest.raises(ConfigError, match="'frozen' normalise"):  # without running averages, evaluation uses the batch
        check_client_half(cut_model(Frozen(track_running_stats=False), "norm").client)


def test_layers_frozen_by_a_split_model():
    class Whole(SplitModel):
        def train(self, mode=True):
            super().train(mode)
            self.client[1].eval()
            return self

    parts = {"client": nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), "server": nn.Linear(4, 2)}
    client = cut_model(Whole(**parts)).client
    check_client_half(client)
    assert not client.train().get_submodule("client.1").training
    with pytest.raises(ConfigError, match=r"'client\.1' normalise"):
        check_client_half(cut_model(SplitModel(**parts)).client)


def test_a_layer_with_a_forward_of_its_own_is_judged_when_it_runs():
    class Fused(nn.BatchNorm1d):
        def forward(self, x):
            return super().forward(x).relu()

    model = nn.Sequential(nn.Linear(4, 4), Fused(4))
    check_client_half(model)
    assert type(replace_batch_norm(model)[1]) is Fused
    assert "'1' (Fused) fails on an example alone" in find_mixing(model, torch.randn(3, 4), module=model)
