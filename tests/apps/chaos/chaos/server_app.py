"""The server: writes down the work orders of every committed step, and goes on from where it was on request."""

import json
from pathlib import Path

import support
from flwr.app import ArrayRecord, ConfigRecord
from flwr.serverapp import ServerApp

from psl_flower import FaultPolicy, ParallelSplitLearning, UniformGlobalSampler
from psl_flower.strategy.step import StepRunner

app = ServerApp()


COMMITTED = []


class Recording(StepRunner):
    """Notes the orders of what an attempt has applied."""

    def attempt(self, orders, waits):
        attempt = super().attempt(orders, waits)
        applied = [o for o in orders.each() if attempt.record is not None and o.client in attempt.clients]
        COMMITTED.extend([o.client, o.epoch, o.step, o.start, o.count] for o in applied)
        return attempt


@app.main()
def main(grid, context):
    from psl_flower.strategy import strategy as module

    module.StepRunner = Recording
    config = context.run_config
    model, folder = support.tiny_resnet(), Path(str(config["results"]))
    strategy = ParallelSplitLearning(
        model,
        cut=support.CUT,
        sampler=UniformGlobalSampler(32, seed=3),
        optimizer=support.sgd,
        min_available_nodes=len(list(grid.get_node_ids())),
        transport=str(config["transport"]),
        evaluate_every=0,
        faults=FaultPolicy(
            mistakes="retry",
            step_timeout=float(config["step-timeout"]),
            patience=float(config["patience"]),
        ),
        checkpoint_every=int(config["checkpoint-every"]),
        resume_from=str(config["resume-from"]) or None,
        output_dir=folder,
    )

    def evaluate(server_round, arrays):
        if server_round == config["fail-in-round"]:
            raise OSError("no test data today")

    strategy.start(
        grid,
        ArrayRecord(model.state_dict()),
        num_rounds=int(config["rounds"]),
        train_config=ConfigRecord({name: config[name] for name in ("results", "share", "deaths", "hold-at")}),
        evaluate_fn=evaluate,
    )
    (folder / "committed.json").write_text(json.dumps(COMMITTED))
