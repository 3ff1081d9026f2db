"""Chaos: runs drawn from a seed, whose clients, connections, disk and clock fail and whose members lie.

`play(Scenario.draw(seed))` makes one and asserts what must hold of all: the run ends; every example of an honest client
is used once an epoch, or reported as not seen where that may be; the model is the one that a trainer in one place makes
of the committed steps, so nothing of what was refused is in it; whoever is honest is in the run to its end.
"""

import contextlib
import errno
import functools
import json
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from unittest import mock

from flwr.app import ArrayRecord
from support import DELAYS, largest_difference

from mayhem.committed import Record, Recording, recording, reference
from mayhem.faults import STEP_SECONDS, ChaosGrid, ChaosStream, Killed, Stops
from mayhem.lies import lying
from mayhem.scenario import Scenario
from mayhem.task import SIZES, data_of, make_model, sgd
from psl_flower import FaultPolicy, ParallelSplitLearning, split_client_app
from psl_flower.client import process, runtime, stream
from psl_flower.errors import MembershipError, StepError
from psl_flower.exchange import clients, messages
from psl_flower.methods import METHODS
from psl_flower.samplers.registry import SAMPLERS
from psl_flower.strategy import run, tolerance
from psl_flower.strategy import strategy as strategy_module
from psl_flower.strategy.loop import EpochLoop


def _jumping(real, jumps):
    if sys._getframe(1).f_globals["__name__"].startswith("grpc"):  # which hands it to a library that has its own
        return real()
    return real() + jumps.choice([-86400.0, 0.0, 3600.0])


@contextlib.contextmanager
def world(scenario, record, grid):
    """Have everything fail that the scenario has."""
    real, clock, train = time.time, grid.clock, EpochLoop.train

    def counted(loop, server_round):
        record.round = server_round
        if server_round == 2 and scenario.impostor and not scenario.found["impostor"]:
            scenario.found["impostor"] += 1
            grid.let_in(scenario.liar)
        return train(loop, server_round)

    patches = [
        mock.patch.object(runtime._Work, "do", lying(scenario, runtime._Work.do)),
        mock.patch.object(strategy_module, "StepRunner", recording(record)),
        mock.patch.object(EpochLoop, "train", counted),
        mock.patch.object(stream, "StreamClient", ChaosStream),
        mock.patch.multiple(ChaosStream, scenario=scenario, rng=random.Random(scenario.seed + 2)),
        mock.patch.multiple(Recording, drawn={}, claiming=scenario.liar if scenario.claims else None),
        *(mock.patch.object(module, "time", clock) for module in (run, tolerance)),
        *Stops(scenario).patched(),
    ]
    if scenario.transport == "messages":
        patches += [mock.patch.object(module, "time", clock) for module in (messages, clients)]
    if scenario.wall_clock:
        jumps = random.Random(scenario.seed + 3)
        patches.append(mock.patch.object(time, "time", functools.partial(_jumping, real, jumps)))
    with contextlib.ExitStack() as stack:
        for each in patches:
            stack.enter_context(each)
        yield


def play(scenario, folder):
    """Make the run of a scenario in a folder, and assert what must hold of it; `scenario.found` says what happened."""
    record = Record()
    app = split_client_app(
        functools.partial(make_model, scenario.tail),
        data_fn=with_test,
        client_class=Recording,
        method=scenario.method,
        optimizer=sgd,
        secure_aggregation=scenario.secure,
        device="cpu",
    )
    grid = ChaosGrid(app, scenario)
    with world(scenario, record, grid):
        result = _to_the_end(scenario, grid, record, folder)
    for kinds in (grid.injected, grid.ignorable):
        scenario.found.update({f"message: {kind}": n for kind, n in kinds.items()})
    summary = json.loads((folder / "summary.json").read_text())
    process.forget_runs()
    check(scenario, result, record, summary)


def with_test(context):
    data = data_of(context.node_config["partition-id"])
    return data, data


def _to_the_end(scenario, grid, record, folder):
    """Start the run, and start it again where the server's process has ended, with everyone back who is needed."""
    for _ in range(8):
        strategy = ParallelSplitLearning(
            make_model(scenario.tail),
            method=scenario.method,
            sampler=SAMPLERS[scenario.sampler](16, seed=scenario.seed),
            delays=DELAYS,
            optimizer=sgd,
            transport=scenario.transport,
            secure_aggregation=scenario.secure,
            min_available_nodes=3 if scenario.secure else 1,
            evaluate_every=1 if scenario.claims else 0,
            checkpoint_every=3 if METHODS[scenario.method].resumable_within_round else 0,
            keep_checkpoints=2,
            resume_from="latest",
            output_dir=folder,
            device="cpu",
            faults=FaultPolicy(
                mistakes=scenario.mistakes,
                patience=100.0,
                step_timeout=5.0 if scenario.transport == "messages" else STEP_SECONDS,
            ),
        )
        try:
            return strategy.start(grid, ArrayRecord(make_model(scenario.tail).state_dict()), num_rounds=scenario.epochs)
        except Killed:
            process.forget_runs()
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
        except MembershipError:
            if not scenario.secure:  # a run that masks sums is resumed with all its clients
                raise
        except StepError as error:
            if not (scenario.secure and "no step could be completed" in str(error)):  # all of an epoch has come to rest
                raise
            scenario.found["all came to rest, resumed"] += 1
        grid.heal()
    raise AssertionError("it was started eight times")


def check(scenario, result, record, summary):
    """Assert what must hold of a run that has ended."""
    used, sizes = record.used(), dict(enumerate(SIZES))
    honest = [k for k in sizes if scenario.lie is None or k != scenario.liar]
    assert not set(summary["excluded"]) & set(map(str, honest)), summary["excluded"]
    for client, size in sizes.items():
        rows = [used[r, client] for r in range(1, scenario.epochs + 1)]
        assert all(len(set(each)) == len(each) for each in rows), "an example was used twice in an epoch"
        unseen = sum(size - len(each) for each in rows)
        told = summary["examples_unseen"].get(str(client), 0)
        if str(client) not in summary["excluded"]:
            assert told <= unseen, (client, unseen, told)
            # a client that is gone for an epoch is no member; steps of too few clients for a sum are left out
            may_be_gone = scenario.may_miss or client not in honest
            untold = scenario.found["client gone"] * size if may_be_gone else 0
            assert unseen <= told + summary["examples_skipped"] + untold, (client, unseen, told)
        if client in honest and not scenario.may_miss:
            assert unseen == 0, (client, unseen)
    state = result.arrays.to_torch_state_dict()
    assert all(bool(t.isfinite().all()) for t in state.values())
    assert largest_difference(state, reference(scenario, record)) < 1e-8
    for metrics in result.evaluate_metrics_clientapp.values():
        assert metrics["num_examples"] <= sum(SIZES)


def play_until(seeds, epochs):
    """Play scenarios until there were so many epochs; return how many, of which kinds, and what happened in them."""
    found, runs, done = Counter(), Counter(), 0
    for seed in seeds:
        scenario = Scenario.draw(seed)
        with tempfile.TemporaryDirectory() as folder:
            try:
                play(scenario, Path(folder))
            except BaseException:
                print(f"seed {seed}: {scenario.shown}", file=sys.stderr)
                raise
        found += scenario.found
        runs[f"{'secure ' * scenario.secure}{scenario.method} over {scenario.transport}"] += scenario.epochs
        done += scenario.epochs
        if done >= epochs:
            break
    return done, runs, found
