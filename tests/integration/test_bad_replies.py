"""Every kind of bad reply, through each carrier: refused with its reason, counted, and made up for."""

import json
import logging
import re
import threading
from collections import Counter
from dataclasses import dataclass, replace

import pytest
import torch
from faulty import RecordingRunner, assert_each_used_once, poisoned, recording_app
from flwr.app import ArrayRecord
from support import CUT, NUM_CLASSES, client_sizes, sgd, tiny_resnet

from psl_flower import FaultPolicy, InProcessGrid, ParallelSplitLearning, UniformGlobalSampler
from psl_flower.client import runtime
from psl_flower.client import stream as stream_module
from psl_flower.client.stream import StreamClient
from psl_flower.exchange.streams.carrier import StreamCarrier
from psl_flower.protocol import Kind, Leaf
from psl_flower.strategy import strategy as strategy_module
from psl_flower.strategy import tolerance

K, CULPRIT = 6, 1
TRANSPORTS = ["messages", "streams"]
NAN, INF = float("nan"), float("inf")


@dataclass(frozen=True)
class Case:
    """How a part of a reply is changed, the kind it is counted as, and what is said of it."""

    change: object
    kind: str
    text: str


def output(name, change):
    """Return a change of a part, given that of an output's value."""

    def tamper(part):
        leaf = part.outputs[name]
        return replace(part, outputs={**part.outputs, name: Leaf(leaf.kind, change(leaf.value), leaf.exact)})

    return tamper


def tensor(change):
    return output("activations", lambda tensors: (change(tensors[0].clone()),))


def labels(change):
    return output("labels", change)


def gradient(change):
    def tamper(gradients):
        name = next(iter(gradients))
        return {**gradients, name: change(gradients[name].clone())}

    return output("head", tamper)


def fewer(part):
    return tensor(lambda t: t[1:])(labels(lambda y: y[1:])(part))


def without_one(gradients):
    return dict(list(gradients.items())[1:])


def with_one_more(gradients):
    return {**gradients, "nobody.knows": torch.ones(2)}


def raises(part):
    raise OSError("disk on fire")


def of_step(change):
    return lambda part: replace(part, step=change(part.step))


def instead(name, kind, value):
    return lambda part: replace(part, outputs={name: Leaf(kind, value)})


