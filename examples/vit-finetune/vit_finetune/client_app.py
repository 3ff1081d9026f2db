"""The clients: they run the patches and the first layer, which are frozen, on their own digits."""

from flwr.app import Context
from torch import Tensor

from psl_flower import split_client_app
from vit_finetune.digits import client_data
from vit_finetune.model import CUT, make_model


def load_data(context: Context) -> list[dict[str, Tensor]]:
    """Return this client's digits."""
    return client_data(int(context.node_config["partition-id"]), int(context.node_config["num-partitions"]))


app = split_client_app(make_model, cut=CUT, data_fn=load_data)
