"""``ParallelSplitLearning``: a Flower Strategy that exchanges activations and gradients every mini-batch."""

from __future__ import annotations

import copy
import logging
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from torch import nn

from psl_flower import checkpoint
from psl_flower.batch_plan import PlanStep
from psl_flower.callbacks.base import Callback, CallbackGroup
from psl_flower.checkpoint import Checkpoints
from psl_flower.checks import check_choice, check_float, check_int
from psl_flower.devices import pick_device
from psl_flower.errors import ConfigError, StepError
from psl_flower.exchange import Clients
from psl_flower.exchange.streams import StreamOptions
from psl_flower.exchange.transport import TRANSPORTS, open_carrier
from psl_flower.faults import FaultPolicy
from psl_flower.flower import stopped_by_flower
from psl_flower.population import Population
from psl_flower.records import RoundRecord, StepRecord
from psl_flower.samplers.base import Sampler
from psl_flower.samplers.uniform import UniformGlobalSampler
from psl_flower.split import check_client_half, cut_model
from psl_flower.stragglers import DelayEstimator, DelayModel, VirtualClock
from psl_flower.strategy.arrays import arrays_to_state, state_to_arrays
from psl_flower.strategy.epoch import Epoch
from psl_flower.strategy.evaluation import split_evaluate
from psl_flower.strategy.ledger import EpochLedger, part, saved_population
from psl_flower.strategy.progress import Progress, clock
from psl_flower.strategy.recorder import RunRecorder
from psl_flower.strategy.run import Run
from psl_flower.strategy.saving import Saver, saved_result
from psl_flower.strategy.server_step import Loss, OptimizerFn, SplitTrainer
from psl_flower.strategy.step import Attempt, StepRunner
from psl_flower.strategy.summary import RunSummary
from psl_flower.strategy.tolerance import Retries

log = logging.getLogger("flwr.psl_flower")

EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]

# Steps in a row that may be left out because they are not finite.
_MOST_SKIPS = 10


def _sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.01)


