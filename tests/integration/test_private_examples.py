"""What one example can do to a step with DP-SGD, whatever it is: move it by the bound, and no more."""

import pytest
import torch
from flwr.app import ArrayRecord
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss, normalize
from torch.utils.data import TensorDataset

from psl_flower import (
    BadRowsError,
    InProcessGrid,
    ParallelSplitLearning,
    StreamOptions,
    UniformGlobalSampler,
    split_client_app,
)
from psl_flower.errors import ConfigError, StepError
from psl_flower.privacy import DPSGD
from psl_flower.server import LocalBackend, example_gradients, weighted

K, N = 3, 4  # clients, and examples of each; all are in one step
TAIL = {"parallel": {}, "u-shaped": {"tail": "c"}}
WAYS = [("parallel", False), ("u-shaped", False), ("u-shaped", True)]  # method, secure aggregation


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 64), nn.Linear(64, 10)

    def forward(self, x):
        return self.c(self.b(self.a(x).relu()).relu())


def draws(seed=0):
    torch.manual_seed(seed)
    return torch.randn(K, N, 8), torch.randint(0, 10, (K, N))


def step(x, y, method, secure=False, noise=0.0, loss=cross_entropy, data=None, **more):
    """Return what one step adds to the parameters, in units of clip / B."""

    def data_fn(context):
        client = int(context.node_config["partition-id"])
        return TensorDataset(x[client], y[client]) if data is None else data(x[client], y[client])

    torch.manual_seed(1)
    model, batch = Model(), K * N
    options = {"cut": "b", "private": DPSGD(clip=1.0, noise=noise, batch_size=batch), **TAIL[method]}
    options["secure_aggregation"] = secure
    split = ParallelSplitLearning(
        model,
        sampler=UniformGlobalSampler(batch, seed=0),
        evaluate_every=0,
        min_available_nodes=K,
        device="cpu",
        optimizer=lambda p: torch.optim.SGD(p, lr=1.0),
        loss=cross_entropy if options.get("tail") else loss,
        **options,
        **more,
    )
    grid = InProcessGrid(split_client_app(Model, data_fn=data_fn, loss=loss, **options), K)
    after = split.start(grid, ArrayRecord(model.state_dict()), 1).arrays.to_torch_state_dict()
    return torch.cat([((after[name] - t) * batch).flatten() for name, t in model.state_dict().items()])


# --- values that are not finite, or overflow -------------------------------------------------------------------------
@pytest.mark.parametrize("value", [1e20, 1e38, -3e38])
@pytest.mark.parametrize(("method", "secure"), WAYS)
def test_an_example_that_overflows_moves_a_step_by_the_bound_at_most(method, secure, value):
    x, y = draws()
    x[0, 0] = 0
    blank, away = step(x, y, method, secure), x.clone()
    away[0, 0] = value * torch.tensor([1.0, -1.0] * 4)
    assert float((step(away, y, method, secure) - blank).norm()) < 2.001  # two of norm one, at most
    loud = step(away, y, method, secure, noise=100.0)
    assert 90 < float(loud.std()) < 130


@pytest.mark.parametrize("method", TAIL)
def test_an_example_of_several_numbers_that_overflows_does(method):
    x, _ = draws()
    y, away = torch.randn(K, N, 10), x.clone()
    away[0, 0] = 1e38 * torch.tensor([1.0, -1.0] * 4)
    usual, moved = (step(each, y, method, loss=mse_loss) for each in (x, away))
    assert 0.1 < float((moved - usual).norm()) < 2.001


