"""Cooling curves: made up on the fly, of different lengths, and different from site to site."""

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

SHORTEST, LONGEST = 8, 32  # readings
TIME_CONSTANTS = 2.0, 30.0  # readings


class CoolingCurves(Dataset):
    """Temperatures of objects that cool down, and the logarithm of each one's time constant.

    An example is (readings, target): the readings are (length,) float32 with a length of their own.

    Parameters
    ----------
    size : int
        Number of curves.
    time_constants : (float, float)
        Range they come from, in readings.
    seed : list of int
        Different data for a different seed.
    """

    def __init__(self, size: int, time_constants: tuple[float, float], seed: list[int]) -> None:
        rng = np.random.default_rng(seed)
        self.lengths = rng.integers(SHORTEST, LONGEST + 1, size)
        self.log_tau = rng.uniform(*np.log(time_constants), size).astype(np.float32)
        start, room = rng.uniform(0.5, 1.0, (size, 1)), rng.uniform(-0.5, 0.0, (size, 1))
        decay = np.exp(-np.arange(LONGEST) / np.exp(self.log_tau)[:, None])
        noise = 0.01 * rng.normal(size=(size, LONGEST))
        self.readings = (room + (start - room) * decay + noise).astype(np.float32)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(self.readings[index, : self.lengths[index]]), torch.tensor(self.log_tau[index])


def padded_batch(curves: CoolingCurves, indices: np.ndarray) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Return ((readings (b, longest), lengths (b,)), targets (b,)) of the curves at `indices`."""
    readings, targets = zip(*(curves[i] for i in indices.tolist()), strict=True)
    lengths = torch.tensor([len(curve) for curve in readings])
    return (pad_sequence(readings, batch_first=True), lengths), torch.stack(targets)


def site_data(site: int, num_sites: int) -> tuple[CoolingCurves, CoolingCurves]:
    """Return a site's training and test data: it only has objects of one kind, some sites have more than others."""
    edges = np.geomspace(*TIME_CONSTANTS, num_sites + 1)
    own = edges[site], edges[site + 1]
    return CoolingCurves(120 + 40 * (site % 3), own, [1, site]), CoolingCurves(40, own, [2, site])


def all_kinds() -> CoolingCurves:
    """Return the server's test data: objects of all kinds."""
    return CoolingCurves(400, TIME_CONSTANTS, [3])
