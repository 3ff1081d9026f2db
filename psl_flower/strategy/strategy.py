"""``ParallelSplitLearning``: a Flower Strategy that exchanges activations and gradients every mini-batch."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from torch import nn

from psl_flower.checks import check_choice, check_float, check_int
from psl_flower.devices import pick_device
from psl_flower.errors import ConfigError, StepError
from psl_flower.exchange import Answer, Clients
from psl_flower.exchange.door import Door, distinct
from psl_flower.exchange.streams import StreamOptions
from psl_flower.exchange.transport import TRANSPORTS, open_carrier
from psl_flower.protocol import (
    Activations,
    BackwardRequest,
    Config,
    ForwardRequest,
    Gradients,
    Request,
    Weights,
    WorkOrder,
    step_seed,
)
from psl_flower.samplers.base import BatchPlan, IntArray, PlanStep, Population, Sampler
from psl_flower.samplers.uniform import UniformGlobalSampler
from psl_flower.split import check_client_half, cut_model
from psl_flower.stragglers import DelayEstimator, DelayModel, VirtualClock
from psl_flower.strategy.arrays import arrays_to_state, state_to_arrays
from psl_flower.strategy.epoch import Epoch
from psl_flower.strategy.evaluation import split_evaluate
from psl_flower.strategy.orders import Cursors
from psl_flower.strategy.progress import Progress, clock
from psl_flower.strategy.result import RoundRecord, RunRecorder, StepRecord
from psl_flower.strategy.server_step import Loss, OptimizerFn, SplitTrainer

log = logging.getLogger("flwr.psl_flower")

EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]


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
    output_dir : path, optional
        Where metrics, curves, model and configuration are written; None for nowhere.
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
        if sleep and self._simulated is None:
            raise ConfigError("sleep=True needs simulated_delays to wait for")
        self._optimizer, self._scheduler, self._loss = optimizer, scheduler, loss
        self._classification = classification
        self._device = pick_device(device)
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
        arrays, result, begin = initial_arrays, Result(), time.monotonic()
        self.summary()
        with (
            open_carrier(grid, self.transport, self.stream_options) as carrier,
            RunRecorder(self._output_dir, self._configuration(num_rounds)) as recorder,
        ):
            run = _Run(
                trainer=trainer,
                clients=Clients(carrier, label_counts=self.sampler.needs_label_counts, config=train_config),
                recorder=recorder,
                progress=Progress(num_rounds),
                timeout=timeout,
                train_config=dict(train_config or {}),
                evaluate_config=dict(evaluate_config or {}),
            )
            _evaluate_on_server(evaluate_fn, 0, arrays, result)
            for server_round in range(1, num_rounds + 1):
                record = self._train_epoch(run, server_round)
                if scheduler:
                    scheduler.step()
                state |= trainer.state()
                arrays = result.arrays = state_to_arrays(state)
                result.train_metrics_clientapp[server_round] = record.metrics()
                in_clients = self._evaluate_in_clients(run, server_round, result)
                on_server = _evaluate_on_server(evaluate_fn, server_round, arrays, result)
                recorder.round(replace(record, evaluate_clientapp=in_clients, evaluate_serverapp=on_server))
            recorder.finish(state)
        log.info("Finished %d rounds in %s.", num_rounds, clock(time.monotonic() - begin))
        return result

    def _train_epoch(self, run: _Run, server_round: int) -> RoundRecord:
        """Use every example of every client once."""
        run.clients.refresh(self.min_available_nodes, run.timeout)
        population = self._with_delays(run.clients.population())
        begin = time.monotonic()
        plan = self.sampler.plan(population, epoch=server_round - 1)
        seconds_plan, pooled = time.monotonic() - begin, run.pooled_counts(population)
        virtual_clock = self._virtual_clock(population)
        cursors = Cursors(plan, seed=self.sampler.seed, epoch=server_round - 1)
        with Epoch(run.recorder, server_round, plan, seconds_plan=seconds_plan, pooled=pooled) as epoch:
            for index, step in enumerate(plan):
                orders, waits = cursors.orders(index, step), self._waits(virtual_clock, step)
                record, class_counts = self._train_step(run, server_round, orders, waits)
                cursors.advance(step)
                simulated = virtual_clock.advance(step.clients, step.quotas) if virtual_clock else None
                epoch.add(replace(record, seconds_simulated=simulated), class_counts)
                run.progress.step(server_round, index + 1, len(plan), record.loss, record.accuracy)
            record_of_round = epoch.summary()
        run.remember_pooled_counts(population, epoch.pooled())
        _log_round(record_of_round, plan)
        return record_of_round

    def _train_step(
        self, run: _Run, server_round: int, orders: list[WorkOrder], waits: Mapping[int, float]
    ) -> tuple[StepRecord, IntArray | None]:
        """Forward on the clients, forward and backward on the server, backward on the clients, one optimizer step."""
        begin, trainer, step = time.monotonic(), run.trainer, orders[0].step
        with StepError.located(f"round {server_round}, step {step}"), trainer.transaction():
            weights = trainer.weights()
            batch, forward_answers = self._forward(run, orders, weights, waits)
            outcome = trainer.forward_backward(batch, step_seed(orders[0].seed, orders[0].epoch, step))
            gradients, backward_answers = self._backward(run, orders, weights, outcome.cut_gradients)
            trainer.commit(gradients)
        self._measure(orders, forward_answers, backward_answers)
        answers = [*forward_answers.values(), *backward_answers.values()]
        record = StepRecord(
            round=server_round,
            step=step,
            loss=outcome.loss,
            accuracy=None if outcome.correct is None else outcome.correct / outcome.predictions,
            batch_size=sum(order.count for order in orders),
            clients=len(orders),
            bytes_sent=sum(a.bytes_sent for a in answers),
            bytes_received=sum(a.bytes_received for a in answers),
            seconds_real=time.monotonic() - begin,
        )
        return record, outcome.class_counts

    def _forward(
        self,
        run: _Run,
        orders: list[WorkOrder],
        weights: Weights,
        waits: Mapping[int, float],
    ) -> tuple[dict[int, Activations], dict[int, Answer]]:
        requests: dict[int, Request] = {
            o.client: ForwardRequest(o, weights, run.train_config, waits.get(o.client, 0.0)) for o in orders
        }
        answers = run.clients.exchange(requests, run.timeout)
        accepted, failures = run.door.activations(answers, {o.client: o.count for o in orders}, orders[0].step)
        _refuse(failures, orders, "forward")
        return accepted, answers

    def _backward(
        self,
        run: _Run,
        orders: list[WorkOrder],
        weights: Weights,
        cut_gradients: Mapping[int, tuple[torch.Tensor | None, ...]],
    ) -> tuple[Iterable[Gradients], dict[int, Answer]]:
        requests: dict[int, Request] = {
            o.client: BackwardRequest(o, weights, cut_gradients[o.client], run.train_config) for o in orders
        }
        answers = run.clients.exchange(requests, run.timeout)
        accepted, failures = run.door.gradients(answers, weights.parameters, orders[0].step)
        _refuse(failures, orders, "backward")
        return distinct(accepted), answers

    def _evaluate_in_clients(self, run: _Run, server_round: int, result: Result) -> dict[str, Any]:
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

    def _measure(self, orders: list[WorkOrder], forward: Mapping[int, Answer], backward: Mapping[int, Answer]) -> None:
        """Let an estimator see how long each client worked on a committed step."""
        if isinstance(self._delays, DelayEstimator):
            for order in orders:
                seconds = forward[order.client].seconds + backward[order.client].seconds
                self._delays.observe(order.client, order.count, seconds)

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


@dataclass
class _Run:
    """What lives as long as one call of `start`."""

    trainer: SplitTrainer
    clients: Clients
    recorder: RunRecorder
    progress: Progress
    timeout: float
    train_config: Config
    evaluate_config: Config

    def __post_init__(self) -> None:
        self.door, self.evaluation_door = Door(), Door()
        self._pooled: tuple[Population, IntArray] | None = None

    def pooled_counts(self, population: Population) -> IntArray | None:
        """Return the class counts of all data, (C,), if they are known for this population."""
        if population.label_counts is not None:
            return np.asarray(population.label_counts.sum(axis=0))
        if self._pooled is None or not population.same_data(self._pooled[0]):
            return None
        return self._pooled[1]

    def remember_pooled_counts(self, population: Population, counts: IntArray | None) -> None:
        """Keep the class counts an epoch has shown."""
        self._pooled = None if counts is None else (population, counts)


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


def _refuse(failures: dict[int, str], orders: list[WorkOrder], exchange: str) -> None:
    if failures:
        raise StepError(f"{len(failures)} of {len(orders)} clients failed in the {exchange} exchange", failures)


def _log_round(record: RoundRecord, plan: BatchPlan) -> None:
    deviation = "" if record.deviation_mean is None else f", batch deviation {record.deviation_mean:.3f}"
    accuracy = "" if record.accuracy is None else f", accuracy {record.accuracy:.3f}"
    simulated = "" if record.seconds_simulated is None else f", {record.seconds_simulated:.1f} simulated seconds"
    log.info(
        "round %d  %d steps, loss %.4f%s%s, %.1f of %d clients a step%s",
        *(record.round, record.num_steps, record.loss, accuracy, deviation),
        *(record.clients_per_step, len(plan.population), simulated),
    )


def _shown(metrics: MetricRecord) -> str:
    return ", ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in metrics.items())