ROWS = r"bad reply: {}: expected \d+ rows, got shape: \(\d+,"
STEP = r"reply to another step: expected step \d+, got "
NOT_FINITE = r"expected finite values, got 1 NaN or infinite"
NAMES = "tensors missing or unknown"
FORWARD_CASES = {
    "an error": Case(raises, "client error", r"test_bad_replies\.py:\d+ in raises: OSError: disk on fire"),
    "too few": Case(fewer, "shape", ROWS.format(r"activations\[0\]")),
    "too few labels": Case(labels(lambda y: y[1:]), "shape", ROWS.format("labels")),
    "shape": Case(
        tensor(lambda t: t[:, 1:]),
        "shape",
        r"activations\[0\]: shape: expected \(4, 6, 6\) a row, got \(3, 6, 6\)",
    ),
    "rank": Case(
        tensor(lambda t: t.flatten(1)),
        "shape",
        r"activations\[0\]: shape: expected \(4, 6, 6\) a row, got \(144,\)",
    ),
    "dtype": Case(
        tensor(torch.Tensor.double), "dtype", r"activations\[0\]: dtype: expected torch.float32, got torch.float64"
    ),
    "labels of a dtype": Case(
        labels(torch.Tensor.float), "dtype", r"labels: dtype: expected torch.int64, got torch.float32"
    ),
    "NaN": Case(tensor(poisoned(NAN)), "not finite", r"activations\[0\]: " + NOT_FINITE),
    "infinite": Case(tensor(poisoned(-INF)), "not finite", r"activations\[0\]: " + NOT_FINITE),
    "labels too large": Case(
        labels(lambda y: y + NUM_CLASSES), "label range", r"labels must be class indices from 0 to 3, .*, got [4-7]"
    ),
    "negative labels": Case(
        labels(lambda y: y - NUM_CLASSES), "label range", r"labels must be class indices from 0 to 3, .*, got -[1-4]"
    ),
    "two tensors": Case(output("activations", lambda t: t * 2), NAMES, r"expected 2 tensors as of the others, got 3"),
    "no tensor": Case(
        output("activations", lambda t: ()), NAMES, r"activations\[0\]: expected as of the others, got labels"
    ),
    "no labels": Case(labels(lambda y: None), NAMES, r"labels: expected as of the others, got activations"),
    "of another step": Case(of_step(lambda step: step + 3), "another step", STEP + r"\d+"),
    "of no step": Case(of_step(lambda step: None), "another step", STEP + "None"),
    "gradients": Case(
        instead("head", Kind.SUM, {}),
        "malformed",
        r"forward gives activations \(rows\), labels \(rows\), got head \(sum\)",
    ),
}
BACKWARD_CASES = {
    "an error": Case(raises, "client error", r"test_bad_replies\.py:\d+ in raises: OSError: disk on fire"),
    "one missing": Case(output("head", without_one), NAMES, r"head: 1 missing, the first is 'layer1"),
    "one too many": Case(output("head", with_one_more), NAMES, r"head: 1 of unknown name, the first is 'nobody.knows'"),
    "without names": Case(output("head", lambda g: tuple(g.values())), "malformed", "head: expected tensors by name"),
    "trees": Case(
        output("head", lambda g: {name: (t,) for name, t in g.items()}),
        NAMES,
        r"head of '.*': expected a tensor, got a tree",
    ),
    "shape": Case(gradient(lambda g: g[1:]), "shape", r"head of '.*': shape: expected \(.*\), got \("),
    "dtype": Case(
        gradient(torch.Tensor.double), "dtype", r"head of '.*': dtype: expected torch.float32, got torch.float64"
    ),
    "NaN": Case(gradient(poisoned(NAN)), "not finite", r"head of '.*': " + NOT_FINITE),
    "infinite": Case(gradient(poisoned(INF)), "not finite", r"head of '.*': " + NOT_FINITE),
    "of another step": Case(of_step(lambda step: step + 3), "another step", STEP + r"\d+"),
    "activations": Case(
        instead("activations", Kind.ROWS, ()), "malformed", r"backward gives head \(sum\), got activations \(rows\)"
    ),
}
CASES = [("forward", name, case, 1) for name, case in FORWARD_CASES.items()]
CASES += [("backward", name, case, 2) for name, case in BACKWARD_CASES.items()]  # asked a second time in the same step


class Tampering:
    """Changes replies of one client: a case after the other, with good steps in between."""

    def __init__(self, honest):
        self.honest, self.left = honest, list(CASES)

    def __call__(self, work, request, clients):
        part, orders = self.honest(work, request, clients), request.orders
        (client,) = orders.clients
        if client != CULPRIT or not self.left:
            return part
        stage, name, case, times = self.left[0]
        if request.stage != stage or orders.step % 2 == 0:
            return part
        if times == 1:
            self.left.pop(0)
        else:
            self.left[0] = (stage, name, case, times - 1)
        return case.change(part)


