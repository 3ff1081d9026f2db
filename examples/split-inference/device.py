"""The device's part of a trained model: it runs the first layers, and asks the server to finish.

    python device.py outputs/parts/client.pt2 127.0.0.1:8123 images.safetensors logits.safetensors

Needs torch and safetensors: neither the model's code, nor psl_flower, nor Flower.
"""

import sys
from http.client import HTTPConnection

import torch
from safetensors.torch import load, load_file, save, save_file


def predict(part: torch.nn.Module, server: str, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the whole model's outputs for images that stay here; `server` is sent what the part makes of them."""
    with torch.no_grad():
        crossing = part(images)
    # numbered, so that their order is that of their names
    body = save({f"{i:03}": tensor.contiguous() for i, tensor in enumerate(crossing.values())})
    connection = HTTPConnection(server, timeout=60)
    connection.request("POST", "/", body)
    answer = connection.getresponse()
    if answer.status != 200:
        raise RuntimeError(f"{server} says {answer.status}: {answer.reason}")
    return load(answer.read())


def main() -> None:
    """Run the command line."""
    path, server, given, taken = sys.argv[1:]
    images = load_file(given)["images"]
    outputs = predict(torch.export.load(path).module(), server, images)
    save_file(outputs, taken)
    print(f"{len(images)} images stayed here, {taken} has the outputs.")


if __name__ == "__main__":
    main()
