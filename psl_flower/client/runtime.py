"""A process's answers to requests: for all its clients of a step at once, where that is what each by itself would do.

All clients of a step have the same weights, so a pass over all their rows computes what a pass for each would, a
hundred times faster on a step of a hundred clients. It does so only if the model's part treats each example by itself,
which is a rule here, and draws no random numbers, which would be each client's own. Neither is guessed from the layers:
the first pass is compared with a pass over a single row, and the generators are looked at after every pass.
"""

from __future__ import annotations

import logging
import time
import zlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import torch

from psl_flower import tree
from psl_flower.client.batch_tags import batch_tags, check_tags
from psl_flower.client.class_names import told_classes
from psl_flower.client.client import SplitClient
from psl_flower.client.context import ClientContext
from psl_flower.client.defending import Defending, check_drawing, packing_of
from psl_flower.client.factory import NotBuiltError
from psl_flower.client.label_noise import with_noise
from psl_flower.client.masking import Masking, agree, describe_key
from psl_flower.client.part import ClientPart
from psl_flower.client.process import RunState
from psl_flower.client.watching import Watch, WatchedSeeds, check_frozen
from psl_flower.data import PadTexts, Seeds, join_batches
from psl_flower.data.batch import Batch, checksum, checksums
from psl_flower.data.rows import TEST
from psl_flower.devices import reseed, seeded
from psl_flower.errors import BadRowsError, ConfigError, LabelError, ProtocolError, PSLError
from psl_flower.failures import IN_LOG, Failure, Kind, without_values
from psl_flower.methods.base import SplitMethod, Stage
from psl_flower.origin import RAISED, let_signals_end, where
from psl_flower.protocol import DESCRIBE, Config, Leaf, Orders, Part, Reply, Request, WorkOrder
from psl_flower.protocol import Kind as LeafKind
from psl_flower.split.compare import Dice
from psl_flower.tree import Tree

log = logging.getLogger("flwr.psl_flower")

MakeClient = Callable[[int, Config], SplitClient]


class CannotJoinError(Exception):
    """These clients must be served one at a time; if `lasting`, always."""

    def __init__(self, reason: str, *, lasting: bool) -> None:
        super().__init__(reason)
        self.lasting = lasting


@torch.inference_mode(False)
@torch.enable_grad()  # whatever the user's module, or a notebook, has set for good
def answer(method: SplitMethod, state: RunState, make_client: MakeClient, request: Request) -> Reply:
    """Return the reply to a request; what goes wrong for a client is its own failure, never raised.

    Parameters
    ----------
    method : SplitMethod
        The one the clients were built for: they answer its stages and no others.
    state : RunState
        The process's.
    make_client : callable
        Takes a node id and the configuration; returns the client, the same one each time.
    request : Request
    """
    if any(request.delays):
        time.sleep(max(request.delays))  # simulated stragglers wait side by side
    begin = time.monotonic()
    reply, clients = Reply(), []
    for node in request.nodes:
        try:
            clients.append(make_client(node, request.config))
            clients[-1].config = {**request.config, **request.evaluate_config}
        except RAISED as exc:  # the user's code: the server learns what happened
            let_signals_end(exc)
            reply.failures[node] = _failure(exc, node)
    if clients:
        request = request.take([i for i, node in enumerate(request.nodes) if node not in reply.failures])
        _answer(method, state, request, clients, reply)
    for node, failure in reply.failures.items():
        if failure.kind.is_mistake and failure.kind is not Kind.RAISED:
            state.refusals.add(f"node {node}", failure)
    _share(reply, request, time.monotonic() - begin)
    return reply


