"""The clients: each trains the whole model on its own data."""

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from quickstart.task import Net, load_data
from quickstart.task import test as test_fn
from quickstart.task import train as train_fn

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the server's model for some epochs and return the new weights."""
    model = Net()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    data, _ = load_data(context)
    loss = train_fn(
        model,
        data,
        epochs=context.run_config["local-epochs"],
        batch_size=context.run_config["batch-size"],
        lr=message.content["config"]["lr"],
    )
    content = RecordDict(
        {
            "arrays": ArrayRecord(model.state_dict()),
            "metrics": MetricRecord({"loss": loss, "num-examples": len(data)}),
        }
    )
    return Message(content, reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Test the server's model on this client's test data."""
    model = Net()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    _, data = load_data(context)
    loss, accuracy = test_fn(model, data)
    metrics = MetricRecord({"loss": loss, "accuracy": accuracy, "num-examples": len(data)})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)