class ParallelSplitLearning(Strategy):
    """Parallel split learning with one shared server half and batch quotas decided by the server (arXiv 2407.15738).

    Every step, each client that takes part runs the client half on its quota of examples and sends the activations and
    labels; the server half runs on all of them as ONE global batch; the gradients go back the same way; one optimizer
    steps both halves. With per-example layers in the client half this equals centralised SGD on the same examples.
    One round is one epoch of the pooled data: every example of every client is used exactly once.

    Parameters
    ----------
    model : nn.Module or SplitModel
        The whole model; copied, not changed. Its weights do not matter: `start` is given them.
    cut : str, optional
        Qualified name of the first server-side submodule. None for a `SplitModel`.
    sampler : Sampler, optional
        Decides the quotas. Default: ``UniformGlobalSampler(batch_size=128)``.
    optimizer : callable, optional
        Takes the trainable parameters of both halves, in the model's order, and returns a torch optimizer. Default: SGD
        with learning rate 0.01.
    scheduler : callable, optional
        Takes the optimizer and returns a torch learning-rate scheduler, stepped after every round.
    loss : callable
        Takes (outputs, labels) and returns the mean over the batch.
    classification : bool
        Whether labels are class indices, as for cross-entropy: they are checked, and accuracy and batch deviation are
        computed. Pass False for any other loss.
    delays : DelayModel, optional
        What a delay-aware sampler plans with: a model of `psl_flower.stragglers`, or a `DelayEstimator`, which measures
        how long the clients work on their requests. Read anew at the start of every epoch.
    simulated_delays : DelayModel, optional
        How slow the clients are made to look, on a virtual clock. Default: `delays`, unless that measures.
    sleep : bool
        Whether the clients really wait for their simulated delays.
    transport : str
        "auto", "streams" or "messages": how requests travel, see `open_carrier`.
    stream_options : StreamOptions, optional
        Where the ServerApp listens for streams and in which precision tensors travel.
    device : str
        "auto" (the first GPU if there is one) or a torch device, for the server half.
    min_available_nodes : int
        Nodes to wait for at the start of every round.
    evaluate_every : int
        Rounds between two split evaluations on the clients' test data; 0 for none.
    evaluate_batch_size : int
        Examples an exchange of split evaluation, over all clients.
    faults : FaultPolicy, optional
        What to do when clients fail. By default a step goes on without them.
    checkpoint_every : int
        Steps between two checkpoints within a round, 0 for none; there is always one at its end.
    keep_checkpoints : int
        How many of the last checkpoints are kept, in ``output_dir/checkpoints``; 0 writes none.
    resume_from : path, optional
        "latest": go on from the last checkpoint in `output_dir`, if there is one; or the path of a checkpoint.
    callbacks : iterable of Callback
        Told of every step and round, see `psl_flower.callbacks`. One that raises is dropped with a warning.
    output_dir : path, optional
        Where metrics, curves, model, configuration and checkpoints are written; None for nowhere.
    run_config : dict, optional
        Written beside the results as the run's configuration.

    Raises
    ------
    ConfigError
        If an argument is out of range, the model cannot be cut there, or its client half uses batch statistics.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        cut: str | None = None,
        sampler: Sampler | None = None,
        optimizer: OptimizerFn = _sgd,
        scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
        loss: Loss = nn.functional.cross_entropy,
        classification: bool = True,
        delays: DelayModel | None = None,
        simulated_delays: DelayModel | None = None,
        sleep: bool = False,
        transport: str = "auto",
        stream_options: StreamOptions | None = None,
        device: str = "auto",
        min_available_nodes: int = 2,
        evaluate_every: int = 1,
        evaluate_batch_size: int = 1024,
        faults: FaultPolicy | None = None,
        checkpoint_every: int = 0,
        keep_checkpoints: int = 2,
        resume_from: str | Path | None = None,
        callbacks: Iterable[Callback] = (),
        output_dir: str | Path | None = None,
        run_config: Mapping[str, Any] | None = None,
    ) -> None:
        if sampler is not None and not isinstance(sampler, Sampler):
            raise ConfigError(f"sampler must be a psl_flower Sampler, got {sampler!r:.80}")
        for function, name in ((optimizer, "optimizer"), (loss, "loss"), (scheduler or _sgd, "scheduler")):
            if not callable(function):
                raise ConfigError(f"{name} must be callable, got {function!r:.80}")
        self.sampler = sampler or UniformGlobalSampler(batch_size=128)
        self.cut = cut
        self.min_available_nodes = check_int(min_available_nodes, "min_available_nodes", least=1)
        self.evaluate_every = check_int(evaluate_every, "evaluate_every", least=0)
        self.evaluate_batch_size = check_int(evaluate_batch_size, "evaluate_batch_size", least=1)
        self._delays = _check_delays(delays, "delays")
        if self.sampler.needs_delays and delays is None:
            raise ConfigError(
                f"{type(self.sampler).__name__} plans with delays: pass delays=..., a model of psl_flower.stragglers, "
                "or DelayEstimator() to measure them"
            )
        measured = isinstance(delays, DelayEstimator)
        self._simulated = _check_delays(simulated_delays, "simulated_delays") or (None if measured else delays)
        self._sleep = sleep
        self.transport = check_choice(transport, "transport", TRANSPORTS)
        self.stream_options = stream_options or StreamOptions()
        self.faults = faults or FaultPolicy()
        if self.faults.max_gradient_norm is not None:  # each client's share must be seen
            self.stream_options = replace(self.stream_options, sum_gradients=False)
        self.checkpoint_every = check_int(checkpoint_every, "checkpoint_every", least=0)
        self.keep_checkpoints = check_int(keep_checkpoints, "keep_checkpoints", least=0)
        self.resume_from = resume_from
        if (checkpoint_every or resume_from == "latest") and (output_dir is None or not keep_checkpoints):
            raise ConfigError(
                "checkpoint_every and resume_from='latest' need an output_dir and keep_checkpoints of at least 1, got "
                f"{output_dir!r} and {keep_checkpoints}"
            )
        if sleep and self._simulated is None:
            raise ConfigError("sleep=True needs simulated_delays to wait for")
        self._optimizer, self._scheduler, self._loss = optimizer, scheduler, loss
        self._classification = classification
        self._device = pick_device(device)
        self._callbacks = tuple(callbacks)
        CallbackGroup(self._callbacks)  # refuses what is none
        self._output_dir = output_dir
        self._run_config = dict(run_config or {})
        self._halves = cut_model(model, cut)
        check_client_half(self._halves.client)
        self._template = {name: t.detach().clone() for name, t in model.state_dict().items()}
        self._parameter_order = [name for name, _ in model.named_parameters()]

    # --- the run -----------------------------------------------------------------------------------------------------
    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: EvaluateFn | None = None,
    ) -> Result:
        """Train for `num_rounds` epochs of the pooled data; FedAvg's contract.

        Parameters
        ----------
        grid : Grid
            Flower's, or an `InProcessGrid`.
        initial_arrays : ArrayRecord
            The whole model's state dict.
        num_rounds : int
            Epochs.
        timeout : float
            Seconds, for one exchange with the clients (a step has two) and for waiting for nodes.
        train_config, evaluate_config : ConfigRecord, optional
            Sent to the clients: the first reaches `data_fn` and every handler, the second comes on top in evaluation.
        evaluate_fn : callable, optional
            Takes the round and the whole model's arrays; called before the first round and after each.

        Returns
        -------
        Result
            The final arrays, and the metrics of each round.

        Raises
        ------
        ConfigError
            If the arrays are not this model's, or an argument is out of range.
        MembershipError
            If the clients cannot form a population.
        StepError
            If a client fails or sends something wrong; the step is not applied.
        """
        num_rounds = check_int(num_rounds, "num_rounds", least=1)
        timeout = check_float(timeout, "timeout", above=0)
        state = arrays_to_state(initial_arrays, self._template)
        trainer = self._trainer(state)
        scheduler = self._scheduler(trainer.optimizer) if self._scheduler else None
        saver = self._saver(trainer, scheduler)
        saved = saver.find(self.resume_from)
        result, begin = Result() if saved is None else saved_result(saved), time.monotonic()
        position, first_round = (None, 1) if saved is None else (saved["metrics_position"], saved["round"])
        self.summary()
        with (
            stopped_by_flower() as stops,
            open_carrier(grid, self.transport, self.stream_options) as carrier,
            RunRecorder(self._output_dir, self._configuration(num_rounds), position, self._callbacks) as recorder,
        ):
            stops.append(carrier.stop)
            tolerate = self.faults.tolerate
            clients = Clients(
                carrier, label_counts=self.sampler.needs_label_counts, config=train_config, tolerate=tolerate
            )
            summary = RunSummary.from_dict(saved["summary"]) if saved else RunSummary()
            run = Run(
                trainer=trainer,
                clients=clients,
                runner=StepRunner(
                    trainer,
                    clients,
                    policy=self.faults,
                    timeout=self.faults.step_timeout or timeout,
                    config=dict(train_config or {}),
                    summary=summary,
                ),
                recorder=recorder,
                progress=Progress(num_rounds),
                summary=summary,
                policy=self.faults,
                saved=saved,
                state=state,
                result=result,
                timeout=timeout,
                train_config=dict(train_config or {}),
                evaluate_config=dict(evaluate_config or {}),
            )
            try:
                if saved is None:
                    result.arrays = initial_arrays
                    _evaluate_on_server(evaluate_fn, 0, initial_arrays, result)
                else:
                    saver.restore(run, saved)
                    if saved["delays"] is not None and isinstance(self._delays, DelayEstimator):
                        self._delays = DelayEstimator.from_dict(saved["delays"])
                for server_round in range(first_round, num_rounds + 1):
                    record = self._train_epoch(run, saver, server_round)
                    if scheduler:
                        with warnings.catch_warnings():  # a round that is resumed at its end has no step here
                            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
                            scheduler.step()
                    result.arrays = state_to_arrays(run.current_state())
                    result.train_metrics_clientapp[server_round] = MetricRecord(record.metrics())
                    in_clients = self._evaluate_in_clients(run, server_round, result)
                    on_server = _evaluate_on_server(evaluate_fn, server_round, result.arrays, result)
                    recorder.round(replace(record, evaluate_clientapp=in_clients, evaluate_serverapp=on_server))
                    recorder.summary(summary.report())  # a process that is killed has none at its end
                recorder.finish(run.current_state())
            finally:
                summary.ignored.update(carrier.ignored)
                recorder.summary(summary.report())
            summary.log()
        log.info("Finished %d rounds in %s.", num_rounds, clock(time.monotonic() - begin))
        return result

    def _train_epoch(self, run: Run, saver: Saver, server_round: int) -> RoundRecord:
        """Use every example of every client once."""
        ledger, epoch = self._open_epoch(run, server_round)
        virtual_clock = self._virtual_clock(ledger.population)
        retries, skips = Retries(), 0
        with epoch:
            while len(ledger.unfinished()):
                self._look_for_clients(run, ledger, epoch, virtual_clock)
                begin = time.monotonic()
                step = ledger.step(run.available(ledger.unfinished()))
                epoch.seconds_plan += time.monotonic() - begin
                orders, waits = ledger.orders(len(epoch), step), self._waits(virtual_clock, step)
                with StepError.located(f"round {server_round}, step {len(epoch)}"):
                    attempt = run.attempt(orders, waits)
                    nothing = attempt.outcome is None and not attempt.skipped
                    if nothing and run.give_up(attempt, ledger, retries, committed=len(epoch) > 0):
                        break
                    skips = skips + 1 if attempt.skipped else 0
                    _check_skips(skips)
                if attempt.skipped:
                    ledger.done(part(step, attempt.batch), _labels(attempt))
                elif attempt.outcome is not None:
                    step = part(step, attempt.batch)
                    ledger.done(step, _labels(attempt))
                    retries.succeeded()
                    self._measure(attempt)
                    simulated = virtual_clock.advance(step.clients, step.quotas) if virtual_clock else None
                    record = _step_record(server_round, len(epoch), attempt, time.monotonic() - begin, simulated)
                    epoch.add(record, step, attempt.outcome.class_counts)
                    done, of = len(epoch), len(epoch) + ledger.steps_left()
                    run.progress.step(server_round, done, of, record.loss, record.accuracy)
                    if self.checkpoint_every and done % self.checkpoint_every == 0 and ledger.steps_left():
                        saver.save(run, server_round, ledger, epoch, self._delays)
            saver.save(run, server_round, ledger, epoch, self._delays)
            unseen = run.close_epoch(server_round, ledger)
            record_of_round = epoch.summary(unseen)
        if not unseen:
            run.remember_pooled_counts(ledger.population, epoch.pooled())
        _log_round(record_of_round)
        return record_of_round

    def _open_epoch(self, run: Run, server_round: int) -> tuple[EpochLedger, Epoch]:
        """Return what there is to do in an epoch, and its bookkeeping: a new one, or the one to be resumed."""
        run.clients.refresh(self.min_available_nodes, run.timeout, run.missing)
        population, saved = run.clients.population(), run.take_saved()
        begin = time.monotonic()
        if saved is None:
            ledger = EpochLedger(self.sampler, self._with_delays(population), server_round - 1)
        else:
            population = self._with_delays(saved_population(saved["agenda"], population))
            ledger = EpochLedger.restored(self.sampler, population, server_round - 1, saved["agenda"])
        seconds_plan = time.monotonic() - begin
        epoch = Epoch(run.recorder, server_round, ledger.population, pooled=run.pooled_counts(ledger.population))
        if saved is not None:
            epoch.restore(saved["epoch"])
        epoch.seconds_plan += seconds_plan
        return ledger, epoch

    def _look_for_clients(
        self, run: Run, ledger: EpochLedger, epoch: Epoch, virtual_clock: VirtualClock | None
    ) -> None:
        """Find clients that failed before on the nodes where they are now, and let new ones in if they may enter."""
        at_once = self.faults.join == "step"
        if not self.faults.tolerate or not (at_once or run.backoff.failing() & set(run.available(ledger.unfinished()))):
            return
        joined = run.clients.look_again(self.faults.step_timeout or run.timeout)
        if not joined:
            return
        log.info("clients that joined%s: %s", "" if at_once else ", from the next round on", sorted(joined))
        if at_once:
            ledger.admit(self._with_delays(run.with_members(ledger.population, joined)))
            epoch.population = ledger.population
            if virtual_clock and self._simulated:
                ids = ledger.population.client_ids
                virtual_clock.update(ids, self._simulated.delays(ids))

    def _evaluate_in_clients(self, run: Run, server_round: int, result: Result) -> dict[str, Any]:
        if not self.evaluate_every or server_round % self.evaluate_every:
            return {}
        with StepError.located(f"round {server_round}, evaluation"):
            metrics = split_evaluate(
                run.clients,
                run.trainer,
                run.evaluation_door,
                batch_size=self.evaluate_batch_size,
                timeout=run.timeout,
                config=run.train_config,
                evaluate_config=run.evaluate_config,
                summary=run.summary,
                tolerate=self.faults.tolerate,
            )
        if metrics is None:
            return {}
        result.evaluate_metrics_clientapp[server_round] = metrics
        log.info("round %d  clients' test data: %s", server_round, _shown(metrics))
        return dict(metrics)

    # --- stragglers --------------------------------------------------------------------------------------------------
    def _with_delays(self, population: Population) -> Population:
        if self._delays is None:
            return population
        return replace(population, delays=self._delays.delays(population.client_ids))

    def _virtual_clock(self, population: Population) -> VirtualClock | None:
        if self._simulated is None:
            return None
        return VirtualClock(population.client_ids, self._simulated.delays(population.client_ids))

    def _waits(self, virtual_clock: VirtualClock | None, step: PlanStep) -> dict[int, float]:
        """Return how many seconds each client of a step really waits."""
        if virtual_clock is None or not self._sleep:
            return {}
        times = virtual_clock.reply_times(step.clients, step.quotas)
        return dict(zip(step.clients.tolist(), times.tolist(), strict=True))

    def _measure(self, attempt: Attempt) -> None:
        """Let an estimator see how long each client worked on a committed step: its forward and its last backward."""
        if isinstance(self._delays, DelayEstimator):
            for client, batch in attempt.batch.items():
                forward, *_, backward = attempt.answers[client]
                self._delays.observe(client, len(batch.labels), forward.seconds + backward.seconds)

    # --- its parts ---------------------------------------------------------------------------------------------------
    def _trainer(self, state: Mapping[str, torch.Tensor]) -> SplitTrainer:
        client, server = copy.deepcopy((self._halves.client, self._halves.server))  # `start` may be called again
        for half in (client, server):
            half.load_state_dict({name: state[name] for name in half.state_dict()})
        return SplitTrainer(
            client,
            server,
            optimizer=self._optimizer,
            loss=self._loss,
            device=self._device,
            classification=self._classification,
            order=self._parameter_order,
        )

    def _saver(self, trainer: SplitTrainer, scheduler: Any) -> Saver:
        checkpoints = None
        if self._output_dir is not None and self.keep_checkpoints:
            checkpoints = Checkpoints(Path(self._output_dir) / checkpoint.FOLDER, self.keep_checkpoints)
        return Saver(checkpoints, trainer, scheduler, template=self._template, cut=self.cut, sampler=self.sampler)

    def _configuration(self, num_rounds: int) -> dict[str, Any]:
        return {
            **self._run_config,
            "strategy": {
                "num_rounds": num_rounds,
                "cut": self.cut,
                "sampler": repr(self.sampler),
                "delays": repr(self._delays),
                "simulated_delays": repr(self._simulated),
                "sleep": self._sleep,
                "transport": self.transport,
                "stream_options": repr(self.stream_options),
                "device": str(self._device),
                "min_available_nodes": self.min_available_nodes,
                "evaluate_every": self.evaluate_every,
                "evaluate_batch_size": self.evaluate_batch_size,
                "faults": repr(self.faults),
                "checkpoint_every": self.checkpoint_every,
                "keep_checkpoints": self.keep_checkpoints,
                "resume_from": None if self.resume_from is None else str(self.resume_from),
            },
        }

    def summary(self) -> None:
        """Log the strategy's configuration."""
        sizes = [sum(p.numel() for p in half.parameters()) for half in (self._halves.client, self._halves.server)]
        log.info("Parallel split learning:")
        log.info("\t├── Sampler: %r", self.sampler)
        log.info("\t├── Cut: %s (%s parameters on the client, %s on the server)", self.cut, *(f"{n:,}" for n in sizes))
        log.info("\t├── Transport: %s", self.transport)
        log.info("\t├── Minimum available nodes: %d", self.min_available_nodes)
        log.info("\t└── Device of the server half: %s", self._device)

    # --- what a message-based strategy would have ---------------------------------------------------------------------
    def _exchanges_in_start(self) -> NoReturn:
        raise ConfigError(
            "ParallelSplitLearning exchanges messages every mini-batch, not once a round: "
            "call strategy.start(grid, initial_arrays, num_rounds=...) instead"
        )

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Refuse: use `start`."""
        self._exchanges_in_start()

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Refuse: use `start`."""
        self._exchanges_in_start()

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Refuse: use `start`."""
        self._exchanges_in_start()

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Refuse: use `start`."""
        self._exchanges_in_start()


