"""Trains with UGS and with Aligned, both while two clients sleep; leaves the seconds of each epoch."""

import json
from pathlib import Path

import numpy as np
import support
from flwr.app import ArrayRecord
from flwr.serverapp import ServerApp

from psl_flower import ParallelSplitLearning, UniformGlobalSampler
from psl_flower.samplers import AlignedSampler, Delays
from psl_flower.stragglers import DelayEstimator

app = ServerApp()
SLOW, WAIT, ROUNDS = (2, 5), 0.3, 4  # seconds a step


class TwoSleepers:
    def delays(self, client_ids):
        ids = np.asarray(client_ids)
        return Delays(np.where(np.isin(ids, SLOW), WAIT, 0.0), np.zeros(len(ids)))


@app.main()
def main(grid, context):
    outcome = {}
    for sampler in (UniformGlobalSampler(24), AlignedSampler(24)):
        estimator = DelayEstimator()
        strategy = ParallelSplitLearning(
            support.tiny_resnet(),
            cut=support.CUT,
            sampler=sampler,
            optimizer=support.sgd,
            delays=estimator,
            simulated_delays=TwoSleepers(),
            sleep=True,
            evaluate_every=0,
        )
        result = strategy.start(grid, ArrayRecord(support.tiny_resnet().state_dict()), num_rounds=ROUNDS)
        rounds = result.train_metrics_clientapp
        outcome[type(sampler).__name__] = {
            "seconds": [rounds[r]["seconds_real"] for r in rounds],
            "steps": rounds[1]["num_steps"],
            "latency": estimator.delays(np.arange(8)).latency.round(3).tolist(),
        }
    Path(str(context.run_config["out"])).write_text(json.dumps(outcome))
