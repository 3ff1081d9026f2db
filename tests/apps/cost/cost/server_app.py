"""Times an epoch of split steps, echoes of the same size, and centralised steps."""

import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.serverapp import ServerApp

from cost.task import BATCH, STEPS, model_fn
from psl_flower import ParallelSplitLearning, UniformGlobalSampler
from psl_flower.threads import set_threads

app = ServerApp()


@app.main()
def main(grid, context):
    set_threads()
    nodes = list(grid.get_node_ids())
    streams = _split(grid, len(nodes), "streams")
    middle = _split(grid, len(nodes), "messages")
    echoes = []
    for _ in range(STEPS):
        begin = time.perf_counter()
        for size in (middle["bytes_sent"], middle["bytes_received"]):
            _echo(grid, nodes[: int(middle["clients"])], int(size / 2 / middle["clients"]))
        echoes.append(time.perf_counter() - begin)
    both = {"streams": streams, "messages": middle}
    result = {
        "split": {carrier: found["seconds_real"] for carrier, found in both.items()},
        "bytes": {carrier: found["bytes_sent"] + found["bytes_received"] for carrier, found in both.items()},
        "echo": statistics.median(echoes),
        "central": statistics.median(_central()),
    }
    Path(str(context.run_config["out"])).write_text(json.dumps(result))


def _split(grid, num_nodes, transport):
    """Return the medians of what its steps take."""
    with tempfile.TemporaryDirectory() as folder:
        strategy = ParallelSplitLearning(
            model_fn(),
            cut="stage2",
            sampler=UniformGlobalSampler(BATCH),
            transport=transport,
            min_available_nodes=num_nodes,
            evaluate_every=0,
            output_dir=folder,
        )
        strategy.start(grid, ArrayRecord(model_fn().state_dict()), num_rounds=2)
        lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    # the first round warms the processes up
    steps = [s for s in map(json.loads, lines) if s["kind"] == "step" and s["round"] == 2]
    names = ("seconds_real", "bytes_sent", "bytes_received", "clients")
    return {name: statistics.median(s[name] for s in steps) for name in names}


def _echo(grid, nodes, size):
    content = RecordDict({"a": ArrayRecord({"a": Array("uint8", (size,), "raw", bytes(size))})})
    waiting = set(grid.push_messages([Message(content, node, "train.echo") for node in nodes]))
    while waiting:
        waiting -= {reply.metadata.reply_to_message_id for reply in grid.pull_messages(list(waiting))}
        time.sleep(0.001)


def _central():
    model = model_fn()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(STEPS):
        x, y = torch.randn(BATCH, 1, 28, 28), torch.randint(0, 10, (BATCH,))
        begin = time.perf_counter()
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        yield time.perf_counter() - begin
