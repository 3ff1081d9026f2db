"""The client: its data and batches, its half of the model, and the ClientApp around them."""

from psl_flower.client.app import split_client_app
from psl_flower.client.client import SplitClient

__all__ = ["SplitClient", "split_client_app"]
