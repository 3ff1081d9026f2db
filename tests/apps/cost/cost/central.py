"""Takes a centralised step for each line that comes in, with as many threads as it says, and prints its seconds."""

import sys
import time

import numpy as np
import torch

from cost.task import BATCH, images, model_fn


def main():
    data, rng, model = images(int(sys.argv[1])), np.random.default_rng(0), model_fn()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for line in sys.stdin:
        torch.set_num_threads(int(line))
        begin = time.perf_counter()
        x, y = data.get_batch(rng.choice(len(data), BATCH))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        print(time.perf_counter() - begin, flush=True)


if __name__ == "__main__":
    main()
