"""Every kind of bad reply, through each carrier: refused with its reason, counted, and made up for."""

import json
import logging
import re
import threading
from collections import Counter
from dataclasses import dataclass, replace

import pytest
import torch
from faulty import RecordingTrainer, assert_each_used_once, recording_app
from flwr.app import ArrayRecord
from psl_flower.client.group import GroupServer
from support import CUT, NUM_CLASSES, client_sizes, sgd, tiny_resnet

from psl_flower import FaultPolicy, InProcessGrid, ParallelSplitLearning, UniformGlobalSampler
from psl_flower.client import app as app_module
from psl_flower.client import group as group_module
from psl_flower.client import stream as stream_module
from psl_flower.client.stream import StreamClient
from psl_flower.exchange.streams.carrier import StreamCarrier
from psl_flower.protocol import BACKWARD, FORWARD, Activations, BackwardRequest, ForwardRequest, Gradients
from psl_flower.strategy import strategy as strategy_module
from psl_flower.strategy import tolerance

K, CULPRIT = 6, 1
TRANSPORTS = ["messages", "streams"]
NAN, INF = float("nan"), float("inf")


@dataclass(frozen=True)
class Case:
    """How a reply is changed, the kind it is counted as, and what is said of it (by carrier, where they differ)."""

    change: object
    kind: str
    text: str
    over_streams: str = ""

    def expected(self, transport):
        return self.over_streams if transport == "streams" and self.over_streams else self.text


def tensor(change):
    return lambda reply: replace(reply, tensors=(change(reply.tensors[0].clone()),))


def labels(change):
    return lambda reply: replace(reply, labels=change(reply.labels))


def gradient(change):
    def tamper(reply):
        name = next(iter(reply.tensors))
        return replace(reply, tensors={**reply.tensors, name: change(reply.tensors[name].clone())})

    return tamper


def poison(value):
    def change(t):
        t.view(-1)[0] = value
        return t

    return change


def fewer(reply):
    return replace(reply, tensors=(reply.tensors[0][1:],), labels=reply.labels[1:])


def without_one(reply):
    return replace(reply, tensors=dict(list(reply.tensors.items())[1:]))


def with_one_more(reply):
    return replace(reply, tensors={**reply.tensors, "nobody.knows": torch.ones(2)})


def raises(reply):
    raise OSError("disk on fire")


