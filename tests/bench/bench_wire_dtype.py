"""What fewer bits on the wire do to accuracy: whole trainings, with the same batches and first weights for all.

    python tests/bench/bench_wire_dtype.py [--seeds 3] [--data-path FOLDER-OF-FASHION-MNIST]

Activations and their gradients go through the stream carrier's own packing; weights and parameter gradients travel as
they are, there as here. Differences to float32 are of the same seed. The last column is the share of the gradients'
elements that are not zero but arrive as zero, and in brackets what it would be without scaling (float16 as it is, one
int8 scale for the whole tensor).
"""

import argparse
import statistics

import numpy as np
import torch

from psl_flower.app.datasets import SPECS, load_arrays
from psl_flower.app.images import ImageSet
from psl_flower.app.models import build_model, default_cut
from psl_flower.exchange.tensors import Packer, Unpacker
from psl_flower.server import LocalBackend
from psl_flower.split import cut_model

# dataset: (examples, epochs, batch size, learning rate)
TRAININGS = {"digits": (1437, 15, 64, 0.02), "fashion-mnist": (6000, 4, 128, 0.02)}
DTYPES = ("float32", "float16", "bfloat16", "int8")


def travel(tensor, dtype):
    """Return a tensor as it arrives, and the bytes it took."""
    packer = Packer(dtype)
    spec = packer.pack(tensor.detach(), reduce=True)
    buffers = [[memoryview(b"".join(bytes(piece) for piece in pieces))] for pieces in packer.buffers]
    return Unpacker(buffers).unpack(spec), sum(buffer[0].nbytes for buffer in buffers)


def unscaled(tensor, dtype):
    if dtype == "int8":
        return (tensor / (tensor.abs().max() / 127)).round()
    return tensor.to(getattr(torch, dtype))


def train(dataset, data_path, dtype, seed):
    """Return the test accuracy in percent, bytes both ways, and the shares of gradients lost, as is and unscaled."""
    examples, epochs, batch_size, rate = TRAININGS[dataset]
    spec = SPECS[dataset]
    train_set, test_set = (
        ImageSet(*load_arrays(dataset, split, data_path), mean=spec.mean, std=spec.std) for split in ("train", "test")
    )
    rng = np.random.default_rng(seed)
    used = rng.permutation(len(train_set))[:examples]
    model = build_model("cnn", in_channels=1, num_classes=10, seed=seed)
    halves = cut_model(model, default_cut("cnn"))
    client = halves.client
    backend = LocalBackend(
        {"head": client, "body": halves.server},
        {"head": "client", "body": "server"},
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=rate, momentum=0.9),
        loss=torch.nn.functional.cross_entropy,
        device=torch.device("cpu"),
        classification=True,
        order=[name for name, _ in model.named_parameters()],
    )
    num_bytes, lost, lost_unscaled, nonzero = 0, 0, 0, 0
    for _ in range(epochs):
        for rows in np.array_split(rng.permutation(used), -(-examples // batch_size)):
            inputs, labels = train_set.get_batch(rows)
            client.train()
            (sent,) = client(inputs)
            arrived, up = travel(sent, dtype)
            outcome = backend.part("body", seed=0).forward_backward((arrived,), labels)
            (gradient,) = outcome.gradient
            back, down = travel(gradient, dtype)
            found = torch.autograd.grad(sent, list(client.parameters()), back)
            named = zip((name for name, _ in client.named_parameters()), found, strict=True)
            backend.commit({"head": dict(named), "body": outcome.parameter_gradients})
            num_bytes += up + down
            some = gradient != 0
            nonzero += int(some.sum())
            lost += int((some & (back == 0)).sum())
            lost_unscaled += int((some & (unscaled(gradient, dtype) == 0)).sum())
    parts, right = [part.eval() for part in backend.parts.values()], 0
    with torch.no_grad():
        for rows in np.array_split(np.arange(len(test_set)), -(-len(test_set) // 500)):
            inputs, labels = test_set.get_batch(rows)
            right += int((parts[1](*parts[0](inputs)).argmax(dim=1) == labels).sum())
    return 100 * right / len(test_set), num_bytes, lost / nonzero, lost_unscaled / nonzero


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--data-path", default="", help="of Fashion-MNIST; without one, only digits")
    options = parser.parse_args()
    print("| data | wire | bytes | accuracy % | minus float32, mean ± sd | gradients lost (unscaled) |")
    print("|---|---|---|---|---|---|")
    for dataset in ["digits", *["fashion-mnist"] * bool(options.data_path)]:
        path = options.data_path if dataset != "digits" else ""
        reference = None
        for dtype in DTYPES:
            runs = [train(dataset, path, dtype, seed) for seed in range(options.seeds)]
            accuracy, num_bytes, lost, plain = (list(column) for column in zip(*runs, strict=True))
            reference = reference or (accuracy, num_bytes)
            differences = [a - b for a, b in zip(accuracy, reference[0], strict=True)]
            spread = statistics.stdev(differences) if len(differences) > 1 else 0.0
            print(
                f"| {dataset} | {dtype} | {sum(num_bytes) / sum(reference[1]):.3f} | {statistics.mean(accuracy):.2f} "
                f"| {statistics.mean(differences):+.2f} ± {spread:.2f} "
                f"| {statistics.mean(lost):.1e} ({statistics.mean(plain):.1e}) |",
                flush=True,
            )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
