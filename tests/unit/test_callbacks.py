"""What callbacks hear, what loggers write, and that neither can harm a run."""

import csv
import json
import logging
import re
import struct
import sys

import pytest
import torch
from flower_runs import wait_until
from flwr.app import ArrayRecord
from support import load_partition

from psl_flower import InProcessGrid, ParallelSplitLearning, UniformGlobalSampler, split_client_app
from psl_flower.app.experiment import train_in_process
from psl_flower.callbacks import Callback, TensorBoardLogger, WandbLogger, make_loggers, tensorboard
from psl_flower.config import RunConfig
from psl_flower.errors import ConfigError
from psl_flower.failures import Failure, Kind
from psl_flower.records import RoundRecord, StepRecord, read_metrics
from psl_flower.strategy.recorder import RunRecorder
from psl_flower.strategy.summary import RunSummary

SUMMARY = {"steps_committed": 3}


def step(index, loss=1.0):
    return StepRecord(
        round=1,
        step=index,
        loss=loss,
        accuracy=0.5,
        deviation=None,
        batch_size=8,
        clients=2,
        bytes_sent=10,
        bytes_received=20,
        seconds_real=0.1,
    )


def a_round(number, **evaluations):
    return RoundRecord(
        round=number,
        loss=0.7,
        accuracy=0.5,
        deviation_mean=0.2,
        deviation_p95=0.3,
        deviation_weighted=0.2,
        num_examples=24,
        num_steps=3,
        num_clients=2,
        clients_per_step=2.0,
        bytes_sent=30,
        bytes_received=60,
        client_mix_mean=0.1,
        seconds_plan=0.0,
        seconds_real=0.3,
        seconds_simulated=None,
        **evaluations,
    )


class Listener(Callback):
    def __init__(self):
        self.heard = []

    def on_run_start(self, config):
        self.heard.append(("start", config["seed"]))

    def on_step(self, record):
        self.heard.append(("step", record.step))

    def on_round(self, record):
        self.heard.append(("round", record.round))

    def on_run_end(self, summary):
        self.heard.append(("end", summary))


def record_a_run(folder, *callbacks, config=None):
    with RunRecorder(folder, config or {"seed": 7}, callbacks=callbacks) as recorder:
        for i in range(3):
            recorder.step(step(i))
        recorder.progress(step(2), RunSummary(steps_committed=3).report())
        recorder.round(a_round(1, evaluate_serverapp={"accuracy": 0.6}))
        recorder.round(a_round(2, evaluate_clientapp={"loss": 0.4}, evaluate_serverapp={"accuracy": 0.8}))
        recorder.summary(SUMMARY)


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_callback_hears_everything_in_order():
    listener = Listener()
    record_a_run(None, listener)
    expected = [("start", 7), ("step", 0), ("step", 1), ("step", 2), ("round", 1), ("round", 2)]
    assert listener.heard == [*expected, ("end", {**SUMMARY, "completed": True})]


def test_a_callback_hears_that_a_run_failed():
    listener = Listener()
    with pytest.raises(RuntimeError, match="broken"), RunRecorder(None, {"seed": 1}, callbacks=[listener]):
        raise RuntimeError("broken")
    assert listener.heard == [("start", 1), ("end", {"completed": False})]


@pytest.mark.parametrize("where", ["on_run_start", "on_step", "on_progress", "on_round", "on_run_end"])
def test_a_callback_that_raises_is_dropped_with_one_warning_and_the_others_go_on(where, caplog, tmp_path):
    def fail(self, *args):
        calls.append(where)
        raise ValueError("no space left")

    calls, listener = [], Listener()
    broken = type("Broken", (Callback,), {where: fail})()
    with caplog.at_level(logging.WARNING, "flwr.psl_flower"):
        record_a_run(tmp_path, broken, listener)
    assert calls == [where]
    assert [r.getMessage() for r in caplog.records] == ["Broken failed and is not called again: no space left"]
    assert len(listener.heard) == 7
    assert len(rows(tmp_path / "steps.csv")) == 3


def test_what_is_no_callback_is_refused():
    with pytest.raises(ConfigError, match="Callback objects, got <function"):
        RunRecorder(None, {}, callbacks=[print_nothing])


def print_nothing(record):
    return None


