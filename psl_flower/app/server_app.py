"""The default app's server: what ``flwr run .`` from the repository root runs."""

from __future__ import annotations

import logging
import sys
from functools import partial
from pathlib import Path

from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from torch.nn import functional

from psl_flower.app.task import central_test, cut_of, make_model, make_optimizer, method_of
from psl_flower.callbacks import make_loggers
from psl_flower.config import RunConfig
from psl_flower.last_word import last_word
from psl_flower.methods import make_method
from psl_flower.privacy import RandomizedResponse, parse_defences
from psl_flower.server import Loss
from psl_flower.strategy import ParallelSplitLearning
from psl_flower.temporary_folder import check_temporary_folder
from psl_flower.threads import set_threads

log = logging.getLogger("flwr.psl_flower")

app = ServerApp()


def make_strategy(config: RunConfig) -> ParallelSplitLearning:
    """Make the strategy of a run; its model is `make_model`'s."""
    delays, simulated_delays = config.make_delays()
    return ParallelSplitLearning(
        make_model(config),
        cut=cut_of(config),
        tail=config.tail or None,
        method=method_of(config),
        secure_aggregation=config.secure_aggregation,
        private=config.private(),
        label_counts="noisy" if config.label_epsilon else None,
        sampler=config.make_sampler(),
        optimizer=partial(make_optimizer, config),
        loss=loss_of(config),
        delays=delays,
        simulated_delays=simulated_delays,
        sleep=config.sleep,
        transport=config.transport,
        stream_options=config.stream_options(),
        device=config.device,
        precision=config.precision,
        min_available_nodes=config.min_available_nodes,
        evaluate_every=config.evaluate_every,
        faults=config.fault_policy(),
        checkpoint_every=config.checkpoint_every,
        keep_checkpoints=config.keep_checkpoints,
        resume_from=config.resume_from or None,
        callbacks=make_loggers(config.loggers, config.output_dir),
        output_dir=config.output_dir,
        run_config=config.as_run_config(),
    )


def loss_of(config: RunConfig) -> Loss:
    """Return the cross-entropy, or that which takes into account how clients replace the labels that they send."""
    replaced = [each.loss for each in parse_defences(config.defences) if isinstance(each, RandomizedResponse)]
    sent = make_method(method_of(config), config.tail or None).sends_labels()
    return replaced[0] if replaced and sent else functional.cross_entropy


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train the configured model with parallel split learning."""
    with last_word():
        if Path(sys.argv[0]).stem == "flwr-simulation":
            check_temporary_folder()  # Ray, which fails in it, is being started meanwhile
        config = RunConfig.read(context.run_config)
        threads = set_threads(config.threads)
        log.info("The server half computes on %d thread%s.", threads, "s" * (threads > 1))
        make_strategy(config).start(
            grid,
            ArrayRecord(make_model(config).state_dict()),
            num_rounds=config.num_server_rounds,
            evaluate_fn=central_test(config),
        )
        log.info("Metrics, curves, model and configuration are in %s", Path(config.output_dir).resolve())