def _labels(attempt: Attempt) -> dict[int, Any]:
    return {client: part.labels.numpy() for client, part in attempt.batch.items()}


def _check_skips(in_a_row: int) -> None:
    if in_a_row >= _MOST_SKIPS:
        raise StepError(f"{in_a_row} steps in a row are not finite: training diverges, lower the learning rate")


def _step_record(
    server_round: int, index: int, attempt: Attempt, seconds: float, simulated: float | None
) -> StepRecord:
    outcome, answers = attempt.outcome, [a for each in attempt.answers.values() for a in each]
    assert outcome is not None
    return StepRecord(
        round=server_round,
        step=index,
        loss=outcome.loss,
        accuracy=None if outcome.correct is None else outcome.correct / outcome.predictions,
        batch_size=sum(len(part.labels) for part in attempt.batch.values()),
        clients=len(attempt.batch),
        bytes_sent=sum(a.bytes_sent for a in answers),
        bytes_received=sum(a.bytes_received for a in answers),
        seconds_real=seconds,
        seconds_simulated=simulated,
    )


def _check_delays(model: DelayModel | None, name: str) -> DelayModel | None:
    if model is not None and not callable(getattr(model, "delays", None)):
        raise ConfigError(f"{name} must be a delay model of psl_flower.stragglers, got {model!r:.80}")
    return model


def _evaluate_on_server(
    evaluate_fn: EvaluateFn | None, server_round: int, arrays: ArrayRecord, result: Result
) -> dict[str, Any]:
    metrics = evaluate_fn(server_round, arrays) if evaluate_fn else None
    if metrics is None:
        return {}
    result.evaluate_metrics_serverapp[server_round] = metrics
    log.info("round %d  server's test data: %s", server_round, _shown(metrics))
    return dict(metrics)


def _log_round(record: RoundRecord) -> None:
    deviation = "" if record.deviation_mean is None else f", batch deviation {record.deviation_mean:.3f}"
    accuracy = "" if record.accuracy is None else f", accuracy {record.accuracy:.3f}"
    simulated = "" if record.seconds_simulated is None else f", {record.seconds_simulated:.1f} simulated seconds"
    log.info(
        "round %d  %d steps, loss %.4f%s%s, %.1f of %d clients a step%s",
        *(record.round, record.num_steps, record.loss, accuracy, deviation),
        *(record.clients_per_step, record.num_clients, simulated),
    )


def _shown(metrics: MetricRecord) -> str:
    return ", ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in metrics.items())
