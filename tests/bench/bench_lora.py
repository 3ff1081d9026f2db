"""Steps of split fine-tuning with LoRA in Flower's simulation against centralised ones of the same run, and bytes.

    python tests/bench/bench_lora.py [--clients 8] [--steps 40] [--width 128] [--layers 4] [--transport streams]

A run of the app ``tests/apps/lora`` through Flower, as a user has it: a Llama with adapters on the attention's queries
and values, its first layer on the clients, 64 texts of 32 tokens a step. After each split step the ServerApp takes
centralised ones of the whole model on as many texts, with one thread and with all; medians are compared, and the ratio
is to the faster. The bytes of a step are those of SplitLoRA (arXiv 2407.00952): hidden states up, their gradients down,
and the head's adapters both ways, once a process of clients. Besides, masks and labels go up.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "apps" / "lora"))

from lora.task import bytes_of_step, make_model
from steps import Table, prepared, run

from psl_flower.app.local import LocalSuperLink


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--clients", type=int, nargs="*", default=[8])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--transport", default="streams")
    parser.add_argument("--profile", default="", help="file for a profile of the ServerApp's main thread")
    options = parser.parse_args()
    os.environ.pop("OMP_NUM_THREADS", None)  # each process as many as a user has
    model = make_model(options.width, options.layers)
    frozen = sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)
    size = {"width": options.width, "layers": options.layers}
    settings = {**size, "transport": options.transport, "steps": options.steps}
    settings["profile"] = options.profile and str(Path(options.profile).resolve())
    with tempfile.TemporaryDirectory() as folder, prepared(LocalSuperLink(Path(folder) / "home", folder)) as link:
        table = Table("lora", **size)
        for count in options.clients:
            found = run(link, "lora", num_supernodes=count, **settings)
            table.add(found)
            theirs = bytes_of_step(model, options.width, found["actors"])
            print(f"bytes sent {found['bytes']['sent']:,.0f}, SplitLoRA's {theirs['sent']:,}; ", end="")
            print(f"received {found['bytes']['received']:,.0f}, SplitLoRA's {theirs['received']:,} ", end="")
            print(f"and {theirs['masks and labels']:,} of masks and labels; of {frozen:,} frozen none; ", end="")
            print(f"{found['actors']} processes of clients; cut in {found['cutting']:.1f} s", flush=True)


if __name__ == "__main__":
    main()