@pytest.mark.parametrize("wire_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("method", "secure"), WAYS)
def test_an_example_that_overflows_is_one_of_many_on_streams(method, secure, wire_dtype):
    x, y = draws()
    x[0, 0] = 0
    away = x.clone()
    away[0, 0] = 1e38 * torch.tensor([1.0, -1.0] * 4)
    options = {"transport": "streams", "stream_options": StreamOptions(wire_dtype=wire_dtype)}
    blank, moved = (step(each, y, method, secure, **options) for each in (x, away))
    assert float(blank.norm()) > 2.5  # that of all: more than two could do
    assert float((moved - blank).norm()) < 2.001


def test_losses_of_either_sign_may_cancel():
    def signed(outputs, target):
        return outputs.sum() / len(outputs)

    torch.manual_seed(0)
    half = 1e7 * torch.randn(64, 3)
    outputs, y = torch.cat([half, -half.flip(1)]).requires_grad_(), torch.zeros(128)
    _, found = example_gradients(signed, outputs, y, 128, weighted(signed, outputs, y, 128))
    assert torch.equal(found[0], torch.full((128, 3), 1 / 128))


def test_what_goes_back_does_not_tell_the_size_of_a_drawn_step_by_its_rounding():
    private = DPSGD(clip=1.0, noise=1.0, batch_size=16, examples=64)
    body, generator = nn.Linear(16, 10), torch.Generator().manual_seed(0)
    backend = LocalBackend(
        {"head": nn.Linear(8, 16), "body": body},
        {"head": "client", "body": "server"},
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
        loss=cross_entropy,
        device=torch.device("cpu"),
        classification=True,
        order=["weight", "bias"],
        private=private,
    )
    x, y = torch.randn(33, 16, generator=generator), torch.randint(0, 10, (33,), generator=generator)
    back = [backend.part("body", 0).forward_backward(x[:rows], y[:rows]).gradient[0] for rows in range(8, 33)]
    assert all(torch.equal(each, back[0]) for each in back)


# --- targets that do not count ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("ignored", [slice(0, 1), slice(None)])  # one of a client's, or all
@pytest.mark.parametrize(("method", "secure"), WAYS)
def test_ignored_targets_are_refused(method, secure, ignored):
    x, y = draws()
    y[1, ignored] = -100
    with pytest.raises((ConfigError, StepError), match="needs a loss that is the mean over the examples, got a mean"):
        step(x, y, method, secure)


# --- losses in which examples have to do with each other -------------------------------------------------------------
def hardest(outputs, target):
    each = cross_entropy(outputs, target, reduction="none")
    return (each * torch.softmax(each.detach(), 0)).sum()


def aligned(outputs, target):
    found = normalize(outputs, dim=1)
    return -(found @ found.mean(0).detach()).mean()


def contrasted(outputs, target):
    found = normalize(outputs, dim=1)
    return cross_entropy(found @ found.T / 0.1, torch.arange(len(found)))


def normalised(outputs, target):
    return cross_entropy(outputs / outputs.detach().norm(), target)


@pytest.mark.parametrize("loss", [hardest, aligned, contrasted, normalised])
@pytest.mark.parametrize("method", list(TAIL))
def test_losses_that_mix_examples_are_refused(method, loss):
    with pytest.raises((ConfigError, StepError), match=r"the loss of a batch is not the mean|each alone"):
        step(*draws(), method, loss=loss)


def same_value_other_gradient(outputs, target):
    """Mix examples in the gradient only: the value is that of the mean."""
    mixed = (outputs * outputs.mean(0).detach()).sum()
    return cross_entropy(outputs, target) + 1e3 * (mixed - mixed.detach())


@pytest.mark.parametrize("method", list(TAIL))
def test_gradients_are_those_of_examples_alone_even_where_it_does_not_show(method):
    x, y = draws()
    away = x.clone()
    away[0, 0] *= 1e3
    moved = step(away, y, method, loss=same_value_other_gradient) - step(x, y, method, loss=same_value_other_gradient)
    assert float(moved.norm()) < 2.001


# --- examples that cannot be read ------------------------------------------------------------------------------------
class Broken(TensorDataset):
    def __getitem__(self, index):
        if index == 1:
            raise BadRowsError({1: "no such file"})
        return super().__getitem__(index)


def test_examples_that_cannot_be_read_are_not_left_out():
    x, y = draws()
    with pytest.raises(StepError, match="take it out of the client's data, and start again"):
        step(x, y, "parallel", data=Broken)
    x[0, 0] = float("nan")
    with pytest.raises(StepError, match="take it out of the client's data, and start again"):
        step(x, y, "parallel")
