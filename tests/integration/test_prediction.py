"""Predictions for the clients' data equal the whole model's; those of a U shape are the clients' own."""

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord
from support import CUT, client_data, sgd, tiny_resnet_64
from test_u_shaped import u_net
from torch.utils.data import TensorDataset

from psl_flower import (
    Cut,
    InProcessGrid,
    PadTexts,
    ParallelSplitLearning,
    SplitClient,
    UniformGlobalSampler,
    split_client_app,
    split_module,
)
from psl_flower.client.part import ClientPart
from psl_flower.client.process import RunState
from psl_flower.client.runtime import answer
from psl_flower.errors import ConfigError, StepError
from psl_flower.methods import UShapedSplit
from psl_flower.protocol import Kind, Leaf, Orders, Request, Weights
from psl_flower.strategy.prediction import by_client

K = 3
MODELS = {None: (tiny_resnet_64, {"cut": CUT}), "tail": (u_net, {"cut": "body", "tail": "tail"})}


def load(context, config=None):
    """Return data of which nothing is known but the inputs: labels are -1."""
    k = context.node_config["partition-id"]
    data = client_data(k, K, torch.float64)
    images = data.tensors[0][: 20 + k]
    test = TensorDataset(images, torch.full((len(images),), -1))
    return data, data if config and config.get("predict-on") == "train" else test


def predict(tail=None, app_options=None, grid_options=None, arrays=None, data_fn=load, **options):
    """Return the predictions, by client; for some options of `predict` too."""
    model_fn, cuts = MODELS[tail]
    asked = {name: options.pop(name) for name in ("on_batch", "train_config") if name in options}
    both = {"method": options.pop("method", None), "secure_aggregation": options.pop("secure_aggregation", False)}
    app_options = {"optimizer": sgd, **(app_options or {})}
    app = split_client_app(model_fn, **cuts, **both, data_fn=data_fn, device="cpu", **app_options)
    strategy = ParallelSplitLearning(model_fn(), **cuts, **both, device="cpu", min_available_nodes=K, **options)
    given = ArrayRecord(model_fn().state_dict()) if arrays is None else arrays
    return strategy.predict(InProcessGrid(app, K), given, **asked)


@torch.no_grad()
def whole(inputs, tail=None):
    return MODELS[tail][0]().eval()(inputs)


def partition(context):
    return context.node_config["partition-id"]


def inputs_of(client):
    return client_data(client, K, torch.float64).tensors[0][: 20 + client]


@pytest.mark.parametrize(
    "options",
    [
        {"transport": "messages"},
        {"transport": "streams"},
        {"transport": "messages", "method": "splitfed-v1"},
        {"transport": "streams", "method": "splitfed-v2"},
        {"transport": "streams", "secure_aggregation": True},
        {"transport": "messages", "method": "sequential", "evaluate_batch_size": 1000},
    ],
)
def test_outputs_are_the_whole_models_for_each_example(options):
    found = predict(**{"evaluate_batch_size": 24, **options})
    assert list(found) == [0, 1, 2]
    for client, prediction in found.items():
        assert prediction.rows.tolist() == list(range(20 + client))
        torch.testing.assert_close(prediction.outputs, whole(inputs_of(client)), rtol=0, atol=1e-12)
        assert prediction.labels.tolist() == [-1] * (20 + client)


def test_batches_are_told_one_by_one_and_nothing_is_kept():
    batches = []
    found = predict(evaluate_batch_size=9, on_batch=lambda client, prediction: batches.append((client, prediction)))
    assert found == {}
    assert all(0 < len(prediction.rows) <= 9 for _, prediction in batches)
    for client in range(K):
        own = [prediction for of, prediction in batches if of == client]
        assert np.concatenate([each.rows for each in own]).tolist() == list(range(20 + client))
        outputs = torch.cat([each.outputs for each in own])
        torch.testing.assert_close(outputs, whole(inputs_of(client)), rtol=0, atol=1e-12)


def test_a_trained_model_predicts_on_training_data_too():
    model_fn, cuts = MODELS[None]
    app = split_client_app(model_fn, **cuts, data_fn=lambda context, config: load(context, config)[0], device="cpu")
    strategy = ParallelSplitLearning(
        model_fn(), **cuts, sampler=UniformGlobalSampler(40), optimizer=sgd, device="cpu", min_available_nodes=K
    )
    result = strategy.start(InProcessGrid(app, K), ArrayRecord(model_fn().state_dict()), num_rounds=1)
    found = predict(arrays=result, train_config=ConfigRecord({"predict-on": "train"}))
    model = model_fn().eval()
    model.load_state_dict(result.arrays.to_torch_state_dict())
    for client, prediction in found.items():
        images, labels = client_data(client, K, torch.float64).tensors
        with torch.no_grad():
            torch.testing.assert_close(prediction.outputs, model(images), rtol=0, atol=1e-12)
        assert torch.equal(prediction.labels, labels)