ROWS = r"bad reply: expected activations and labels of \d+ examples, got shape \(\d+"
STEP = r"reply to another step: expected step \d+, got "
NOT_FINITE = r"expected finite values, got 1 NaN or infinite"
FORWARD_CASES = {
    "an error": Case(raises, "client error", r"(error \d+: )?.*OSError: disk on fire"),
    "too few": Case(fewer, "shape", r"activations\[0\]: shape: expected \((\d+), 4, 6, 6\), got \((?!\1)\d+, 4", ROWS),
    "too few labels": Case(labels(lambda y: y[1:]), "shape", r"labels: shape: expected \(\d+,\), got \(\d+,\)", ROWS),
    "shape": Case(
        tensor(lambda t: t[:, 1:]), "shape", r"activations\[0\]: shape: expected \(\d+, 4, 6, 6\), got .*, 3,"
    ),
    "rank": Case(tensor(lambda t: t.flatten(1)), "shape", r"activations\[0\]: shape: expected .*, got \(\d+, 144\)"),
    "dtype": Case(
        tensor(torch.Tensor.double), "dtype", r"activations\[0\]: dtype: expected torch.float32, got torch.float64"
    ),
    "labels of a dtype": Case(
        labels(torch.Tensor.float), "dtype", r"labels: dtype: expected torch.int64, got torch.float32"
    ),
    "NaN": Case(tensor(poison(NAN)), "not finite", r"activations\[0\]: " + NOT_FINITE),
    "infinite": Case(tensor(poison(-INF)), "not finite", r"activations\[0\]: " + NOT_FINITE),
    "labels too large": Case(
        labels(lambda y: y + NUM_CLASSES), "label range", r"labels: expected integers from 0 to 3, got [4-7]"
    ),
    "negative labels": Case(
        labels(lambda y: y - NUM_CLASSES), "label range", r"labels: expected integers from 0 to 3, got -[1-4]"
    ),
    "two tensors": Case(
        lambda r: replace(r, tensors=r.tensors * 2),
        "tensors missing or unknown",
        r"activations: expected 1 tensors, got 2",
    ),
    "no tensor": Case(
        lambda r: replace(r, tensors=()),
        "malformed",
        r"bad reply: .*",
        r"bad reply: expected at least one tensor of act",
    ),
    "of another step": Case(lambda r: replace(r, step=r.step + 3), "another step", STEP + r"\d+"),
    "of no step": Case(lambda r: replace(r, step=None), "another step", STEP + "None", STEP + "None"),
    "gradients": Case(lambda r: Gradients({}, (), r.step), "malformed", r"bad reply: .*", r"bad reply: .*"),
}
BACKWARD_CASES = {
    "an error": Case(raises, "client error", r"(error \d+: )?.*OSError: disk on fire"),
    "one missing": Case(without_one, "tensors missing or unknown", r"gradients: 1 missing, the first is 'layer1"),
    "one too many": Case(
        with_one_more, "tensors missing or unknown", r"gradients: 1 of unknown parameters, the first is 'nobody.knows'"
    ),
    "shape": Case(gradient(lambda g: g[1:]), "shape", r"gradient of '.*': shape: expected \(.*\), got \("),
    "dtype": Case(
        gradient(torch.Tensor.double), "dtype", r"gradient of '.*': dtype: expected torch.float32, got torch.float64"
    ),
    "NaN": Case(gradient(poison(NAN)), "not finite", r"gradient of '.*': " + NOT_FINITE),
    "infinite": Case(gradient(poison(INF)), "not finite", r"gradient of '.*': " + NOT_FINITE),
    "of another step": Case(lambda r: replace(r, step=r.step + 3), "another step", STEP + r"\d+"),
    "activations": Case(
        lambda r: Activations((torch.ones(2),), torch.ones(2), r.step), "malformed", r"bad reply: .*", r"bad reply: .*"
    ),
}
CASES = [(ForwardRequest, name, case, 1) for name, case in FORWARD_CASES.items()]
CASES += [
    (BackwardRequest, name, case, 2) for name, case in BACKWARD_CASES.items()
]  # asked a second time in the same step


class Tampering:
    """Changes replies of one client: a case after the other, with good steps in between."""

    def __init__(self, honest):
        self.honest, self.left, self.good = honest, list(CASES), 0

    def __call__(self, client, state, node, request):
        reply = self.honest(client, state, node, request)
        order = getattr(request, "order", None)
        if order is None or order.client != CULPRIT or not self.left:
            return reply
        kind, _, case, times = self.left[0]
        if not isinstance(request, kind) or order.step % 2 == 0:
            return reply
        if times == 1:
            self.left.pop(0)
        else:
            self.left[0] = (kind, _, case, times - 1)
        return case.change(reply)


