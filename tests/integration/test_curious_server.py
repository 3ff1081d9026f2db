"""A server that keeps every byte it receives, and looks for labels in them.

In the U shape it finds none, in whatever form. What it has all the same, and what no test can take away: the gradients
at the body's outputs, which are computed from labels and point to groups of like ones, and with few outputs and the
weights of the tail at hand may be solved for them (see docs/privacy.md). It must follow the protocol, too.
"""

import functools

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord
from torch import nn
from torch.utils.data import TensorDataset

from psl_flower import InProcessGrid, ParallelSplitLearning, SplitModel, UniformGlobalSampler, split_client_app
from psl_flower.audit.recording import Recording, RecordingGrid, witness
from psl_flower.client import runtime
from psl_flower.data import Batch, checksum
from psl_flower.exchange.streams import connection
from psl_flower.privacy import GaussianNoise

K, SIZE, BATCH, SEED = 3, 24, 18, 5
MSE = nn.functional.mse_loss


class Halves(SplitModel):
    def __init__(self):
        super().__init__(client=nn.Linear(4, 8), server=nn.Sequential(nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 1)))


class Thirds(SplitModel):
    def __init__(self):
        super().__init__(client=nn.Linear(4, 8), server=nn.Sequential(nn.Linear(8, 8), nn.SiLU()), tail=nn.Linear(8, 1))


def targets(client, part):
    """Return random numbers of 53 bits, from 1 to 2."""
    rng = np.random.default_rng([client, part])
    return np.ldexp(rng.integers(2**52, 2**53, SIZE).astype(float), -52)


def data(context):
    client = context.node_config["partition-id"]
    inputs = torch.from_numpy(np.random.default_rng(client).normal(size=(2, SIZE, 4)))
    return tuple(TensorDataset(inputs[i], torch.from_numpy(targets(client, i))[:, None]) for i in (0, 1))


# --- what it receives ------------------------------------------------------------------------------------------------
class Ears(InProcessGrid):
    """Keeps the bytes of what comes back by message."""

    def __init__(self, client_app):
        super().__init__(client_app, K)
        self.heard = []

    def _answer(self, message, context):
        reply = super()._answer(message, context)
        for record in reply.content.values():
            for value in record.values():
                self.heard.append(value if isinstance(value, bytes) else getattr(value, "data", str(value).encode()))
        return reply


def bytes_received(model_class, transport, monkeypatch, wire_dtype="float32"):
    """Train and evaluate; return all bytes that the server has received."""
    streamed = []

    class Listening(connection.Decoder):
        def feed(self, chunk):
            if self._open is not None:
                streamed.append(chunk[16:])
            return super().feed(chunk)

        def _begin(self, body):  # of a frame by the stream, or of one in shared memory
            streamed.append(bytes(body))
            return super()._begin(body)

    monkeypatch.setattr(connection, "Decoder", Listening)
    u_shaped = model_class is Thirds
    torch.manual_seed(0)
    model = model_class().double()
    loss = {"loss": MSE, "classification": False}
    app = split_client_app(
        lambda: model_class().double(),
        data_fn=data,
        method="u-shaped" if u_shaped else "parallel",
        device="cpu",
        **(loss if u_shaped else {}),
    )
    strategy = ParallelSplitLearning(
        model,
        method="u-shaped" if u_shaped else "parallel",
        sampler=UniformGlobalSampler(BATCH, seed=SEED),
        transport=transport,
        min_available_nodes=K,
        device="cpu",
        **({} if u_shaped else loss),
    )
    grid = Ears(app)
    result = strategy.start(grid, ArrayRecord(model.state_dict()), num_rounds=2)
    assert result.evaluate_metrics_clientapp[2]["num_examples"] == K * SIZE
    received = b"\0".join([*map(bytes, grid.heard), b"".join(streamed)])
    assert len(received) > 20_000
    return received


# --- what it looks for -----------------------------------------------------------------------------------------------
def cast(values, dtype):
    """Return the bytes of each value in a format."""
    if dtype == "bfloat16":
        words = torch.from_numpy(values).bfloat16().view(torch.int16).numpy()
        return words[:, None].view(np.uint8)
    if dtype[1] == "i":  # as a fixed-point number
        bits = 8 * int(dtype[2]) - 4
        return np.ldexp(values, bits - 2).astype(dtype)[:, None].view(np.uint8)
    return values.astype(dtype)[:, None].view(np.uint8)


DTYPES = ("<f8", ">f8", "<f4", ">f4", "<f2", ">f2", "bfloat16", "<i8", ">i8", "<i4", ">i4", "<i2", ">i2")


def forms(values, count):
    """Yield what a mean squared error of `count` examples makes of labels by itself, whatever the outputs are."""
    for scale in (1.0, 1 / count, 2.0, 2 / count):
        yield scale * values
        yield -scale * values
    yield values**2
    yield values**2 / count
    yield 1 + values
    yield 1 - values


