"""What a run begins with is looked at before anything is sent."""

import pytest
import torch
from flwr.app import ArrayRecord
from torch import nn

from psl_flower.errors import ConfigError
from psl_flower.strategy.arrays import arrays_to_state, kept_state


class Masked(nn.Linear):
    """Has a mask of infinite values, as causal attention has."""

    def __init__(self):
        super().__init__(2, 2)
        self.register_buffer("mask", torch.full((2, 2), float("-inf")).triu(1))


def test_nan_is_refused_by_name_and_infinite_values_are_taken():
    model = Masked()
    template, state = kept_state(model, "all"), model.state_dict()
    taken = arrays_to_state(ArrayRecord(state), template)
    assert torch.equal(taken["mask"], model.mask)
    state["bias"] = torch.tensor([0.0, float("nan")])
    with pytest.raises(ConfigError, match="'bias' holds NaN: the training that it is from had diverged"):
        arrays_to_state(ArrayRecord(state), template)