def _answer(
    method: SplitMethod, state: RunState, request: Request, clients: Sequence[SplitClient], reply: Reply
) -> None:
    if request.stage == DESCRIBE:
        for node, client in zip(request.nodes, clients, strict=True):
            try:
                _check_classes(method, by_class=request.label_counts and state.label_noise is None)
                key = describe_key(state, node, request.session)
                described = client.describe(
                    label_counts=request.label_counts, method=method.name, model=state.signature
                )
                private = "" if state.private is None else repr(state.private)
                described = replace(described, key=key, private=private, classes=told_classes(method, client))
                reply.descriptions[node] = with_noise(method, state, node, described)
            except RAISED as exc:
                let_signals_end(exc)
                reply.failures[node] = replace(_failure(exc, node), partition_id=client.partition_id)
        return
    try:
        stage = _stage(method, request)
    except ProtocolError as error:
        reply.failures |= dict.fromkeys(request.nodes, error.failure())
        return
    masking, refused = agree(state, stage, request, clients)
    reply.failures |= refused
    if refused:
        clients = [client for node, client in zip(request.nodes, clients, strict=True) if node not in refused]
        request = request.take([i for i, node in enumerate(request.nodes) if node not in refused])
    work = _Work(method, stage, state, masking)
    part = _together(work, request, clients)
    if part is not None:
        reply.parts.append(part)
        return
    for i, (node, client) in enumerate(zip(request.nodes, clients, strict=True)):
        try:
            reply.parts.append(work.do(request.take([i]), [client]))
        except RAISED as exc:
            let_signals_end(exc)
            reply.failures[node] = _failure(exc, node, client)
    if not request.separate:
        reply.parts = _summed(reply.parts)


def _stage(method: SplitMethod, request: Request) -> Stage:
    """Return what a request asks for, if this method has it."""
    stage = method.stages().get(request.stage)
    if stage is None:
        raise ProtocolError(
            f"this client was built for method {method.name!r}, which has no stage {request.stage!r:.80}: "
            "give server and client the same method"
        )
    if not stage.trains and (request.orders is None or not request.orders.test):
        raise ProtocolError(f"stage {stage.name!r} is for test data only, asked for training data")
    kinds = {name: leaf.kind for name, leaf in request.inputs.items()}
    if kinds != dict(stage.inputs):
        raise ProtocolError(f"stage {stage.name!r} takes {dict(stage.inputs)}, got {kinds}")
    _check_classes(method, by_class=request.orders is not None and request.orders.class_counts is not None)
    missing = set() if stage.own else set(method.client_parts()) - request.weights.keys()
    if missing:
        raise ProtocolError(f"stage {stage.name!r} needs the weights of {', '.join(sorted(missing))}")
    return stage


def _check_classes(method: SplitMethod, *, by_class: bool) -> None:
    """Refuse what would tell the server labels where the method leaves them with the client."""
    if by_class and not method.sends_labels():
        raise ProtocolError(
            f"this client was built for method {method.name!r}, with which labels stay here: it tells nothing by "
            "class, use a sampler that needs no label counts, or let it tell them with noise: "
            "split_client_app(..., label_noise=LabelNoise(epsilon=1.0, classes=10))"
        )


def _together(work: _Work, request: Request, clients: Sequence[SplitClient]) -> Part | None:
    """Return one part for all clients, or None if they must be served one at a time."""
    if work.state.one_at_a_time or len(clients) < 2 or not work.stage.joint:
        return None
    try:
        return work.do(request, clients)
    except CannotJoinError as reason:
        if reason.lasting:
            work.state.one_at_a_time = True
            log.info("Clients of this process run one at a time: %s.", reason)
    except RAISED as exc:  # one client's fault: serving each by itself tells whose
        let_signals_end(exc)
        log.debug("A joint pass failed: %s: %s", type(exc).__name__, exc)
    return None


