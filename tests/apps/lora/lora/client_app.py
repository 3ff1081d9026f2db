"""Clients with texts."""

from lora.task import BATCH, CUT, LOSS, make_model, pad, texts
from psl_flower import split_client_app


def model_fn(context):
    return make_model(context.run_config["width"], context.run_config["layers"])


def data_fn(context):
    client, clients = context.node_config["partition-id"], context.node_config["num-partitions"]
    return texts(BATCH * context.run_config["steps"] // clients, client)


app = split_client_app(model_fn, cut=CUT, data_fn=data_fn, collate_fn=pad, **LOSS)