def test_rows_say_which_examples_could_be_read():
    class Torn(torch.utils.data.Dataset):
        def __init__(self, data, torn):
            self.data, self.torn = data, torn

        def __len__(self):
            return len(self.data)

        def __getitem__(self, i):
            if i in self.torn:
                raise OSError("the file ends early")
            return self.data[i]

    def data_fn(context):
        train, test = load(context)
        return train, Torn(test, {0, 7, 8}) if context.node_config["partition-id"] == 1 else test

    found = predict(data_fn=data_fn, evaluate_batch_size=12)
    rows = found[1].rows
    assert rows.tolist() == [i for i in range(21) if i not in (0, 7, 8)]
    torch.testing.assert_close(found[1].outputs, whole(inputs_of(1)[rows]), rtol=0, atol=1e-12)
    assert found[2].rows.tolist() == list(range(22))


UNLABELLED = {
    "a tuple of one": TensorDataset,
    "alone": list,
    "a dict": lambda images: [{"x": image} for image in images],
}


@pytest.mark.parametrize(
    ("rows", "tail", "transport"),
    [
        ("a tuple of one", None, "messages"),
        ("alone", None, "streams"),
        ("a dict", None, "streams"),
        ("alone", "tail", "messages"),
    ],
)
def test_data_without_labels_are_predicted_and_not_evaluated(rows, tail, transport):
    def data_fn(context):
        return client_data(partition(context), K, torch.float64), UNLABELLED[rows](inputs_of(partition(context)))

    given = {"on_predict": lambda outputs, rows, context: outputs} if tail else None
    found = predict(tail, given, data_fn=data_fn, evaluate_batch_size=24, transport=transport)
    for client, prediction in found.items():
        assert prediction.labels is None
        torch.testing.assert_close(prediction.outputs, whole(inputs_of(client), tail), rtol=0, atol=1e-12)

    model_fn, cuts = MODELS[tail]
    app = split_client_app(model_fn, **cuts, data_fn=data_fn, device="cpu")
    strategy = ParallelSplitLearning(model_fn(), **cuts, device="cpu", transport=transport)
    with pytest.raises((ConfigError, StepError), match=r"the test data have no labels, .*evaluate_every=0"):
        strategy.start(InProcessGrid(app, K), ArrayRecord(model_fn().state_dict()), num_rounds=1)


@pytest.mark.parametrize(
    "options",
    [{"transport": "messages"}, {"transport": "streams", "secure_aggregation": True}, {"evaluate_batch_size": 10}],
)
def test_in_a_u_shape_outputs_are_the_clients_to_keep_or_to_give(options):
    kept = {}

    def keep(outputs, rows, context):
        kept.setdefault(context.node_config["partition-id"], {}).update(zip(rows.tolist(), outputs, strict=True))

    found = predict("tail", {"on_predict": keep}, **options)
    for client in range(K):
        assert found[client].outputs is None
        assert found[client].labels is None
        assert found[client].rows.tolist() == sorted(kept[client]) == list(range(20 + client))
        outputs = torch.stack([kept[client][row] for row in found[client].rows.tolist()])
        torch.testing.assert_close(outputs, whole(inputs_of(client), "tail"), rtol=0, atol=1e-12)

    found = predict("tail", {"on_predict": lambda outputs, rows, context: {"class": outputs.argmax(1)}}, **options)
    for client in range(K):
        assert torch.equal(found[client].outputs["class"], whole(inputs_of(client), "tail").argmax(1))
        assert found[client].labels is None


def test_who_may_have_outputs_is_said():
    with pytest.raises(StepError, match=r"(?s)prediction.*the model's outputs are this client's.*on_predict"):
        predict("tail")
    with pytest.raises(StepError, match="a batch of 20 gave 1"):
        predict("tail", {"on_predict": lambda outputs, rows, context: outputs.mean(0, keepdim=True)})
    with pytest.raises(StepError, match=r"expected (predicted|nothing) as of .*all clients must give it, .*on_predict"):
        predict("tail", {"on_predict": lambda outputs, rows, context: None if partition(context) else outputs})
    with pytest.raises((ConfigError, StepError), match=r"on_predict must return rows for every batch|all clients must"):
        predict("tail", {"on_predict": lambda outputs, rows, _: outputs if rows[0] else None}, evaluate_batch_size=30)
    with pytest.raises(ConfigError, match=r"on_predict must be a function of .* for a model with a tail"):
        predict(None, {"on_predict": lambda outputs, rows, context: outputs})
    with pytest.raises(ConfigError, match=r"on_predict must be a function.*got 'keep'"):
        predict("tail", {"on_predict": "keep"})