class _Work:
    """A stage, done for one client or for several as one."""

    def __init__(self, method: SplitMethod, stage: Stage, state: RunState, masking: Masking | None = None) -> None:
        self.method, self.stage, self.state, self.masking = method, stage, state, masking

    def do(self, request: Request, clients: Sequence[SplitClient]) -> Part:
        """Return what the stage gives for these clients."""
        orders = request.orders
        assert orders is not None  # `_stage` has seen to it, with the codec
        sums = LeafKind.SUM in self.stage.outputs.values()
        scaled = request.cohort is not None and request.cohort.max_norm is not None
        if len(clients) > 1 and (request.separate or scaled) and sums:
            raise CannotJoinError("each client's own sum is needed", lasting=False)
        for name, weights in request.weights.items():
            self._parts()[name].load(weights)
        own = self.state.own.identity(request.nodes[0]) if self.stage.own else ()
        key = _key(request, orders, own)
        inputs = {n: leaf.value[0] if leaf.kind is LeafKind.EACH else leaf.value for n, leaf in request.inputs.items()}
        if self.stage.after is None:
            context, outputs = self._begin(self.stage, request, orders, clients, inputs)
        else:
            # absent if the stage before was done in another process, which is gone, or for another set of clients
            context = self.state.contexts.pop(key) or self._again(self.stage.after, request, orders, clients)
            outputs = self._go_on(context, orders, clients, inputs)
        context.done.add(self.stage.name)
        if self._goes_on(context):
            self.state.contexts.put(key, context)
        leaves = self._leaves(outputs, orders)
        if (
            len(clients) > 1
            and sums
            and not all(_finite(leaf) for leaf in leaves.values() if leaf.kind is LeafKind.SUM)
        ):
            raise CannotJoinError("the sum is not finite: the server shall see whose it is", lasting=False)
        if self.masking is not None:
            leaves = self.masking.mask(leaves, orders.clients)
        return Part(request.nodes, leaves, orders.step, context.checksums if self.stage.after is None else None)

    def _parts(self) -> Mapping[str, ClientPart]:
        assert self.state.parts is not None
        return self.state.parts

    def _goes_on(self, context: ClientContext) -> bool:
        stages = [other for other in self.method.stages().values() if other.trains or not context.training]
        return any(other.after in context.done and other.name not in context.done for other in stages)

    def _go_on(
        self, context: ClientContext, orders: Orders, clients: Sequence[SplitClient], inputs: Mapping[str, Any]
    ) -> Mapping[str, Tree]:
        """Do a stage that goes on after another; each has random numbers of its own."""
        device = next(iter(self._parts().values())).device
        seed = zlib.crc32(self.stage.name.encode())
        with seeded(0, device):
            run = partial(self.stage.function, self.method, context, **inputs)
            if len(clients) == 1:
                reseed(next(orders.each()).step_seed() ^ seed, device)
                return context.defend(self.stage, run())
            return context.defend(self.stage, self._without_random(device, run))

    def _without_random(self, device: torch.device, run: Callable[[], Mapping[str, Tree]]) -> Mapping[str, Tree]:
        """Run something for several clients as one, unless it draws random numbers."""
        reseed(0, device)
        before = _reseeded(device)
        outputs = run()
        if before != Dice(device).state():
            raise CannotJoinError("the client half draws random numbers, which are each client's own", lasting=True)
        return outputs

    def _begin(
        self,
        stage: Stage,
        request: Request,
        orders: Orders,
        clients: Sequence[SplitClient],
        inputs: Mapping[str, Any],
    ) -> tuple[ClientContext, Mapping[str, Tree]]:
        """Draw the batch and do the first stage of a step."""
        store, node = self.state.own, request.nodes[0]
        own = store.find(node, orders) if stage.own else {}
        if not stage.batch:
            keep = partial(store.begin, node, orders)
            context = ClientContext(clients, self._parts(), orders, None, self.state.loss, own, keep)
            return context, stage.function(self.method, context, **inputs)
        if self.state.private is not None:
            check_drawing(self.state.private, orders)
        device = next(iter(self._parts().values())).device
        with seeded(0, device):  # puts the generators back once, not once a client
            watch = Watch(device) if request.kept else None
            seeds = orders.step_seeds()
            seed = Seeds(seeds, device) if watch is None else WatchedSeeds(seeds, device, watch)
            joined, drawn = self._draw_all(clients, orders, seed)
            if watch is not None:
                watch.check("the data set draws random numbers: turn augmentation off")
            secrets = [self.state.secret(node) for node in request.nodes]
            tags = batch_tags(drawn, orders, secrets)
            defending = Defending()
            if self.state.defences:
                defending = Defending.of(self.state.defences, secrets, orders, [client.draw for client in clients])
                joined = defending.labels(joined)
            private = self.state.private
            bound = None if private is None else private.bound(len(self.method.parts))
            context = ClientContext(
                *(clients, self._parts(), orders, joined, self.state.loss, own),
                defending=defending,
                bound=bound,
                precision=request.precision,
            )
            if orders.checksums is None:
                context.checksums = tags
            else:
                data, by_secret = TEST if orders.test else "training data", orders.drawing is not None
                check_tags(tags, orders.checksums, data, by_secret=by_secret and not orders.test)
            run = partial(stage.function, self.method, context, joined, **inputs)
            if len(clients) == 1:
                given = run()
                if watch is not None:
                    watch.check("the part that is run draws random numbers: set its dropout to 0")
            elif any(type(client).forward is not SplitClient.forward for client in clients):
                raise CannotJoinError(f"{type(clients[0]).__name__} has a forward pass of its own", lasting=True)
            else:
                given = self._without_random(device, run)
            if watch is not None:
                check_frozen(context.used)
            return context, context.defend(stage, given)

    def _draw_all(self, clients: Sequence[SplitClient], orders: Orders, seed: Seeds) -> tuple[Batch, list[int]]:
        """Return the clients' batches as one, and the checksum of each; random numbers are each client's own."""
        if len(clients) > 1:
            try:
                found = SplitClient.draw_together(clients, orders, seed)
            except RAISED as exc:  # drawing for each tells whose fault it is
                let_signals_end(exc)
                log.debug("Drawing for all at once failed: %s: %s", type(exc).__name__, exc)
                found = None
            if found is not None:
                return found, checksums(found, orders.counts.tolist())
        batches = []
        for i, (client, order) in enumerate(zip(clients, orders.each(), strict=True)):
            seed(i)
            batches.append(self._draw(client, order))
        drawn = [checksum(batch) for batch in batches]  # before padding, which depends on the cohort
        return _join(batches, clients[0].padding), drawn

    def _draw(self, client: SplitClient, order: WorkOrder) -> Batch:
        """Return the batch of a client; where labels stay with it, so do errors that may show them."""
        try:
            return client.draw_batch(order)
        except RAISED as exc:
            let_signals_end(exc)
            if self.method.sends_labels():
                raise
            log.error("client %d: %s", order.client, exc)
            if isinstance(exc, BadRowsError):
                raise BadRowsError(exc.message, {row: without_values(why) for row, why in exc.rows.items()}) from exc
            text = without_values(str(exc) if isinstance(exc, PSLError) else where(exc))
            raise ConfigError(text + IN_LOG) from exc

    def _again(self, after: str, request: Request, orders: Orders, clients: Sequence[SplitClient]) -> ClientContext:
        """Do the stage again that this one goes on from."""
        context, _ = self._begin(self.method.stages()[after], request, orders, clients, {})
        context.done.add(after)
        return context

    def _leaves(self, outputs: Mapping[str, Tree], orders: Orders) -> dict[str, Leaf]:
        if not isinstance(outputs, Mapping) or set(outputs) != set(self.stage.outputs):
            raise ConfigError(f"stage {self.stage.name!r} must return {', '.join(self.stage.outputs) or 'nothing'}")
        leaves = {}
        for name, kind in self.stage.outputs.items():
            rows = tree.rows(outputs[name], name) if kind is LeafKind.ROWS and outputs[name] is not None else None
            if rows is not None and rows != orders.num_rows:
                raise ConfigError(
                    f"every row of a batch must give one row of {name}: a batch of {orders.num_rows} gave {rows}. "
                    "Where the model drops the batch dimension (squeeze, mean over the batch), keep it: flatten(1), say"
                )
            value = [outputs[name]] if kind is LeafKind.EACH else outputs[name]
            activations = kind is LeafKind.ROWS and name not in (*self.stage.exact, *self.stage.gradients)
            leaves[name] = Leaf(
                kind, value, name in self.stage.exact, packing_of(self.state.defences) if activations else None
            )
        return leaves


