"""A model cut in two by hand: torch.fx could not trace it, for its loop depends on the data."""

import torch
from torch import Tensor, nn

from psl_flower import SplitModel

HIDDEN = 24


class Encoder(nn.Module):
    """The client half: reads a curve value by value, to the end of the longest one in the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(2, HIDDEN)

    def forward(self, readings: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Return what crosses the cut: the last states (b, HIDDEN), and the lengths (b,), which need no gradient.

        `readings` are (b, longest), padded at the end.
        """
        state = readings.new_zeros(len(readings), HIDDEN)
        before = readings[:, 0]
        for position in range(int(lengths.max())):
            now = readings[:, position]
            new = self.cell(torch.stack((now, 10 * (now - before)), dim=1), state)
            state = torch.where((position < lengths)[:, None], new, state)  # curves that have ended keep theirs
            before = now
        return state, lengths


class Regressor(nn.Module):
    """The server half."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(HIDDEN + 1, 64), nn.ReLU(), nn.Linear(64, 1))

    def forward(self, state: Tensor, lengths: Tensor) -> Tensor:
        """Return the estimated logarithm of the time constant, (b,)."""
        return self.layers(torch.cat((state, lengths.log()[:, None]), dim=1)).squeeze(1)


def make_model() -> SplitModel:
    """Return the model, the same on the server and the clients."""
    return SplitModel(client=Encoder(), server=Regressor())
