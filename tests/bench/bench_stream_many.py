"""What many real client processes cost that do not take part: an exchange with 128 of 128, of 1,000, of 10,000.

    python tests/bench/bench_stream_many.py [--streams 128 1000 10000]

The streams are opened from two processes, each over a connection of its own with its own TLS, as by as many client
processes; these answer what a client does that is asked who it is.
"""

import argparse
import asyncio
import multiprocessing
import re
import statistics
import time
from pathlib import Path

import grpc.aio

from psl_flower.exchange.codec import REQUEST, WeightStore, decode_request, encode_reply
from psl_flower.exchange.frames import Decoder, Frame, encode
from psl_flower.exchange.streams import StreamCarrier
from psl_flower.exchange.streams.endpoint import CHANNEL_OPTIONS, METHOD, NODE, SESSION, TOKEN
from psl_flower.exchange.streams.open_files import make_room
from psl_flower.exchange.streams.security import SERVER_NAME, Ticket
from psl_flower.flower import become_server
from psl_flower.protocol import DESCRIBE, Description, Reply, Request

ASKED, REPEATS, PROCESSES = 128, 40, 2
AT_ONCE = 32  # handshakes of a process


class Invitations:
    """A grid that keeps what it is to deliver."""

    def __init__(self, nodes):
        self.nodes, self.tickets = nodes, {}

    def get_node_ids(self):
        return self.nodes

    def push_messages(self, messages):
        for message in messages:
            self.tickets[message.metadata.dst_node_id] = Ticket.decode(message.content.config_records["attach"])
        return [str(node) for node in self.tickets]

    def pull_messages(self, message_ids):
        return []


async def client(node, ticket, turn):
    options = [*CHANNEL_OPTIONS, ("grpc.ssl_target_name_override", SERVER_NAME), ("grpc.use_local_subchannel_pool", 1)]
    credentials = grpc.ssl_channel_credentials(ticket.certificate)
    metadata = ((SESSION, ticket.session), (NODE, str(node)), (TOKEN, ticket.token))
    async with grpc.aio.secure_channel(ticket.address, credentials, options) as channel:
        async with turn:
            await channel.channel_ready()
        call, decoder, number = channel.stream_stream(METHOD)(metadata=metadata), Decoder(), 0
        join = {"kind": "join", "session": ticket.session, "node": node, "token": ticket.token, "node-config": {}}
        frame = Frame({**join, "resident": False})
        while True:
            for chunk in encode(frame, number):
                await call.write(chunk)
            number += 1
            while True:
                chunk = await call.read()
                if chunk is grpc.aio.EOF:
                    return
                asked = decoder.feed(chunk)
                if asked is not None and asked.header["kind"] == REQUEST:
                    break
            at, _, request = decode_request(asked, WeightStore())
            frame = encode_reply(at, Reply(descriptions={node: Description(node, 1, 0)}), request)


async def clients(tickets):
    turn = asyncio.Semaphore(AT_ONCE)
    await asyncio.gather(*(client(node, ticket, turn) for node, ticket in tickets.items()), return_exceptions=True)


def serve(tickets):
    make_room(len(tickets))
    asyncio.run(clients(tickets))


def resident():
    return int(re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def measure(count):
    """Return the median seconds of an exchange, also of this process's cores, those of connecting, and kB a stream."""
    nodes = list(range(1000, 1000 + count))
    grid, context = Invitations(nodes), multiprocessing.get_context("spawn")
    with StreamCarrier(grid) as carrier:
        before = resident()
        carrier._invite(nodes)
        shares = [{node: grid.tickets[node] for node in nodes[i::PROCESSES]} for i in range(PROCESSES)]
        processes = [context.Process(target=serve, args=(share,), daemon=True) for share in shares]
        begin = time.perf_counter()
        for process in processes:
            process.start()
        refused = carrier.attach(nodes, 600)
        connecting = time.perf_counter() - begin
        assert not refused, list(refused.values())[:1]
        grown = (resident() - before) / count
        times, busy = [], []
        for _ in range(REPEATS):
            begin, worked = time.perf_counter(), time.process_time()
            reply = carrier.exchange(Request(stage=DESCRIBE, nodes=tuple(nodes[:: count // ASKED][:ASKED])), 60)
            times.append(time.perf_counter() - begin)
            busy.append(time.process_time() - worked)
            assert len(reply.descriptions) == ASKED
        for process in processes:
            process.kill()
            process.join()
    settled = slice(REPEATS // 5, None)
    return statistics.median(times[settled]), statistics.median(busy[settled]), connecting, grown


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--streams", type=int, nargs="*", default=[128, 1000])
    options = parser.parse_args()
    make_room(max(options.streams))
    become_server(1, 1)
    columns = ("streams", "exchange with 128 of them, ms", "ratio to the first", "of the server's cores, ms", "ratio")
    print(f"| {' | '.join((*columns, 'connecting s', 'kB a stream'))} |")
    print(f"|{'---|' * 7}")
    first = None
    for count in options.streams:
        *exchange, connecting, grown = measure(count)
        first = first or exchange
        shown = [f"{1e3 * each:.1f} | {each / one:.2f}" for each, one in zip(exchange, first, strict=True)]
        print(f"| {count} | {' | '.join(shown)} | {connecting:.1f} | {grown:.0f} |", flush=True)


if __name__ == "__main__":
    main()
