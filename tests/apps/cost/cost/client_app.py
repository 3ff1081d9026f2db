"""Split-learning clients."""

from cost.task import CUT, data_fn, model_fn
from psl_flower import split_client_app

app = split_client_app(model_fn, cut=CUT, data_fn=data_fn)
