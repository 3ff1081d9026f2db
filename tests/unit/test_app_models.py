import pytest
import torch
from torch import nn

from psl_flower.app.datasets import SPECS
from psl_flower.app.models import build_model, default_cut
from psl_flower.config import MODELS
from psl_flower.split import check_client_half, replace_batch_norm, split_module


@pytest.mark.parametrize(
    ("name", "dataset"),  # resnet34 differs from resnet18 in its depth alone
    [(name, dataset) for name in MODELS for dataset in sorted(SPECS) if name != "resnet34" or dataset == "digits"],
)
def test_every_model_takes_every_dataset_and_can_be_cut(name, dataset):
    spec = SPECS[dataset]
    model = build_model(name, in_channels=spec.shape[0], num_classes=spec.num_classes, seed=0)
    model = replace_batch_norm(model, before=default_cut(name)).eval()
    inputs = torch.randn(2, *spec.shape)
    with torch.no_grad():
        outputs = model(inputs)
        client, server = split_module(model, default_cut(name))
        check_client_half(client)
        cut = client(inputs)
        joined = server(*cut) if isinstance(cut, tuple) else server(cut)
    assert outputs.shape == (2, spec.num_classes)
    assert torch.equal(joined, outputs)


@pytest.mark.parametrize("name", MODELS)
def test_first_weights_are_a_function_of_the_seed_alone(name):
    def weights(seed):
        torch.rand(3)  # whatever happened before
        return nn.utils.parameters_to_vector(build_model(name, in_channels=1, num_classes=10, seed=seed).parameters())

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))


def test_building_a_model_leaves_torchs_generator_as_it_was():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    build_model("cnn", in_channels=1, num_classes=10, seed=0)
    assert torch.equal(torch.rand(1), expected)


def test_the_small_image_stem_keeps_the_resolution():
    model = build_model("resnet18", in_channels=3, num_classes=10, seed=0).eval()
    seen = {}
    model.layer1.register_forward_hook(lambda module, args, output: seen.update(shape=output.shape))
    model(torch.randn(1, 3, 32, 32))
    assert seen["shape"] == (1, 64, 32, 32)