class Warnings(logging.Handler):
    """What was said of the culprit."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.texts = []

    def emit(self, record):
        said = re.fullmatch(
            rf"step \d+ (?:goes on without|is redone, for want of) client {CULPRIT}: (.*)",
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
        faults=FaultPolicy(**policy),
        output_dir=folder,
    )
    strategy.start(InProcessGrid(recording_app(), K), ArrayRecord(tiny_resnet().state_dict()), num_rounds=3)
    assert_each_used_once(RecordingTrainer.latest, K, 3)
    return json.loads((folder / "summary.json").read_text())


@pytest.fixture(scope="module", params=TRANSPORTS)
def refused(request, tmp_path_factory):
    """Return the carrier, what was said, and what was counted."""
    warnings = Warnings()
    with pytest.MonkeyPatch.context() as patch:
        tampering = Tampering(app_module.answer)
        for module in (app_module, group_module):
            patch.setattr(module, "answer", tampering)
        patch.setattr(GroupServer, "_joint", lambda *arguments: None)  # replies client by client
        patch.setattr(strategy_module, "SplitTrainer", RecordingTrainer)
        patch.setattr(tolerance, "LONGEST_PAUSE", 0.0)
        logger = logging.getLogger("flwr.psl_flower")
        logger.addHandler(warnings)
        try:  # each client's gradients are seen where they may have to be clipped
            summary = train(tmp_path_factory.mktemp("refused"), request.param, max_gradient_norm=1e9)
        finally:
            logger.removeHandler(warnings)
    assert not tampering.left
    return request.param, warnings.texts, summary


@pytest.mark.parametrize("index", range(len(CASES)), ids=[f"{kind.__name__}-{name}" for kind, name, *_ in CASES])
def test_a_bad_reply_is_refused_with_its_reason(refused, index):
    transport, said, _ = refused
    assert len(said) == len(CASES)
    assert re.match(CASES[index][2].expected(transport), said[index]), said[index]


def test_bad_replies_are_counted_by_kind(refused):
    transport, _, summary = refused
    injected = Counter()
    for _, _, case, times in CASES:
        injected[case.kind] += times
    counted = summary["refused"]
    if transport == "streams":  # a frame whose rows do not add up is malformed as a whole, for all of its process
        assert counted.pop("malformed") > injected.pop("malformed")
        injected["shape"] -= sum(case.over_streams == ROWS for case in FORWARD_CASES.values())
    else:
        assert summary["failures"] == {str(CULPRIT): sum(injected.values())}
    assert counted == injected


# --- replies that nobody waits for, over streams; those over messages are in test_faults -----------------------------
@pytest.fixture
def _recording(monkeypatch):
    monkeypatch.setattr(strategy_module, "SplitTrainer", RecordingTrainer)
    monkeypatch.setattr(GroupServer, "_joint", lambda *arguments: None)


@pytest.mark.usefixtures("_recording")
def test_replies_that_come_twice_over_a_stream_are_ignored_and_counted(tmp_path, monkeypatch):
    handle, encode, sent = StreamClient._handle, stream_module.encode_group_reply, []

    def encoded(number, reply, wire_dtype):
        sent.append(encode(number, reply, wire_dtype))
        return sent[-1]

    def handled(self, frame):
        goes_on = handle(self, frame)
        if frame.header.get("what") in (FORWARD, BACKWARD) and len(sent) <= 6:  # the first describes
            self._outgoing.put(sent[-1])
        return goes_on

    monkeypatch.setattr(stream_module, "encode_group_reply", encoded)
    monkeypatch.setattr(StreamClient, "_handle", handled)
    summary = train(tmp_path, "streams")
    assert summary["ignored"] == {"late": 5}
    assert summary["refused"] == {}


@pytest.mark.usefixtures("_recording")
def test_a_reply_over_a_stream_that_comes_too_late_is_ignored_and_counted(tmp_path, monkeypatch):
    given_up, late = threading.Event(), []
    honest, give_up = group_module.answer, StreamCarrier._give_up

    def answer(client, state, node, request):
        if isinstance(request, ForwardRequest) and request.order.step == 3 and not late:
            late.append(node)
            assert given_up.wait(60)
        return honest(client, state, node, request)

    def noted(self, current):
        give_up(self, current)
        given_up.set()

    monkeypatch.setattr(group_module, "answer", answer)
    monkeypatch.setattr(StreamCarrier, "_give_up", noted)
    summary = train(tmp_path, "streams", step_timeout=1.0)
    assert summary["ignored"] == {"late": 1}
    assert set(summary["refused"]) == {"timeout"}
    assert summary["refused"]["timeout"] >= sum(size > 0 for size in client_sizes(K)) - 2