def test_csv_and_jsonl_are_always_there_and_agree(tmp_path):
    record_a_run(tmp_path)
    steps, rounds = rows(tmp_path / "steps.csv"), rows(tmp_path / "rounds.csv")
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [int(row["step"]) for row in steps] == [r.step for r in records if isinstance(r, StepRecord)] == [0, 1, 2]
    assert steps[0]["deviation"] == ""
    assert [row["round"] for row in rounds] == ["1", "2"]
    assert [row["evaluate_metrics_serverapp/accuracy"] for row in rounds] == ["0.6", "0.8"]
    # a metric that the first round did not have
    assert [row["evaluate_metrics_clientapp/loss"] for row in rounds] == ["", "0.4"]
    assert [float(row["train_metrics_clientapp/loss"]) for row in rounds] == [r.loss for r in records[3:]]


def test_a_run_that_goes_on_leaves_every_line_once_and_callbacks_hear_the_whole_run(tmp_path):
    with RunRecorder(tmp_path, {"seed": 1}) as recorder:
        for i in range(2):
            recorder.step(step(i))
        position = recorder.position()
        recorder.step(step(2, loss=9.0))  # behind the checkpoint: made anew below
    listener = Listener()
    with RunRecorder(tmp_path, {"seed": 1}, position, [listener]) as recorder:
        recorder.step(step(2))
        recorder.round(a_round(1))
    assert [(r["step"], r["loss"]) for r in rows(tmp_path / "steps.csv")] == [("0", "1.0"), ("1", "1.0"), ("2", "1.0")]
    assert len(rows(tmp_path / "rounds.csv")) == 1
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line.get("step") for line in lines] == [0, 1, 2, None]
    assert [what for what, _ in listener.heard] == ["start", "step", "step", "step", "round", "end"]


# --- loggers by name -------------------------------------------------------------------------------------------------
def test_loggers_are_chosen_by_name_in_the_configuration(tmp_path):
    made = make_loggers(RunConfig(loggers="tensorboard, wandb").loggers, tmp_path)
    assert [type(logger) for logger in made] == [TensorBoardLogger, WandbLogger]
    assert make_loggers(RunConfig().loggers, tmp_path) == []
    with pytest.raises(ConfigError, match=r"loggers must be one of 'tensorboard', 'wandb', got 'tensorbord' \(did"):
        RunConfig(loggers="wandb,tensorbord")


@pytest.mark.parametrize(("package", "make"), [("tensorboard", TensorBoardLogger), ("wandb", WandbLogger)])
def test_a_logger_that_is_not_installed_names_what_to_install(package, make, monkeypatch, tmp_path):
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"needs {package}, which is not installed: .*'psl-flower\[{package}\]'"):
        make(tmp_path)