@lru_cache(maxsize=4)
def _reseeded(device: torch.device) -> tuple[Any, ...]:
    """Return the state of the generators, for right after `reseed` with 0: it is always the same then."""
    return Dice(device).state()


def _key(request: Request, orders: Orders, own: tuple[int, ...]) -> tuple[Hashable, ...]:
    """Return what identifies the work of a step for some clients, or for one with parts of its own."""
    # with the weights' versions: a process may hold what was kept for a stage whose next went to another process
    versions = tuple(weights.version for weights in request.weights.values())
    step = (versions, orders.seed, orders.epoch, orders.step, orders.test)
    classes = None if orders.class_counts is None else orders.class_counts.tobytes()
    order = (tuple(orders.left_out.items()), tuple(orders.put_off.items()))
    return (step, request.nodes, orders.starts.tobytes(), orders.counts.tobytes(), classes, order, own)


def _join(batches: Sequence[Batch], padding: PadTexts | None) -> Batch:
    try:
        return join_batches(batches, padding)
    except (ConfigError, RuntimeError, TypeError) as exc:
        raise CannotJoinError(f"the clients' batches differ: {exc}", lasting=False) from exc


def _summed(parts: list[Part]) -> list[Part]:
    """Return parts that hold sums only as their sum, or as they are if it is not finite: the server shall see whose."""
    sums = bool(parts) and all(leaf.kind is LeafKind.SUM for part in parts for leaf in part.outputs.values())
    if len(parts) < 2 or not sums or not parts[0].outputs:
        return parts
    first, *others = parts
    total = {name: leaf.value for name, leaf in first.outputs.items()}
    for part in others:
        for name, leaf in part.outputs.items():
            total[name] = tree.add(total[name], leaf.value)
    leaves = {name: Leaf(LeafKind.SUM, value) for name, value in total.items()}
    if not all(map(_finite, leaves.values())):
        return parts
    return [Part(tuple(node for part in parts for node in part.nodes), leaves, first.step)]


