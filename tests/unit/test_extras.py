"""A package that is not there is told with the extra that has it, and the core needs none of them."""

import subprocess
import sys

import pytest

from psl_flower.errors import ConfigError
from psl_flower.extras import check_extra, extra
from psl_flower.samplers import AlignedSampler, LatentDirichletSampler
from psl_flower.stragglers.delays import delay_model


def test_a_missing_package_names_its_extra():
    with (
        pytest.raises(
            ConfigError,
            match=r"^a picture needs no_such, .* pip install 'psl-flower\[vision\]', or '\.\[vision\]' in a clone",
        ) as caught,
        extra("vision", "a picture"),
    ):
        import no_such.part  # noqa: F401
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)
    with pytest.raises(ConfigError, match=r"^a run needs no_such, .* 'psl-flower\[simulation\]'"):
        check_extra("no_such", "simulation", "a run")


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: LatentDirichletSampler(8), "the sampler lds"),
        (lambda: AlignedSampler(8), "a sampler that plans by class"),
        (lambda: delay_model("lognormal"), "the delays 'lognormal'"),
    ],
)
def test_what_plans_with_scipy_is_refused_when_it_is_made(make, what, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(ConfigError, match=rf"^{what} needs scipy, .* 'psl-flower\[samplers\]'"):
        make()


def test_a_mistake_within_a_package_that_is_there_stays_what_it_is():
    with pytest.raises(ModuleNotFoundError, match=r"numpy\.no_such"), extra("vision", "a picture"):
        import numpy.no_such  # noqa: F401
    with pytest.raises(ImportError, match="nothing"), extra("vision", "a picture"):
        from numpy import nothing  # noqa: F401


HEAVY = [
    *("scipy", "matplotlib", "sklearn", "torchvision", "pyarrow", "PIL", "datasets", "flwr_datasets", "pandas", "ray"),
    *("wandb", "tensorboard"),
]


def test_server_and_client_import_none_of_what_is_an_extra_and_clients_little_else():
    program = f"""
import sys, torch, psl_flower.client, psl_flower.app.client_app
from psl_flower.client.part import parameter_gradients
layer = torch.nn.Linear(2, 3)
outputs = layer(torch.ones(4, 2))
parameter_gradients(dict(layer.named_parameters()), outputs, torch.ones_like(outputs))
print({{*{HEAVY}, "sympy", "torch._dynamo"}} & set(sys.modules))
from psl_flower import ParallelSplitLearning, split_client_app
print(set({HEAVY}) & set(sys.modules))
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout == "set()\n" * 2


def test_a_deployment_trains_where_no_extra_is_installed(tmp_path):
    """A run with both ends, its curves aside, in a process where the extras' packages cannot be imported."""
    program = f"""
import sys
sys.modules.update(dict.fromkeys({HEAVY}))
import torch
from flwr.app import ArrayRecord
from torch.utils.data import TensorDataset
from psl_flower import InProcessGrid, ParallelSplitLearning, UniformGlobalSampler, split_client_app

def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))

def data(context):
    inputs = torch.randn(20, 4)
    return TensorDataset(inputs, (inputs.sum(1) > 0).long())

app = split_client_app(model, cut="2", data_fn=data)
strategy = ParallelSplitLearning(model(), cut="2", sampler=UniformGlobalSampler(10), output_dir="{tmp_path}")
result = strategy.start(InProcessGrid(app, num_nodes=2), ArrayRecord(model().state_dict()), num_rounds=2)
print(result.train_metrics_clientapp[2]["num_examples"])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "40\n"
    assert "curves.png is not drawn: a picture of the curves needs matplotlib" in done.stderr
    assert (tmp_path / "model.safetensors").exists()
    assert not (tmp_path / "curves.png").exists()
