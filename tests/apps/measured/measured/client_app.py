"""Ordinary clients: waiting is what the server asks of them."""

import support

from psl_flower import split_client_app

app = split_client_app(support.tiny_resnet, cut=support.CUT, data_fn=support.load_partition)
