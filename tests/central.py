"""Takes a centralised step for each line that comes in, with as many threads as it says, and prints its seconds."""

import importlib
import sys
import time

import torch


def main():
    step = importlib.import_module(sys.argv[1]).centralised(*map(int, sys.argv[2:]))
    for line in sys.stdin:
        torch.set_num_threads(int(line))
        begin = time.perf_counter()
        step()
        print(time.perf_counter() - begin, flush=True)


if __name__ == "__main__":
    main()
