"""The clients: each trains the whole model on its own data."""

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from quickstart.task import Net, load_data
from quickstart.task import test as test_fn
from quickstart.task import train as train_fn

app = ClientApp()


def load_partition(context):
    """Return loaders of this client's training and test data."""
    node, config = context.node_config, context.run_config
    return load_data(node["partition-id"], node["num-partitions"], config["batch-size"], config["partition"])


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the server's model for some epochs and return the new weights."""
    model = Net()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    loader, _ = load_partition(context)
    loss = train_fn(model, loader, context.run_config["local-epochs"], message.content["config"]["lr"])
    content = RecordDict(
        {
            "arrays": ArrayRecord(model.state_dict()),
            "metrics": MetricRecord({"loss": loss, "num-examples": len(loader.dataset)}),
        }
    )
    return Message(content, reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Test the server's model on this client's test data."""
    model = Net()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    _, loader = load_partition(context)
    loss, accuracy = test_fn(model, loader)
    metrics = MetricRecord({"loss": loss, "accuracy": accuracy, "num-examples": len(loader.dataset)})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)
