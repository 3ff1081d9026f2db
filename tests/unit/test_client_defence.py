"""What a client refuses that its server asks: told in a sentence in its log, and the client goes on."""

import json
import logging
import struct
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from support import CUT, load_partition, tiny_resnet

from psl_flower import InProcessGrid, split_client_app, split_module
from psl_flower.client.process import forget_runs, run_state
from psl_flower.exchange import MessageCarrier
from psl_flower.exchange.codec import encode_request
from psl_flower.exchange.frames import Frame
from psl_flower.exchange.limits import MAX_HEADER_BYTES
from psl_flower.exchange.records import FRAME, content_to_frame, frame_to_content
from psl_flower.exchange.streams import StreamCarrier
from psl_flower.flower import ERROR_CLIENT_APP
from psl_flower.protocol import ATTACH, DESCRIBE, Leaf, Orders, Request, Weights
from psl_flower.protocol import Kind as LeafKind

NODE = 2


HALF = split_module(tiny_resnet(), CUT)[0]


def weights(change=lambda name, tensor: tensor, version="v0"):
    parameters = {name: change(name, p.detach().clone()) for name, p in HALF.named_parameters()}
    return {"head": Weights(parameters, {}, version, "c0")}


def orders(start=0, count=4, **more):
    columns = {"clients": [0], "starts": [start], "counts": [count]}
    return Orders(**{name: np.array(column) for name, column in columns.items()}, **more)


def request(**changes):
    return replace(Request(stage="forward", nodes=(NODE,), orders=orders(), weights=weights()), **changes)


def by_class(starts, counts):
    tables = {"class_starts": np.array([starts]), "class_counts": np.array([counts])}
    return orders(count=sum(counts), **tables)


def spoiled(value):
    def change(name, tensor):
        if name == "stem.bias":
            tensor[1] = value
        return tensor

    return weights(change, version="spoiled")


REFUSED = {
    "weights not finite": (request(weights=spoiled(float("nan"))), "the server's weights are not finite: 'stem.bias'"),
    "weights infinite": (request(weights=spoiled(float("-inf"))), "the server's weights are not finite: 'stem.bias'"),
    "weights of another shape": (request(weights=weights(lambda n, t: t[:1], "v1")), "shape of 'layer1.conv1.weight'"),
    "weights of whole numbers": (request(weights=weights(lambda n, t: t.long(), "v2")), "dtype of '"),
    "weights of another name": (
        request(weights={"head": Weights({"evil": torch.ones(3)}, {}, "v3", "c3")}),
        "names of the client half differ",
    ),
    "no weights": (request(weights={}), "needs the weights of head"),
    "more than it has": (request(orders=orders(count=10**9)), "asked for 1000000000 examples from 0 on, of 200"),
    "beyond the end": (request(orders=orders(start=2**62)), "asked for 4 examples from 4611686018427387904 on, of 200"),
    "classes it has not": (request(orders=by_class([0] * 5, [1, 1, 1, 1, 1])), "examples of class "),
    "test examples": (request(orders=orders(test=True)), "asked for 4 test examples from 0 on, of 0"),
    "inputs nobody takes": (
        request(inputs={"gradient": Leaf(LeafKind.ROWS, torch.ones(4, 2))}),
        "stage 'forward' takes {}",
    ),
}


@pytest.fixture
def app():
    forget_runs()
    return split_client_app(tiny_resnet, cut=CUT, data_fn=load_partition, device="cpu")


@pytest.fixture(params=[MessageCarrier, StreamCarrier])
def carrier(app, request):
    with request.param(InProcessGrid(app, num_nodes=2)) as carrier:
        works(carrier)
        yield carrier
        works(carrier)  # after whatever was asked of it


def works(carrier):
    reply = carrier.exchange(request(), 60)
    assert not reply.failures, reply.failures
    assert reply.parts[0].outputs["activations"].value[0].shape == (4, 4, 6, 6)


@pytest.mark.parametrize("what", REFUSED)
def test_what_a_server_may_not_ask_is_refused_in_a_sentence(carrier, what, caplog):
    asked, why = REFUSED[what]
    reply = carrier.exchange(asked, 60)
    assert why in str(reply.failures[NODE])
    (told,) = [record.getMessage() for record in caplog.records if "Refused what the server asks" in record.message]
    assert why in told
    assert "Traceback" not in caplog.text
    assert not any(record.exc_info for record in caplog.records if record.levelno >= logging.WARNING)


def test_who_asks_again_and_again_does_not_fill_the_log(carrier, caplog):
    for _ in range(60):
        assert carrier.exchange(REFUSED["no weights"][0], 60).failures
    assert caplog.text.count("Refused what the server asks") == 20


