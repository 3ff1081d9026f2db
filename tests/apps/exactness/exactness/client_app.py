"""The clients: double precision unless the strategy asks for single."""

import support
import torch

from psl_flower import split_client_app


def load_partition(context, config):
    client, num_clients = context.node_config["partition-id"], context.node_config["num-partitions"]
    return support.client_data(client, num_clients, getattr(torch, config["dtype"]))


# The dtype of the half follows from the weights the server sends; model_fn's own are never read.
app = split_client_app(support.tiny_resnet_64, cut=support.CUT, data_fn=load_partition)
