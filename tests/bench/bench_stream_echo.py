"""One exchange with two client processes, the same bytes each way, over streams as a deployment has them.

    OMP_NUM_THREADS=1 python tests/bench/bench_stream_echo.py [BYTES ...]

The payload goes out as the client half's weights, a new version each time, and comes back as its activations. Two
processes hold their streams open inside their attach messages, as two SuperNodes' ClientApps do; Flower has no part
in what is measured. The baseline is gRPC with TLS alone: as many bytes in chunks of the same size, none of them looked
at, between the same number of processes. Measured with the streams alone, as between machines, and with shared memory.
"""

import queue
import statistics
import sys
import threading
import time
from concurrent import futures
from functools import partial
from pathlib import Path

import grpc
import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset

sys.path.insert(0, str(Path(__file__).parents[1]))

from process_grid import ProcessGrid
from warm import WARM

from psl_flower import SplitModel, split_client_app
from psl_flower.exchange.frames import CHUNK_BYTES
from psl_flower.exchange.streams import StreamCarrier, StreamOptions
from psl_flower.exchange.streams.endpoint import CHANNEL_OPTIONS
from psl_flower.exchange.streams.security import SERVER_NAME, make_identity
from psl_flower.protocol import Orders, Request, Weights
from psl_flower.tree import leaves

SIZES = (64 * 2**10, 2 * 2**20, 16 * 2**20)


class Echo(nn.Module):
    """Returns its parameter, whatever its input."""

    def __init__(self, elements):
        super().__init__()
        self.p = nn.Parameter(torch.zeros(1, elements))

    def forward(self, x):
        return self.p.view_as(self.p)


def make_app(elements):
    data = TensorDataset(torch.zeros(1, 1), torch.zeros(1, dtype=torch.int64))
    return split_client_app(
        lambda: SplitModel(client=Echo(elements), server=nn.Linear(1, 2)), data_fn=lambda context: data
    )


def measure(num_bytes, repeats, shared_memory):
    options = StreamOptions(shared_memory=shared_memory)
    times = []
    with ProcessGrid(partial(make_app, num_bytes // 4), 2) as grid, StreamCarrier(grid, options) as carrier:
        for i in range(repeats):
            p = torch.from_numpy(np.full((1, num_bytes // 4), i, np.float32))
            orders = Orders(clients=np.arange(2), starts=np.zeros(2, int), counts=np.ones(2, int), step=i)
            weights = {"head": Weights({"client.p": p}, {}, f"v{i}", "none")}
            request = Request(stage="forward", nodes=tuple(grid.get_node_ids()), orders=orders, weights=weights)
            begin = time.perf_counter()
            reply = carrier.exchange(request, 60)
            times.append(time.perf_counter() - begin)
            assert not reply.failures, reply.failures
            for part in reply.parts:
                assert float(leaves(part.outputs["activations"].value)[0][0, -1]) == i
    return times[repeats // 5 :]


def chunks_of(num_bytes):
    whole, rest = divmod(num_bytes, CHUNK_BYTES)
    return [bytes(CHUNK_BYTES)] * whole + [bytes(rest)] * bool(rest)


def bare_client(address, certificate, num_bytes):
    options = [*CHANNEL_OPTIONS, ("grpc.ssl_target_name_override", SERVER_NAME)]
    out, arrived = queue.SimpleQueue(), 0
    with grpc.secure_channel(address, grpc.ssl_channel_credentials(certificate), options) as channel:
        for chunk in channel.stream_stream("/bare/Open")(iter(out.get, None)):
            arrived += len(chunk)
            if arrived == num_bytes:
                arrived = 0
                for each in chunks_of(num_bytes):
                    out.put(each)


def measure_bare(num_bytes, repeats):
    outgoing, arrived = queue.SimpleQueue(), queue.SimpleQueue()

    def read(chunks):
        try:
            for chunk in chunks:
                arrived.put(len(chunk))
        except grpc.RpcError:  # the end
            pass

    def serve(chunks, context):
        mine = queue.SimpleQueue()
        threading.Thread(target=read, args=(chunks,), daemon=True).start()
        outgoing.put(mine)
        yield from iter(mine.get, None)

    identity, times = make_identity(), []
    handlers = {"Open": grpc.stream_stream_rpc_method_handler(serve)}
    with futures.ThreadPoolExecutor(4) as threads:
        handler = grpc.method_handlers_generic_handler("bare", handlers)
        server = grpc.server(threads, handlers=[handler], options=CHANNEL_OPTIONS)
        credentials = grpc.ssl_server_credentials([(identity.key, identity.certificate)])
        address = f"127.0.0.1:{server.add_secure_port('127.0.0.1:0', credentials)}"
        server.start()
        arguments = (address, identity.certificate, num_bytes)
        clients = [WARM.Process(target=bare_client, args=arguments, daemon=True) for _ in range(2)]
        for client in clients:
            client.start()
        streams = [outgoing.get() for _ in clients]
        for _ in range(repeats):
            begin, missing = time.perf_counter(), 2 * num_bytes
            for stream in streams:
                for chunk in chunks_of(num_bytes):
                    stream.put(chunk)
            while missing:
                missing -= arrived.get()
            times.append(time.perf_counter() - begin)
        for stream in streams:
            stream.put(None)
        for client in clients:
            client.kill()
            client.join()
        server.stop(None).wait()
    return times[repeats // 5 :]


def main():
    torch.set_num_threads(1)
    columns = ("streams: median ms (fastest)", "with shared memory", "gRPC with TLS", "ratios of the medians to it")
    print(f"| bytes each way and client | {' | '.join(columns)} |")
    print("|---|---|---|---|---|")
    for size in map(int, sys.argv[1:]) if len(sys.argv) > 1 else SIZES:
        repeats = 300 if size < 2**20 else 40
        found = [measure(size, repeats, False), measure(size, repeats, True), measure_bare(size, repeats)]
        medians = [statistics.median(times) for times in found]
        columns = [f"{middle * 1e3:.2f} ({min(times) * 1e3:.2f})" for middle, times in zip(medians, found, strict=True)]
        ratios = ", ".join(f"{middle / medians[2]:.2f}" for middle in medians[:2])
        print(f"| {size:,} | {' | '.join(columns)} | {ratios} |", flush=True)


if __name__ == "__main__":
    main()
