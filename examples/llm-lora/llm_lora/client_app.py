"""The clients: each has texts of one topic. They run the first and the last layers, and take the loss."""

from flwr.app import Context

from llm_lora.model import CUT, TAIL, make_model
from llm_lora.texts import PAD, encoded
from psl_flower import PadTexts, causal_lm_loss, split_client_app


def load_data(context: Context) -> tuple[list[dict[str, list[int]]], list[dict[str, list[int]]]]:
    """Return this client's training and test texts."""
    topic = int(context.node_config["partition-id"])
    return encoded(90, seed=2, topic=topic), encoded(30, seed=3, topic=topic)


app = split_client_app(
    make_model,
    cut=CUT,
    tail=TAIL,
    data_fn=load_data,
    collate_fn=PadTexts(PAD),
    loss=causal_lm_loss,
    classification=False,
)
