"""The clients: each runs the first layers on its own data."""

from psl_flower import split_client_app
from quickstart.task import Net, load_data

app = split_client_app(Net, cut="conv2", data_fn=load_data)
