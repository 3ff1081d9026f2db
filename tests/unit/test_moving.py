"""What a loss keeps in buffers goes on from a checkpoint; what only its options are is the new run's."""

import torch
from support import CUT, tiny_resnet
from support import fast_sgd as sgd
from torch import nn

from psl_flower.server import LocalBackend
from psl_flower.server.moving import MovingBuffers
from psl_flower.split import cut_model


class Relative(nn.Module):
    """A cross-entropy relative to its running mean, with a teacher's batch statistics and class weights."""

    def __init__(self, weight=1.0):
        super().__init__()
        self.register_buffer("mean", torch.ones(()))
        self.register_buffer("weights", torch.full((3,), weight))
        self.register_buffer("late", None, persistent=False)
        self.teacher = nn.BatchNorm1d(3)

    def forward(self, outputs, labels):
        loss = nn.functional.cross_entropy(outputs, labels, self.weights)
        self.teacher(outputs.detach())
        self.mean = 0.9 * self.mean + 0.1 * loss.detach()
        self.late = self.mean.clone()
        return loss / self.mean


def used(loss, times=3):
    for seed in range(times):
        generator = torch.Generator().manual_seed(seed)
        loss(torch.randn(4, 3, generator=generator), torch.arange(4) % 3)
    return loss


def test_what_moved_goes_on_and_what_did_not_is_the_new_ones():
    first = Relative()
    moving = MovingBuffers(first)
    assert moving.state_dict() == {}
    used(first)
    state = moving.state_dict()
    statistics = {f"teacher.{name}" for name, _ in first.teacher.named_buffers()}
    assert state.keys() == {"mean", "late", *statistics}
    second = Relative(weight=2.0)
    resumed = MovingBuffers(second)
    resumed.load_state_dict(state)
    assert second.mean == first.mean == second.late
    assert second.teacher.num_batches_tracked == 3
    assert second.weights.tolist() == [2, 2, 2]
    assert resumed.state_dict().keys() == state.keys()  # though nothing has moved since
    used(second)
    assert second.mean != first.mean
    MovingBuffers(nn.functional.cross_entropy).load_state_dict(state)  # another loss now
    assert MovingBuffers(nn.functional.cross_entropy).state_dict() == {}


def test_buffers_of_any_kind_are_compared():
    loss = nn.Module()
    loss.register_buffer("unseen", torch.tensor(torch.nan))
    loss.register_buffer("graph", torch.eye(3).to_sparse())
    loss.register_buffer("queue", torch.zeros(0, 2))
    loss.register_buffer("mask", torch.tensor([True, False]))
    moving = MovingBuffers(loss)
    loss.double()
    assert moving.state_dict() == {}
    loss.queue, loss.graph = torch.zeros(4, 2), 2 * loss.graph
    loss.mask[0] = False
    assert moving.state_dict().keys() == {"queue", "graph", "mask"}


def test_the_backends_state_has_them():
    def backend(loss):
        model = tiny_resnet()
        parts = dict(zip(("head", "body"), cut_model(model, CUT).parts, strict=True))
        return LocalBackend(
            parts,
            {"head": "client", "body": "server"},
            optimizer=sgd,
            loss=loss,
            device=torch.device("cpu"),
            classification=True,
            order=[name for name, _ in model.named_parameters()],
        )

    first = Relative()
    before = backend(first)
    used(first)
    after = backend(Relative())
    after.load_state_dict(before.state_dict())
    assert after.loss.mean == first.mean
