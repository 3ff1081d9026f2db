"""The clients: each runs the first layers on its own data."""

from psl_flower import split_client_app
from quickstart.task import Net, load_data


def load_partition(context):
    """Return loaders of this client's training and test data."""
    node, config = context.node_config, context.run_config
    return load_data(node["partition-id"], node["num-partitions"], config["batch-size"], config["partition"])


app = split_client_app(Net, cut="conv2", data_fn=load_partition)
