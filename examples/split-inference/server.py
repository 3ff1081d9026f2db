"""The server's part of a trained model, behind HTTP: it takes what crosses the cut, and returns the model's outputs.

    python server.py outputs/parts/server.pt2 --port 8123

Needs torch and safetensors: neither the model's code, nor psl_flower, nor Flower.
"""

import argparse
from http.server import BaseHTTPRequestHandler, HTTPServer

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

MOST_BYTES = 64 * 2**20  # of a request


def handler_of(part: torch.nn.Module) -> type[BaseHTTPRequestHandler]:
    """Return what answers a POST of tensors, in the form of a safetensors file, with tensors."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            length = int(self.headers.get("Content-Length", 0))
            if not 0 < length <= MOST_BYTES:
                self.send_error(413, f"from 1 to {MOST_BYTES} bytes")
                return
            try:
                crossing = load(self.rfile.read(length))
                with torch.no_grad():
                    outputs = part(*(crossing[name] for name in sorted(crossing)))
            except (SafetensorError, ValueError, RuntimeError, TypeError) as error:
                print(error, flush=True)
                self.send_error(400, "not what crosses this model's cut")
                return
            answer = save({name: tensor.contiguous() for name, tensor in outputs.items()})
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *args: object) -> None:
            pass

    return Handler


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part")
    parser.add_argument("--port", type=int, default=0, help="a free one unless given")
    options = parser.parse_args()
    server = HTTPServer(("127.0.0.1", options.port), handler_of(torch.export.load(options.part).module()))
    print(f"127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
