"""The model and the data of the benchmark: the default app's CNN on random images of CIFAR-10's size, 128 a step."""

from functools import lru_cache

import numpy as np
import torch

from psl_flower.app.images import ImageSet, crop_flip
from psl_flower.app.models import build_model, default_cut
from psl_flower.split import replace_batch_norm

BATCH = 128
CUT = default_cut("cnn")


def model_fn():
    return replace_batch_norm(build_model("cnn", in_channels=3, num_classes=10, seed=0), before=CUT)


@lru_cache(maxsize=1)
def arrays(examples):
    """Return all images and labels, once a process, as the default app's cache of arrays does."""
    rng = np.random.default_rng(5)
    return rng.integers(0, 256, (examples, 3, 32, 32), dtype=np.uint8), rng.integers(0, 10, examples)


def optimizer(parameters):
    return torch.optim.SGD(parameters, lr=0.01)


def centralised(examples):
    """Return a function that takes a step of the uncut model, from the examples' numbers to the new weights."""
    data, rng, model = images(examples), np.random.default_rng(0), model_fn()
    optimizer_of_all = optimizer(model.parameters())

    def step():
        x, y = data.get_batch(rng.choice(len(data), BATCH))
        optimizer_of_all.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer_of_all.step()

    return step


def images(examples, indices=None):
    return ImageSet(*arrays(examples), mean=[0.5] * 3, std=[0.25] * 3, indices=indices, augment=crop_flip)


def num_examples(steps, num_clients):
    """Return how many examples make so many steps, as many for each client; at least one."""
    return max(1, round(steps * BATCH / num_clients)) * num_clients


def data_fn(context):
    client, num_clients = context.node_config["partition-id"], context.node_config["num-partitions"]
    examples = num_examples(context.run_config["steps"], num_clients)
    share = examples // num_clients
    return images(examples, np.arange(client * share, (client + 1) * share))
