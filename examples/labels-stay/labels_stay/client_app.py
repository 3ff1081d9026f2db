"""The hospitals: each has a third of scikit-learn's breast cancer data (569 patients, 30 measurements, a diagnosis)."""

import numpy as np
import torch
from flwr.app import Context
from sklearn.datasets import load_breast_cancer
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from labels_stay.model import CUT, TAIL, Net
from psl_flower import split_client_app


def load_data(context: Context) -> tuple[TensorDataset, TensorDataset]:
    """Return this hospital's training and test data, standardised by itself."""
    place, places = context.node_config["partition-id"], context.node_config["num-partitions"]
    measurements, diagnoses = load_breast_cancer(return_X_y=True)
    mine = np.random.default_rng(0).permutation(len(diagnoses))[place::places]
    x = torch.tensor(measurements[mine], dtype=torch.float32)
    x = (x - x.mean(dim=0)) / x.std(dim=0)
    data = TensorDataset(x, torch.tensor(diagnoses[mine]))
    test = len(data) // 4
    return TensorDataset(*data[test:]), TensorDataset(*data[:test])


app = split_client_app(Net, cut=CUT, tail=TAIL, loss=cross_entropy, data_fn=load_data, secure_aggregation=True)
