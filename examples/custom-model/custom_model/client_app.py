"""The clients: how a batch is made of curves of different lengths."""

import numpy as np
import torch
from flwr.app import Context
from torch import Tensor

from custom_model.data import CoolingCurves, padded_batch, site_data
from custom_model.model import make_model
from psl_flower import SplitClient, split_client_app


class CurveClient(SplitClient):
    """Pads curves to one length, and jitters those it trains on."""

    def batch(self, dataset: CoolingCurves, indices: np.ndarray) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Return ((readings, lengths), targets) of the curves at `indices`."""
        (readings, lengths), targets = padded_batch(dataset, indices)
        if dataset is self.train:
            readings = readings + 0.01 * torch.randn(readings.shape)  # torch's own generator, seeded for every step
        return (readings, lengths), targets


def load_data(context: Context) -> tuple[CoolingCurves, CoolingCurves]:
    """Return this site's training and test data."""
    return site_data(context.node_config["partition-id"], context.node_config["num-partitions"])


app = split_client_app(make_model, data_fn=load_data, client_class=CurveClient)