def test_tensorboard_shows_the_last_run_of_its_folder_only(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    record_a_run(None, TensorBoardLogger(tmp_path))
    record_a_run(None, TensorBoardLogger(tmp_path), config={"seed": 8})
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    accuracy = events.Scalars("evaluate_metrics_serverapp/accuracy")
    assert [(event.step, round(event.value, 4)) for event in accuracy][-1] == (3, 0.8)
    assert [event.step for event in events.Scalars("train_step/loss")] == [1, 2, 3]
    assert "train_metrics_clientapp/deviation_mean" in events.Tags()["scalars"]
    assert "train_step/deviation" not in events.Tags()["scalars"]  # not known


def test_tensorboard_shows_while_a_run_goes_on_who_is_slow_who_fails_and_where_the_time_goes(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    summary = RunSummary(steps_committed=40)
    summary.seconds.update(clients=3.0, wire=1.0)
    summary.client_seconds.update({7: 2.0, 3: 0.5})
    summary.client_examples.update({7: 100, 3: 100})
    summary.refuse({client: Failure(Kind.TIMEOUT, "no reply") for client in (3, 5)})
    with RunRecorder(None, {"seed": 7}, callbacks=[TensorBoardLogger(tmp_path)]) as recorder:
        recorder.progress(step(39, loss=0.5), summary.report())
        summary.excluded[9] = "raised KeyError"
        recorder.progress(step(40), summary.report())
    events = EventAccumulator(str(tmp_path))
    events.Reload()

    def first(tag):
        event = events.Scalars(tag)[0]
        return event.step, round(event.value, 4)

    assert first("now/loss") == (40, 0.5)
    assert (first("time/clients"), first("time/wire")) == ((40, 3.0), (40, 1.0))
    assert (first("slowest/client 7"), first("slowest/client 3")) == ((40, 20.0), (40, 5.0))  # ms an example
    assert (first(f"failures/{Kind.TIMEOUT.value}"), first("failing/client 5")) == ((40, 2.0), (40, 1.0))
    texts = sorted(tag for tag in events.Tags()["tensors"] if tag.endswith("/text_summary"))  # the page's order
    assert texts == ["faults and time/text_summary", "settings/text_summary"]
    assert events.Tensors(texts[1])[0].tensor_proto.string_val[0].decode() == "    seed = 7"
    told = [event.tensor_proto.string_val[0].decode() for event in events.Tensors(texts[0])]
    assert "| clients | 3.0 |\n| wire | 1.0 |" in told[0]
    assert "| slowest clients | ms an example |\n|---|---|\n| 7 | 20.00 |\n| 3 | 5.00 |" in told[0]
    assert "| timeout | 2 |" in told[0]
    assert ["| 9 | raised KeyError |" in text for text in told] == [False, True]
    pages = events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0].decode(errors="replace")
    tags = events.Tags()["scalars"]
    for pattern in (tag for charts in tensorboard._LAYOUT.values() for tags in charts.values() for tag in tags):
        assert pattern in pages
    assert all(
        any(re.fullmatch(p, tag) for charts in tensorboard._LAYOUT.values() for ps in charts.values() for p in ps)
        for tag in tags
    )


def test_wandb_writes_offline(tmp_path, monkeypatch, caplog):
    for name in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    for name in ("WANDB_SILENT", "WANDB__DISABLE_STATS"):
        monkeypatch.setenv(name, "true")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    for name in ("WANDB__SERVICE_WAIT", "WANDB_INIT_TIMEOUT"):  # 30 and 90 s else, and a busy machine's run has no log
        monkeypatch.setenv(name, "600")
    record_a_run(None, WandbLogger(tmp_path / "wandb", name="a-test"))
    assert [record.getMessage() for record in caplog.records if record.name == "flwr.psl_flower"] == []
    (run,) = (tmp_path / "wandb" / "wandb").glob("offline-run-*")
    (file,) = run.glob("*.wandb")
    # its service still writes when the run is finished here
    wait_until(lambda: any(record.HasField("exit") for record in records_of(file)), 120, lambda: f"the end of {file}")
    found = [
        {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in records_of(file)
        if record.HasField("history")
    ]
    assert [values["train_step/loss"] for values in found if "train_step/loss" in values] == [1.0, 1.0, 1.0]
    assert [v["step"] for v in found if "evaluate_metrics_serverapp/accuracy" in v] == [3, 3]
    assert [v.get("evaluate_metrics_clientapp/loss") for v in found if "round" in v] == [None, 0.4]


def records_of(path):
    """Return the records of a file of wandb's own format, as far as it is written.

    A header of 7 bytes, then chunks of records as LevelDB's log has them: 4 bytes checksum, 2 bytes length, 1 byte that
    is 1 or 4 where a record ends.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, content, found = path.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        begin, at = at + 7, at + 7 + length
        if at > len(data):
            break
        content += data[begin:at]
        if kind in (1, 4):
            found.append(Record.FromString(content))
            content = b""
    return found


# --- in a training ---------------------------------------------------------------------------------------------------
def test_the_default_app_logs_where_it_is_told_to_and_callbacks_hear_the_training(tmp_path):
    config = RunConfig(
        num_server_rounds=1, batch_size=720, evaluate_every=0, loggers="tensorboard", output_dir=str(tmp_path)
    )
    train_in_process(config, 2)
    assert list((tmp_path / "tensorboard").glob("events.*"))
    assert len(rows(tmp_path / "steps.csv")) == 2
    listener = Listener()
    strategy = ParallelSplitLearning(
        strategy_model(),
        cut="1",
        sampler=UniformGlobalSampler(batch_size=200),
        callbacks=[listener],
        run_config={"seed": 5},
    )
    app = split_client_app(strategy_model, cut="1", data_fn=load_partition)
    strategy.start(InProcessGrid(app, num_nodes=2), ArrayRecord(strategy_model().state_dict()), num_rounds=2)
    assert listener.heard[0] == ("start", 5)
    assert [what for what, _ in listener.heard].count("step") == 6
    assert [number for what, number in listener.heard if what == "round"] == [1, 2]
    assert listener.heard[-1][1]["completed"]


def strategy_model():
    return torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.Flatten(), torch.nn.Linear(32, 4))
