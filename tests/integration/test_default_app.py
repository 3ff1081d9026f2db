import json
import logging
import math
from pathlib import Path

import cloudpickle
import pytest
import torch
from flwr.app import ArrayRecord, Context, RecordDict
from flwr.clientapp import ClientApp
from safetensors.torch import load_file

from psl_flower.app import client_app, server_app
from psl_flower.app.datasets import load_arrays
from psl_flower.app.task import central_test, split_indices
from psl_flower.config import RunConfig
from psl_flower.errors import ConfigError
from psl_flower.grid import InProcessGrid

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(folder, num_nodes=4, clients=client_app.app, **config):
    """Run the default app in this process, return its configuration."""
    config = RunConfig(output_dir=str(folder), **config)
    grid = InProcessGrid(clients, num_nodes=num_nodes, run_config=config.as_run_config())
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=config.as_run_config())
    server_app.app(grid, context)
    return config


def records(folder, kind):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


@pytest.mark.curves
def test_the_defaults_learn_digits(tmp_path):
    config = run(tmp_path, num_nodes=6)
    rounds = records(tmp_path, "round")
    assert len(rounds) == 5
    assert all(r["num_examples"] == 1437 for r in rounds)
    assert 0.95 <= rounds[-1]["evaluate_serverapp"]["accuracy"] < 1
    steps = records(tmp_path, "step")
    assert len(steps) == 5 * 23
    assert {s["batch_size"] for s in steps} == {62, 63}
    assert sum(s["batch_size"] for s in steps) == 5 * 1437
    assert json.loads((tmp_path / "config.json").read_text())["learning-rate"] == config.learning_rate
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_all_clients_test_data_is_the_whole_test_split_and_the_saved_model_scores_the_same(tmp_path):
    config = run(tmp_path, num_nodes=3, num_server_rounds=1, batch_size=256, partition="mild")
    (only,) = records(tmp_path, "round")
    in_clients, on_server = only["evaluate_clientapp"], only["evaluate_serverapp"]
    assert in_clients["num_examples"] == 360
    assert in_clients["accuracy"] == pytest.approx(on_server["accuracy"])
    assert in_clients["loss"] == pytest.approx(on_server["loss"], rel=1e-5)
    saved = central_test(config)(1, ArrayRecord(load_file(tmp_path / "model.safetensors")))
    assert dict(saved) == pytest.approx(on_server)


def test_a_run_is_a_function_of_its_configuration(tmp_path):
    for name in ("a", "b"):
        run(tmp_path / name, num_server_rounds=1, batch_size=256, augment="crop-flip", partition="severe", num_nodes=8)
    run(
        tmp_path / "c",
        num_server_rounds=1,
        batch_size=256,
        augment="crop-flip",
        partition="severe",
        num_nodes=8,
        seed=1,
    )
    a, b, c = ([s["loss"] for s in records(tmp_path / name, "step")] for name in "abc")
    assert a == b
    assert a != c


class HandedOver(ClientApp):
    """The default ClientApp, unpickled anew for every message as in Flower's simulation."""

    def __call__(self, message, context):
        return cloudpickle.loads(cloudpickle.dumps(client_app.app))(message, context)


def test_data_is_loaded_once_in_a_process_however_many_messages_bring_the_app(tmp_path):
    load_arrays.cache_clear()
    split_indices.cache_clear()
    run(tmp_path, num_server_rounds=1, batch_size=1024, clients=HandedOver())
    assert load_arrays.cache_info().misses == 2  # the training and the test split
    assert split_indices.cache_info().misses == 2


@pytest.mark.parametrize(
    "config",
    [
        {"sampler": "fls", "partition": "severe", "num_nodes": 8},
        {"sampler": "fpls", "optimizer": "adam", "learning_rate": 0.001},
        {"cut": "stage3", "evaluate_every": 0},
        pytest.param({"model": "resnet18", "cut": "layer4"}, marks=pytest.mark.slow),
    ],
)
def test_other_choices_train_too(tmp_path, config):
    run(tmp_path, num_server_rounds=1, batch_size=512, **config)
    (only,) = records(tmp_path, "round")
    assert only["num_examples"] == 1437
    assert math.isfinite(only["loss"])
    assert bool(only["evaluate_clientapp"]) == (config.get("evaluate_every") != 0)


def test_a_batch_larger_than_the_data_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="got 2000 for 1437 examples"):
        run(tmp_path, batch_size=2000)


def test_a_cut_the_model_does_not_have_is_refused_before_any_message(tmp_path):
    with pytest.raises(ConfigError, match=r"layer2.*stage2"):
        run(tmp_path, cut="layer2")


def test_the_end_says_where_the_results_are(tmp_path):
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    server_app.log.addHandler(handler)
    try:
        run(tmp_path, num_server_rounds=1, batch_size=1024)
    finally:
        server_app.log.removeHandler(handler)
    assert any(str(tmp_path) in line for line in lines)


@pytest.mark.flower
def test_flwr_run_trains_on_the_simulation_as_in_one_process(superlink, tmp_path):
    choice = {"num_server_rounds": 1, "batch_size": 256, "partition": "severe"}
    run(tmp_path / "here", num_nodes=6, **choice)
    overrides = [f"output-dir='{tmp_path / 'there'}'", "num-server-rounds=1", "batch-size=256", "partition='severe'"]
    superlink.run(ROOT, num_supernodes=6, run_config=overrides, quiet=True)
    here, there = ([s["loss"] for s in records(tmp_path / name, "step")] for name in ("here", "there"))
    assert there == pytest.approx(here, rel=1e-4)
    assert len(there) == 6
