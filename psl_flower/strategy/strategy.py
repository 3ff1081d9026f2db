"""``ParallelSplitLearning``: a Flower Strategy that exchanges activations and gradients every mini-batch."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result
from torch import nn

from psl_flower.callbacks.base import Callback, CallbackGroup
from psl_flower.checkpoint import FOLDER as CHECKPOINTS
from psl_flower.checks import check_choice, check_float, check_int, check_mapping, check_path
from psl_flower.devices import own_modes, pick_device
from psl_flower.errors import ConfigError, StepError
from psl_flower.exchange.streams import StreamOptions
from psl_flower.exchange.transport import TRANSPORTS, open_carrier
from psl_flower.faults import FaultPolicy
from psl_flower.flower import stopped_by_flower
from psl_flower.last_word import last_word
from psl_flower.methods import SplitMethod, make_method
from psl_flower.monitor import round_values
from psl_flower.precision import FULL, check_precision
from psl_flower.privacy import DPSGD, SecureAggregation
from psl_flower.samplers.base import Sampler
from psl_flower.samplers.uniform import UniformGlobalSampler
from psl_flower.server import LocalBackend, Loss, OptimizerFn, check_loss, check_metrics, make_scheduler
from psl_flower.server.optimizer import check_optimizer_fn, sgd
from psl_flower.split import check_client_half, cut_model, told_frozen
from psl_flower.stragglers import DelayModel
from psl_flower.strategy.arrays import arrays_to_state, as_record, kept_state, sizes, state_to_arrays, with_state
from psl_flower.strategy.evaluate_fn import EvaluateFn, check_evaluate_fn, evaluate_on_server
from psl_flower.strategy.exchanging import ExchangingStrategy, telling_instead
from psl_flower.strategy.folder import FolderLock, set_aside
from psl_flower.strategy.kept import check_cache
from psl_flower.strategy.labels import LabelCounts, check_labels_stay
from psl_flower.strategy.loop import EpochLoop
from psl_flower.strategy.meeting import Meeting
from psl_flower.strategy.prediction import Prediction, by_client
from psl_flower.strategy.private import Spending, check_private
from psl_flower.strategy.progress import Progress, clock
from psl_flower.strategy.recorder import FILES, RunRecorder
from psl_flower.strategy.run import Run
from psl_flower.strategy.saving import Saver, check_checkpoints, checkpoints_in, saved_result
from psl_flower.strategy.secure import check_secure
from psl_flower.strategy.step import StepRunner
from psl_flower.strategy.stragglers import Stragglers

log = logging.getLogger("flwr.psl_flower")

# Attributes that are settings of a run, as they are called.
_SETTINGS = (
    *("cut", "tail", "sampler", "transport", "stream_options", "min_available_nodes", "evaluate_every", "label_counts"),
    *("evaluate_batch_size", "faults", "checkpoint_every", "keep_checkpoints", "secure_aggregation", "private"),
    *("precision", "cache_activations", "loss", "classification"),
)


class ParallelSplitLearning(ExchangingStrategy):
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
        Qualified name of the first server-side submodule, or a `Cut`. None for a `SplitModel`.
    tail : str, optional
        Qualified name of the first submodule that is back on the clients, for a U shape: labels and loss stay there.
    method : str or SplitMethod, optional
        The way of splitting, see `psl_flower.methods`; the clients need the same. Default: "parallel", or with a
        `tail` "u-shaped".
    sampler : Sampler, optional
        Decides the quotas. Default: ``UniformGlobalSampler(batch_size=128)``.
    optimizer : callable, optional
        Takes the trainable parameters of both halves, in the model's order, and returns a torch optimizer; those with
        their names, where its argument is called ``named_parameters``. Default: SGD with learning rate 0.01.
    scheduler : callable, optional
        Takes the optimizer and returns a torch learning-rate scheduler, stepped after every round; or a dict,
        ``{"scheduler": ..., "interval": "step"}``.
    loss : callable
        Takes (outputs, labels) and returns the mean over the batch. Where labels stay with the clients, so does it.
    classification : bool
        Whether labels are class indices, as for cross-entropy: they are checked, and accuracy and batch deviation are
        computed. Pass False for any other loss.
    metrics : dict, optional
        Your own, by name: functions of (outputs, labels) that return the mean over the examples they are given, or
        objects of torchmetrics. Told of training and of split evaluation, see `psl_flower.server.Scores`.
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
    precision : str
        "full": that of the weights; "bf16": torch.autocast to bfloat16, on the server and the clients, with weights in
        float32. What crosses the cut in bfloat16 then has half the bytes.
    min_available_nodes : int
        Nodes to wait for at the start of every round.
    secure_aggregation : bool or SecureAggregation
        Whether clients mask their sums (parameter gradients, and in a U shape loss and score), so that the server sees
        them of all clients together only. The clients need the same.
    private : DPSGD, optional
        Differential privacy of the model for each example, told after every round. The clients need the same.
    label_counts : "noisy" or dict of int to sequence of int, optional
        What a sampler that plans by class knows where labels stay with the clients: noisy counts of theirs, or yours.
    state : str
        "all", or "trainable": `start` takes and returns, and checkpoints hold, all but the frozen parameters, which are
        those of `model` itself, not copies.
    cache_activations : bool
        Whether the server keeps what a frozen head makes of each example, in its memory, and asks clients once for it.
        Exact; refused in a U shape, and where the head trains, or dropout or augmentation would make it another one.
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

    @telling_instead
    def __init__(
        self,
        model: nn.Module,
        *,
        cut: str | None = None,
        tail: str | None = None,
        method: str | SplitMethod | None = None,
        sampler: Sampler | None = None,
        optimizer: OptimizerFn = sgd,
        scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
        loss: Loss = nn.functional.cross_entropy,
        classification: bool = True,
        metrics: Mapping[str, Any] | None = None,
        delays: DelayModel | None = None,
        simulated_delays: DelayModel | None = None,
        sleep: bool = False,
        transport: str = "auto",
        stream_options: StreamOptions | None = None,
        device: str = "auto",
        precision: str = FULL,
        min_available_nodes: int = 2,
        secure_aggregation: SecureAggregation | bool = False,
        private: DPSGD | None = None,
        label_counts: LabelCounts = None,
        state: str = "all",
        cache_activations: bool = False,
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
            raise ConfigError(f"sampler must be a Sampler, UniformGlobalSampler(batch_size=128), got {sampler!r:.80}")
        check_optimizer_fn(optimizer)
        check_loss(loss)
        self.cut, self.tail, self.method = cut, tail, make_method(method, tail)
        self.sampler = self.method.sampler(sampler or UniformGlobalSampler(batch_size=128))
        self.min_available_nodes = check_int(min_available_nodes, "min_available_nodes", least=1)
        self.evaluate_every = check_int(evaluate_every, "evaluate_every", least=0)
        self.evaluate_batch_size = check_int(evaluate_batch_size, "evaluate_batch_size", least=1)
        self._stragglers = Stragglers(self.sampler, delays, simulated_delays, sleep)
        self.transport = check_choice(transport, "transport", TRANSPORTS)
        self.stream_options = streams = stream_options or StreamOptions()
        self.faults = faults or (FaultPolicy() if private is None else FaultPolicy(outlier_bound=None))
        self.secure_aggregation = check_secure(secure_aggregation, self.method, self.sampler, streams)
        self.checkpoint_every = check_int(checkpoint_every, "checkpoint_every", least=0)
        self.keep_checkpoints = check_int(keep_checkpoints, "keep_checkpoints", least=0)
        self.resume_from = check_checkpoints(self.method, checkpoint_every, keep_checkpoints, resume_from, output_dir)
        self._optimizer, self._scheduler, self.loss = optimizer, scheduler, loss
        self.classification, self.metrics = classification, check_metrics(check_mapping(metrics, "metrics"))
        self._device, self._callbacks = pick_device(device), CallbackGroup(callbacks).given
        self._output_dir = check_path(output_dir, "output_dir")
        self._run_config = check_mapping(run_config, "run_config")
        self.label_counts = label_counts
        check_labels_stay(self.method, self.sampler, loss, classification, self.metrics, label_counts)
        self.halves = cut_model(model, cut, tail, share_frozen=state == "trainable")  # `start` is given no others
        parts = self.method.assign(self.halves.parts)  # refuses another number of them
        self.precision = check_precision(precision, parts.values())
        self.private = check_private(
            private, self.method, parts, self.sampler, self.faults, resume_from, self.secure_aggregation, streams
        )
        self._spending = Spending(self.private)
        on_clients = [parts[name] for name in self.method.client_parts()]
        for part in on_clients:
            check_client_half(part)
        self._sizes = sizes(self.halves.parts, on_clients)
        self.cache_activations = check_cache(cache_activations, self.method, parts, self.sampler, streams)
        self._template = kept_state(model, state)
        self._parameter_order = [name for name, _ in model.named_parameters()]

    # --- the run -----------------------------------------------------------------------------------------------------
    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord | Mapping[str, torch.Tensor],
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
            The whole model's state dict; or the dict itself, which may hold bfloat16, as Flower's arrays may not.
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
        check_evaluate_fn(evaluate_fn)
        num_rounds, initial_arrays = check_int(num_rounds, "num_rounds", least=1), as_record(initial_arrays)
        timeout = check_float(timeout, "timeout", above=0)
        with last_word(), own_modes(), FolderLock(self._output_dir):
            return self._run(grid, initial_arrays, num_rounds, timeout, train_config, evaluate_config, evaluate_fn)

    def _run(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int,
        timeout: float,
        train_config: Mapping[str, Any] | None,
        evaluate_config: Mapping[str, Any] | None,
        evaluate_fn: EvaluateFn | None,
    ) -> Result:
        state = arrays_to_state(initial_arrays, self._template)
        backend = self._backend(state)
        scheduler = make_scheduler(self._scheduler, backend.optimizer, evaluate_every=self.evaluate_every)
        saver = Saver(
            checkpoints_in(self._output_dir, self.keep_checkpoints),
            backend,
            scheduler,
            template=self._template,
            options=self._settings(num_rounds),
            run_config=self._run_config,
        )
        saved = saver.find(self.resume_from)
        if saved is None and self._output_dir is not None:
            set_aside(self._output_dir, (*FILES, CHECKPOINTS))
        result, begin = Result() if saved is None else saved_result(saved), time.monotonic()
        position, first_round = (None, 1) if saved is None else (saved["metrics_position"], saved["round"])
        self.summary()
        with (
            stopped_by_flower() as stops,
            open_carrier(grid, self.transport, self.stream_options) as carrier,
            RunRecorder(self._output_dir, saver.configuration(), position, self._callbacks) as recorder,
        ):
            stops.append(carrier.stop)
            met = Meeting.of(self, grid, carrier, train_config)
            policy, summary = met.policy, met.summary
            run = Run(
                backend=backend,
                membership=met.membership,
                runner=StepRunner(
                    self.method,
                    backend,
                    met.membership.clients,
                    timeout=policy.step_timeout or timeout,
                    separate=not self.stream_options.sum_gradients,
                    **met.shared(),
                ),
                evaluator=met.evaluator(self, backend, timeout, evaluate_config),
                scheduler=scheduler,
                recorder=recorder,
                progress=Progress(num_rounds),
                summary=summary,
                policy=policy,
                saved=saved,
                state=state,
                result=result,
                timeout=timeout,
            )
            loop = EpochLoop(
                run,
                saver,
                self.sampler,
                self._stragglers,
                min_nodes=self.min_available_nodes,
                checkpoint_every=self.checkpoint_every,
                metrics=self.metrics,
                spending=self._spending,
            )
            try:
                if saved is None:
                    result.arrays = initial_arrays
                    evaluate_on_server(evaluate_fn, 0, initial_arrays, result, summary)
                else:
                    saver.restore(run, saved, self._stragglers.planned)
                stop = recorder.stopped
                for server_round in range(first_round, num_rounds + 1) if stop is None else ():
                    record = loop.train(server_round)
                    result.arrays = state_to_arrays(run.current_state())
                    result.train_metrics_clientapp[server_round] = MetricRecord(record.metrics())
                    evaluated = bool(self.evaluate_every) and server_round % self.evaluate_every == 0
                    in_clients = run.evaluate_in_clients(server_round) if evaluated else {}
                    on_server, stop = evaluate_on_server(evaluate_fn, server_round, result.arrays, result, summary)
                    record = replace(record, evaluate_clientapp=in_clients, evaluate_serverapp=on_server)
                    scheduler.on_round(round_values(record), evaluated=evaluated)
                    recorder.round(record, run.current_state())
                    recorder.summary(summary.report())  # a process that is killed has none at its end
                    stop = stop or recorder.stopped
                    if stop is not None:
                        log.info("The run ends after round %d: %s", server_round, stop)
                        break
                recorder.finish(run.current_state())
            finally:
                summary.ignored.update(carrier.ignored)
                recorder.summary(summary.report())
            summary.log(run.membership.name)
        log.info("Finished %d round%s in %s.", num_rounds, "s" * (num_rounds > 1), clock(time.monotonic() - begin))
        return result

    def predict(
        self,
        grid: Grid,
        arrays: ArrayRecord | Result,
        *,
        on_batch: Callable[[int, Prediction], Any] | None = None,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
    ) -> dict[int, Prediction]:
        """Return the model's outputs for the clients' test data, which stays with them; nothing is trained.

        Parameters
        ----------
        grid, timeout, train_config, evaluate_config
            As in `start`.
        arrays : ArrayRecord or Result
            The model, as `start` takes or returns it.
        on_batch : callable, optional
            Takes a client's id and a `Prediction` for its share of `evaluate_batch_size` examples; nothing is kept.

        Returns
        -------
        dict of int to Prediction
            By client; empty with `on_batch`. Of clients that failed, and were tolerated, what came before.

        Raises
        ------
        ConfigError, MembershipError, StepError
            As `start`; also where labels stay with clients that have no `on_predict`.
        """
        timeout = check_float(timeout, "timeout", above=0)
        state = arrays_to_state(as_record(arrays, "arrays"), self._template)
        opened = open_carrier(grid, self.transport, self.stream_options)
        with last_word(), own_modes(), stopped_by_flower() as stops, opened as carrier:
            stops.append(carrier.stop)
            met = Meeting.of(self, grid, carrier, train_config, once=True)
            met.membership.refresh(self.min_available_nodes, timeout)
            with StepError.located("prediction", met.membership.name):
                evaluator = met.evaluator(self, self._backend(state), timeout, evaluate_config)
                return by_client(evaluator.predict(), on_batch)

    # --- its parts ---------------------------------------------------------------------------------------------------
    def _backend(self, state: Mapping[str, torch.Tensor]) -> LocalBackend:
        return LocalBackend(
            with_state(self.method.assign(self.halves.copied_parts()), state),  # `start` may be called again
            self.method.parts,
            optimizer=self._optimizer,
            loss=self.loss,
            device=self._device,
            classification=self.classification,
            order=self._parameter_order,
            private=self.private,
            noise_on_clients=self.secure_aggregation is not None,
            precision=self.precision,
        )

    def _settings(self, num_rounds: int) -> dict[str, Any]:
        return {
            "num_rounds": num_rounds,
            **{name: getattr(self, name) for name in _SETTINGS},
            "method": self.method.name,
            **self._stragglers.settings(),
            "device": str(self._device),
            "resume_from": None if self.resume_from is None else str(self.resume_from),
        }

    def summary(self) -> None:
        """Log the strategy's configuration."""
        log.info("Split learning, method %s, transport %s:", self.method.name, self.transport)
        log.info("\t├── Sampler: %r", self.sampler)
        log.info("\t├── Cut: %s (%s)%s", self.cut, self._sizes, told_frozen(self.halves.parts))
        log.info("\t└── Server half on: %s; at least %d nodes", self._device, self.min_available_nodes)
