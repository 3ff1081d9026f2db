"""What a forward keeps for its next call is a buffer, or the cut is refused; a refused model is left as it was."""

import collections

import numpy as np
import pytest
import torch
from torch import nn

from psl_flower.errors import CutError
from psl_flower.split import Cut, split_module

CALLS = 0
SEEN = []


class Net(nn.Module):
    """Three layers, and a step that may keep something."""

    calls = 0

    def __init__(self):
        super().__init__()
        self.body, self.middle, self.head = (nn.Linear(4, 4) for _ in range(3))
        self.log, self.array, self.queue = [], np.zeros(2), collections.deque([1])
        self.steps = {"seen": {"calls": 0}}

    def forward(self, x):
        return self.head(self.middle(self.step(self.body(x))))

    def step(self, h):
        return h


class Appends(Net):
    def step(self, h):
        self.log.append(h.detach())
        return h * len(self.log)


class Counts(Net):
    def step(self, h):
        self.steps["seen"]["calls"] += 1
        return h * self.steps["seen"]["calls"]


class CountsInArray(Net):
    def step(self, h):
        self.array[0] += 1
        return h * float(self.array[0])


class Queues(Net):
    def step(self, h):
        self.queue.append(2)
        return h * sum(self.queue)


class OfClass(Net):
    def step(self, h):
        Net.calls += 1
        return h * Net.calls


class MakesLate(Net):
    def step(self, h):
        if not hasattr(self, "scale"):
            self.scale = 2.0
        return h * self.scale


class LayersLate(Net):
    def step(self, h):
        if not hasattr(self, "late"):
            self.late = nn.Identity()
        return self.late(h)


class Branching:
    """What torch.fx cannot record, so that torch.export does."""

    def step(self, h):
        return super().step(h if h.dim() == 2 else h[None])


KEEPING = [
    (Appends, "'log'"),
    (Counts, "'steps'"),
    (CountsInArray, "'array'"),
    (Queues, "'queue'"),
    (OfClass, "'Net.calls'"),
    (MakesLate, "'scale'"),
]


@pytest.mark.parametrize(("kind", "name"), KEEPING)
def test_what_is_kept_elsewhere_is_refused(kind, name):
    with pytest.raises(CutError, match=rf"forward changes ({name}), .*: register it as a buffer"):
        split_module(kind(), "middle")


@pytest.mark.torch("2.10")
@pytest.mark.parametrize("kind", [Appends, Counts, CountsInArray, LayersLate])
def test_torch_export_would_not_keep_it_either(kind):
    with pytest.raises(CutError, match=r"Nor does torch.export do: .*(forward changes|assigned during export)"):
        split_module(type("Both", (Branching, kind), {})(), Cut("middle", example={"x": torch.randn(2, 4)}))


class Global(Net):
    def step(self, h):
        global CALLS
        CALLS += 1
        return h * CALLS


class InGlobalList(Net):
    def step(self, h):
        SEEN.append(1)
        return h * len(SEEN)


@pytest.mark.parametrize(("kind", "name"), [(Global, "CALLS"), (InGlobalList, "SEEN")])
def test_a_global_is_no_place_to_keep_it(kind, name):
    with pytest.raises(CutError, match=f"forward changes the global '{name}', .*: make it a buffer"):
        split_module(kind(), "middle")
    assert CALLS == 0


@pytest.mark.torch("2.10")
@pytest.mark.parametrize(("kind", "name"), [(Global, "CALLS"), (InGlobalList, "SEEN")])
def test_nor_is_it_for_torch_export(kind, name):
    with pytest.raises(CutError, match=f"Nor does torch.export do: .*forward changes the global '{name}'"):
        split_module(type("Both", (Branching, kind), {})(), Cut("middle", example={"x": torch.randn(2, 4)}))
    assert CALLS == 0


class Reads(Net):
    """Sets what it had, and what is the same again."""

    def step(self, h):
        self.log = []
        self.steps["seen"] = {"calls": 0}
        return h * len(self.queue)


def test_what_is_as_it_was_is_no_change():
    model, x = Reads(), torch.randn(3, 4)
    client, server = split_module(model, "middle")
    assert torch.equal(server(*client(x)), model(x))