def test_outputs_for_training_data_are_not_told_to_a_server_that_asks():
    """It could otherwise ask for what `on_predict` tells of test examples, row by row of other data."""
    head, _, tail = split_module(u_net(), "body", tail="tail")
    state = RunState()
    state.parts = {name: ClientPart(name, part, torch.device("cpu")) for name, part in (("head", head), ("tail", tail))}
    one = np.ones(1, np.int64)
    request = Request(
        stage="tail_predict",
        nodes=(5,),
        orders=Orders(clients=one, starts=0 * one, counts=one),
        weights={name: Weights({}, {}, "1", "1") for name in ("head", "tail")},
        inputs={"outputs": Leaf(Kind.ROWS, (torch.zeros(1, 6),))},
    )
    reply = answer(UShapedSplit(), state, lambda node, config: SplitClient(client_data(0, K)), request)
    assert "is for test data only" in reply.failures[5].detail


def test_texts_of_many_lengths_end_in_zeros_and_in_labels_that_do_not_count():
    clients = np.array([1, 4])
    batches = []
    for start, length in ((0, 3), (2, 5)):
        orders = Orders(clients=clients, starts=np.array([start] * 2), counts=np.array([2, 1]), test=True)
        batches.append((orders, {"logits": torch.ones(3, length, 2)}, torch.ones(3, length, dtype=torch.long)))
    found = by_client(batches)
    assert found[1].rows.tolist() == [0, 1, 2, 3]
    assert found[4].rows.tolist() == [0, 2]
    assert found[1].outputs["logits"].sum((1, 2)).tolist() == [6, 6, 10, 10]
    assert found[1].labels.tolist()[0] == [1, 1, 1, -100, -100]


class Tagger(torch.nn.Module):
    """Says something of each token, of those it may look at; texts have any length, as the cut's example tells."""

    def __init__(self):
        super().__init__()
        self.embed, self.mix, self.tags = torch.nn.Embedding(30, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 3)

    def forward(self, input_ids, attention_mask):
        if input_ids.ndim != 2:
            raise ValueError("texts are rows of tokens")
        seen = attention_mask[..., None].to(torch.float64)
        hidden = self.mix(torch.tanh(self.embed(input_ids))) * seen
        return self.tags(torch.tanh(hidden + hidden.sum(1, keepdim=True)))


def tagger():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Tagger().double()


def texts(client):
    """Return texts of one to nine tokens; the longest is another client's in most batches."""
    lengths = np.random.default_rng(client).integers(1, 6, 5 + client) + 2 * client
    return [{"input_ids": list(range(1, n + 1)), "labels": [0] * n} for n in lengths]


@pytest.mark.parametrize(("tail", "transport"), [(None, "streams"), ("tags", "streams"), ("tags", "messages")])
def test_texts_of_many_lengths_are_as_long_as_the_longest(tail, transport):
    example = {name: torch.ones(2, 4, dtype=torch.long) for name in ("input_ids", "attention_mask")}
    cut, kept = Cut("mix", example=example), {}

    def keep(outputs, rows, context):
        kept.update({(partition(context), row): len(each) for row, each in zip(rows.tolist(), outputs, strict=True)})
        return {"tags": outputs, "best": outputs.argmax(2)}

    app = split_client_app(
        tagger,
        cut=cut,
        tail=tail,
        data_fn=lambda context: (texts(partition(context)), texts(partition(context))),
        collate_fn=PadTexts(0),
        on_predict=keep if tail else None,
        device="cpu",
    )
    strategy = ParallelSplitLearning(
        tagger(), cut=cut, tail=tail, device="cpu", min_available_nodes=K, evaluate_batch_size=6, transport=transport
    )
    found = strategy.predict(InProcessGrid(app, K), ArrayRecord(tagger().state_dict()))
    model = tagger().eval()
    for client in range(K):
        outputs = found[client].outputs["tags"] if tail else found[client].outputs
        for row, text in enumerate(texts(client)):
            ids = torch.tensor([text["input_ids"]])
            with torch.no_grad():
                alone = model(ids, torch.ones_like(ids))[0]
            torch.testing.assert_close(outputs[row, : len(alone)], alone, rtol=0, atol=1e-12)
            if tail:  # what is beyond a client's own batch are zeros
                assert not outputs[row, kept[client, row] :].any()
                assert torch.equal(found[client].outputs["best"][row, : len(alone)], alone.argmax(1))
                assert not found[client].outputs["best"][row, kept[client, row] :].any()
    assert any(n < outputs.shape[1] for n in kept.values()) == bool(tail)
