"""The clients: double precision unless the strategy asks for single."""

import signal
from pathlib import Path

import support
import torch
from traps import Deadly

from psl_flower import split_client_app


def load_partition(context, config):
    client, num_clients = context.node_config["partition-id"], context.node_config["num-partitions"]
    data = support.client_data(client, num_clients, getattr(torch, config["dtype"]))
    if not config["trap"]:
        return data
    return Deadly(data, Path(config["trap"]), {"die": signal.SIGKILL, "freeze": signal.SIGSTOP}[config["end"]])


# The dtype of the half follows from the weights the server sends; model_fn's own are never read.
app = split_client_app(support.tiny_resnet_64, cut=support.CUT, data_fn=load_partition)
