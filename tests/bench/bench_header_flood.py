"""What a member does to the others' exchanges that sends headers as long as they may be, again and again.

    python tests/bench/bench_header_flood.py

Two client processes that stay, and a third of a stranger with tokens of its own, which floods the server while the two
are asked; medians and maxima of the exchanges.
"""

import argparse
import multiprocessing
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from process_grid import ProcessGrid
from support import CUT, load_partition, tiny_resnet

from psl_flower import split_client_app
from psl_flower.exchange.frames import _LENGTHS, _PREFIX
from psl_flower.exchange.limits import MAX_HEADER_BYTES
from psl_flower.exchange.streams import StreamCarrier
from psl_flower.protocol import DESCRIBE, Request

STRANGER = 10**6
BEGIN = b'[[],{"kind":"reply","number":-1,"x":['
HEADERS = {
    "numbers": lambda: BEGIN + b"1," * (MAX_HEADER_BYTES // 2 - 40) + b"1]}]",
    "lists": lambda: BEGIN + b"[]," * (2**20 - 10) + b"[]]}]",
    "64 MB": lambda: bytes(64 * 2**20),
}


def make_app():
    return split_client_app(tiny_resnet, cut=CUT, data_fn=load_partition, device="cpu")


def flood(ticket, tokens, header, stop):
    """Open a stream with each token, and send frames until it is closed."""
    import grpc

    from psl_flower.client.stream import _connect
    from psl_flower.exchange.streams.endpoint import METHOD

    body = _LENGTHS.pack(len(header), 0) + header
    for node, token in tokens:
        if stop.is_set():
            return
        with _connect(ticket) as channel:
            chunks = (_PREFIX.pack(b"PSLF", 1, number, 0) + body for number in range(10**6))
            metadata = (("psl-session", ticket.session), ("psl-node", str(node)), ("psl-token", token))
            try:
                for _ in channel.stream_stream(METHOD)(chunks, metadata=metadata):
                    pass
            except grpc.RpcError:
                pass


def exchanges(carrier, nodes, seconds):
    found, end = [], time.monotonic() + seconds
    while time.monotonic() < end:
        begin = time.monotonic()
        reply = carrier.exchange(Request(stage=DESCRIBE, nodes=tuple(nodes)), 60)
        assert len(reply.descriptions) == len(nodes), reply.failures
        found.append(1000 * (time.monotonic() - begin))
    return f"{len(found)} exchanges, median {statistics.median(found):.1f} ms, longest {max(found):.0f} ms"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5.0)
    seconds = parser.parse_args().seconds
    with ProcessGrid(make_app, 2, num_processes=2) as grid, StreamCarrier(grid) as carrier:
        from psl_flower.exchange.streams.security import Ticket

        nodes = list(grid.get_node_ids())
        print("undisturbed:", exchanges(carrier, nodes, seconds))
        for name, make in HEADERS.items():
            ticket = Ticket(carrier.address, carrier._endpoint.certificate, carrier._tokens.session, "")
            tokens = [(STRANGER + i, carrier._tokens.issue(STRANGER + i)) for i in range(1000)]
            context = multiprocessing.get_context("spawn")
            stop = context.Event()
            process = context.Process(target=flood, args=(ticket, tokens, make(), stop), daemon=True)
            process.start()
            time.sleep(3)
            print(f"headers of {name}, a new stream whenever one is closed:", exchanges(carrier, nodes, seconds))
            stop.set()
            process.join(20)
            process.kill()


if __name__ == "__main__":
    main()