class Warnings(logging.Handler):
    """What was said of the culprit."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.texts = []

    def emit(self, record):
        said = re.fullmatch(
            rf"step \d+ (?:goes on without|is redone without) client {CULPRIT} \(node \d+\): (.*)",
            record.getMessage(),
            re.DOTALL,
        )
        self.texts += [said[1]] if said else []


def train(folder, transport, **policy):
    strategy = ParallelSplitLearning(
        tiny_resnet(),
        cut=CUT,
        sampler=UniformGlobalSampler(16, seed=3),
        optimizer=sgd,
        transport=transport,
        min_available_nodes=K,
        evaluate_every=0,
        faults=FaultPolicy(mistakes="retry", **policy),
        output_dir=folder,
    )
    strategy.start(InProcessGrid(recording_app(), K), ArrayRecord(tiny_resnet().state_dict()), num_rounds=3)
    assert_each_used_once(RecordingRunner.latest, K, 3)
    return json.loads((folder / "summary.json").read_text())


@pytest.fixture(scope="module", params=TRANSPORTS)
def refused(request, tmp_path_factory):
    """Return the carrier, what was said, and what was counted."""
    warnings = Warnings()
    with pytest.MonkeyPatch.context() as patch:
        tampering = Tampering(runtime._Work.do)
        patch.setattr(runtime._Work, "do", lambda *arguments: tampering(*arguments))
        patch.setattr(runtime, "_together", lambda *arguments: None)  # replies client by client
        patch.setattr(strategy_module, "StepRunner", RecordingRunner)
        patch.setattr(tolerance, "LONGEST_PAUSE", 0.0)
        logger = logging.getLogger("flwr.psl_flower")
        logger.addHandler(warnings)
        try:  # each client's gradients are seen where they may have to be clipped
            summary = train(tmp_path_factory.mktemp("refused"), request.param, max_gradient_norm=1e9)
        finally:
            logger.removeHandler(warnings)
    assert not tampering.left
    return request.param, warnings.texts, summary


@pytest.mark.parametrize("index", range(len(CASES)), ids=[f"{stage}-{name}" for stage, name, *_ in CASES])
def test_a_bad_reply_is_refused_with_its_reason(refused, index):
    _, said, _ = refused
    assert len(said) == len(CASES)
    assert re.match(CASES[index][2].text, said[index]), said[index]


def test_bad_replies_are_counted_by_kind(refused):
    _, _, summary = refused
    injected = Counter()
    for _, _, case, times in CASES:
        injected[case.kind] += times
    assert summary["failures"] == {str(CULPRIT): sum(injected.values())}
    assert summary["refused"] == injected


# --- replies that nobody waits for, over streams; those over messages are in test_faults -----------------------------
@pytest.fixture
def _recording(monkeypatch):
    monkeypatch.setattr(strategy_module, "StepRunner", RecordingRunner)


@pytest.mark.usefixtures("_recording")
def test_replies_that_come_twice_over_a_stream_are_ignored_and_counted(tmp_path, monkeypatch):
    handle, encode, sent = StreamClient._handle, stream_module.encode_reply, []

    def encoded(*arguments):
        sent.append(encode(*arguments))
        return sent[-1]

    def handled(self, frame):
        goes_on = handle(self, frame)
        if frame.header.get("stage") in ("forward", "backward") and len(sent) <= 6:  # the first describes
            self._send(sent[-1])
        return goes_on

    monkeypatch.setattr(stream_module, "encode_reply", encoded)
    monkeypatch.setattr(StreamClient, "_handle", handled)
    summary = train(tmp_path, "streams")
    assert summary["ignored"] == {"late": 5}
    assert summary["refused"] == {}


@pytest.mark.usefixtures("_recording")
def test_a_reply_over_a_stream_that_comes_too_late_is_ignored_and_counted(tmp_path, monkeypatch):
    given_up, late = threading.Event(), []
    honest, give_up, exchange = stream_module.answer, StreamCarrier._give_up, StreamCarrier.exchange

    def answer(method, state, make_client, request):
        if is_late(request):
            late.append(request.nodes)
            assert given_up.wait(60)
        return honest(method, state, make_client, request)

    def is_late(request):
        return request.stage == "forward" and request.orders.step == 3 and not late

    def noted(self, current):
        give_up(self, current)
        given_up.set()

    def impatient(self, request, timeout):
        return exchange(self, request, 1.0 if is_late(request) else timeout)

    monkeypatch.setattr(stream_module, "answer", answer)
    monkeypatch.setattr(StreamCarrier, "_give_up", noted)
    monkeypatch.setattr(StreamCarrier, "exchange", impatient)
    summary = train(tmp_path, "streams")
    assert summary["ignored"] == {"late": 1}
    assert set(summary["refused"]) == {"timeout"}
    assert summary["refused"]["timeout"] >= sum(size > 0 for size in client_sizes(K)) - 2