def _finite(leaf: Leaf) -> bool:
    return all(map(tree.is_finite, tree.leaves(leaf.value)))


def _share(reply: Reply, request: Request, seconds: float) -> None:
    """Note how long each client worked: its simulated delay, and its share by examples of what all took together."""
    counts = [max(count, 1) for count in request.counts()]
    delays = request.delays or (0.0,) * len(counts)
    total = sum(counts)
    for node, count, delay in zip(request.nodes, counts, delays, strict=True):
        reply.seconds[node] = delay + seconds * count / total
    reply.busy = seconds + max(delays, default=0.0)


def _failure(exc: BaseException, node: int, client: SplitClient | None = None) -> Failure:
    if isinstance(exc, NotBuiltError) and exc.__cause__ is not None:
        return replace(_failure(exc.__cause__, node), partition_id=exc.partition_id)
    if isinstance(exc, ProtocolError):
        return exc.failure()
    log.debug("node %d: %s", node, exc, exc_info=exc)
    if isinstance(exc, LabelError):  # where the loss is a client's, labels are to stay there
        log.error("node %d: %s", node, exc)
        return Failure(Kind.LABELS, f"{exc.rule} (which they are is in the log of the client)")
    if isinstance(exc, BadRowsError) and client is not None:
        return client.unreadable(exc)
    return Failure(Kind.RAISED, str(exc) if isinstance(exc, PSLError) else where(exc))


__all__ = ["CannotJoinError", "answer"]