def patterns(values, counts):
    """Return all that labels look like, as words of 8 bytes: some that are drawn one after the other, where shorter.

    So a word that is found is no accident: there are 2^64.
    """
    found = []
    for count in counts:
        for form in forms(values, count):
            for dtype in DTYPES:
                each = cast(form, dtype)
                size = each.shape[1]
                flat = np.ascontiguousarray(each).reshape(-1)
                starts = np.arange(0, len(flat) - 7, size)
                found.append(np.stack([flat[s : s + 8] for s in starts]).view("<u8")[:, 0])
    return np.unique(np.concatenate(found))


def found_in(received, words):
    """Return how many of the words are somewhere among the bytes."""
    everything = [np.frombuffer(received[i : i + (len(received) - i) // 8 * 8], "<u8") for i in range(8)]
    return int(np.isin(words, np.unique(np.concatenate(everything))).sum())


@functools.cache
def all_words():
    """Return what to look for: the labels of each client in the orders in which they are drawn, and as text."""
    words = []
    for client in range(K):
        train, test = targets(client, 0), targets(client, 1)
        orders = [np.random.default_rng([SEED, epoch, client]).permutation(SIZE) for epoch in (0, 1)]
        for values in (train, test, *(train[order] for order in orders)):
            words.append(patterns(values, (BATCH, K * SIZE, SIZE, *range(1, BATCH))))
            text = [f"{value:.15f}"[2:10].encode() for value in values]
            words.append(np.array([int.from_bytes(t, "little") for t in text], dtype="<u8"))
    return np.unique(np.concatenate(words))


@pytest.mark.parametrize("transport", ["messages", "streams"])
def test_in_the_u_shape_no_label_is_among_the_bytes_received(transport, monkeypatch):
    words = all_words()
    assert len(words) > 100_000
    assert found_in(bytes_received(Thirds, transport, monkeypatch), words) == 0


@pytest.mark.parametrize("transport", ["messages", "streams"])
def test_in_the_plain_method_all_are(transport, monkeypatch):
    received = bytes_received(Halves, transport, monkeypatch)
    for client in range(K):
        for part in (0, 1):
            words = np.ascontiguousarray(cast(targets(client, part), "<f8")).reshape(-1).view("<u8")
            assert found_in(received, words) == SIZE


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_label_in_disguise_would_be_found(dtype):
    values = targets(1, 0)[np.random.default_rng([SEED, 1, 1]).permutation(SIZE)]
    noise = np.random.default_rng(0).bytes(10_001)
    for form in forms(values[6:14], BATCH):
        hidden = noise[:777] + np.ascontiguousarray(cast(form, dtype)).tobytes() + noise[777:]
        assert found_in(hidden, patterns(values, (BATCH,))) >= 2
    assert found_in(noise, all_words()) == 0


# --- what it tries ---------------------------------------------------------------------------------------------------
def tagged(monkeypatch=None):
    """Train for a round with labels told by chance; return the tags of batches of one example, and what those are."""
    if monkeypatch is not None:  # as if the tag were a checksum that all can compute
        monkeypatch.setattr(runtime, "batch_tags", lambda checksums, orders, secrets: np.array(checksums))
    recording = Recording()
    app = split_client_app(
        lambda: Halves().double(),
        data_fn=data,
        client_class=witness(recording),
        device="cpu",
        defences=[GaussianNoise(5.0)],
    )
    strategy = ParallelSplitLearning(
        Halves().double(),
        sampler=UniformGlobalSampler(2, seed=SEED),
        transport="messages",
        min_available_nodes=K,
        device="cpu",
        evaluate_every=0,
        loss=MSE,
        classification=False,
    )
    strategy.start(RecordingGrid(app, K, recording), ArrayRecord(Halves().double().state_dict()), num_rounds=1)
    tags = [(each.tag, each.order) for each in recording.exchanges if each.tag is not None and each.order.count == 1]
    assert len(tags) > K
    return [(tag, recording.inputs(order), recording.labels(order)) for tag, order in tags]


def named(tags):
    """Return of how many batches the tag names the label, to who knows the inputs and tries all labels there are."""
    every = np.concatenate([targets(client, 0) for client in range(K)])
    right = 0
    for tag, inputs, label in tags:
        tried = {checksum(Batch(inputs, torch.tensor([[y]]), 1)): y for y in every}
        right += float(label) in {tried.get(half) for half in (tag, tag >> 32, tag & 0xFFFFFFFF)}
    return right


def test_who_knows_the_inputs_reads_no_label_from_the_tag_of_a_batch(monkeypatch):
    assert named(tagged()) == 0
    open_to_all = tagged(monkeypatch)
    assert named(open_to_all) == len(open_to_all)
