"""Split-learning clients that also answer echoes."""

from flwr.app import Message

from cost.task import data_fn, model_fn
from psl_flower import split_client_app

app = split_client_app(model_fn, cut="stage2", data_fn=data_fn)


@app.train("echo")
def echo(message, context):
    return Message(message.content, reply_to=message)