def test_configurations_and_weights_of_other_names_do_not_fill_the_memory(carrier):
    state = next(iter(run_state(carrier._grid.run.run_id) for _ in [0]))
    for i in range(200):
        part = {f"part {i}": Weights({}, {}, f"v{i}", "c"), **weights()}
        carrier.exchange(request(config={"number": i}, weights=part), 60)
    assert len(state.clients) <= 2
    assert len(state.weights._kept) <= 128


# --- messages that are no requests -----------------------------------------------------------------------------------
def frame_of(**changes):
    frame, _ = encode_request(request(), 0, sent={})
    return Frame({**json.loads(json.dumps(frame.header)), **changes}, frame.buffers)


NO_REQUESTS = {
    "empty": (lambda: RecordDict(), "expected a frame, got records named nothing"),
    "not JSON": (lambda: header(b"{"), "the header is not JSON"),
    "not a number": (lambda: header(b'[[],{"number":NaN}]'), "the header is not JSON: NaN is not JSON"),
    "a long header": (lambda: header(b" " * (MAX_HEADER_BYTES + 1)), "is too long, the most is"),
    "many buffers": (lambda: header(b"[[" + b"0," * 2**16 + b"0],{}]"), "the lengths of at most 65536 buffers"),
    "two clients": (lambda: frame_to_content(two_clients()), "a message is for one client, this one names 2"),
    "a wait of a year": (
        lambda: frame_to_content(frame_of(delays=[3e7])),
        "expected at most 86400 seconds",
    ),
    "no orders": (lambda: frame_to_content(frame_of(orders=None)), "needs orders"),
}


def header(text):
    data = struct.pack("<I4xQ", len(text), 0) + text
    return RecordDict({"frame": ArrayRecord({"frame": Array("uint8", (len(data),), FRAME, data)})})


def two_clients():
    both = Orders(clients=np.arange(2), starts=np.zeros(2, int), counts=np.full(2, 2))
    return encode_request(request(nodes=(2, 3), orders=both), 0, sent={})[0]


@pytest.mark.parametrize("what", NO_REQUESTS)
def test_a_message_that_is_no_request_is_answered_with_an_error_in_a_sentence(app, what, caplog):
    make, why = NO_REQUESTS[what]
    (reply,) = InProcessGrid(app, 2).send_and_receive([Message(make(), NODE, "train.forward")])
    assert reply.error.code == ERROR_CLIENT_APP
    assert reply.error.reason.startswith("refused: ")
    assert why in reply.error.reason
    assert why in caplog.text
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize("stage", ["head_forward", "__init__"])
def test_a_stage_that_its_method_does_not_have_is_refused_whatever_the_message_is_called(app, stage, caplog):
    content = frame_to_content(frame_of(stage=stage))
    (reply,) = InProcessGrid(app, 2).send_and_receive([Message(content, NODE, "train.forward")])
    why = f"this client was built for method 'parallel', which has no stage '{stage}'"
    assert why in content_to_frame(reply.content).header["failures"][str(NODE)]["detail"]
    assert f"Refused what the server asks of node {NODE}: {why}" in caplog.text


@pytest.mark.parametrize("content", [RecordDict(), RecordDict({"attach": ConfigRecord({"address": 3})})])
def test_an_invitation_that_is_none_is_refused_in_a_sentence(app, content, caplog):
    (reply,) = InProcessGrid(app, 2).send_and_receive([Message(content, NODE, ATTACH)])
    assert "refused: an attach message needs" in reply.error.reason
    assert "Refused what the server asks of node 2: an attach message needs" in caplog.text


def test_only_its_own_node_is_described_whatever_the_message_names(app):
    content = frame_to_content(encode_request(Request(stage=DESCRIBE, nodes=(99,)), 0, sent={})[0])
    (reply,) = InProcessGrid(app, 2).send_and_receive([Message(content, NODE, "query.describe")])
    assert content_to_frame(reply.content).header["descriptions"]["99"]["partition-id"] == 0


# --- streams that carry no requests ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("frame", "why"),
    [
        (Frame({"kind": "obey"}), "a frame of unknown kind 'obey'"),
        (Frame({"kind": "request", "number": 1}), "the server sent something wrong: expected 'nodes'"),
        (Frame({"kind": "adopt", "clients": "all"}), "to adopt clients takes the node id"),
    ],
)
def test_frames_that_are_no_requests_end_the_stream_in_a_sentence(app, frame, why, caplog):
    with StreamCarrier(InProcessGrid(app, num_nodes=2)) as carrier:
        works(carrier)
        (connection,) = carrier._endpoint.connections()
        connection.send(lambda: frame)
        carrier.exchange(request(), 60)  # which may find that it has ended
        works(carrier)  # over a new one
        end = time.monotonic() + 60
        while "The stream to the server ended: " not in caplog.text and time.monotonic() < end:
            time.sleep(0.01)
    assert "The stream to the server ended: " in caplog.text
    assert why in caplog.text
    assert "Traceback" not in caplog.text
