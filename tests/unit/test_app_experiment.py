import logging

import numpy as np
import pytest

from psl_flower.app.experiment import Progress, train_in_process
from psl_flower.config import RunConfig
from psl_flower.errors import ConfigError


def config(folder, **values):
    return RunConfig(batch_size=512, num_server_rounds=2, evaluate_every=0, output_dir=str(folder), **values)


@pytest.mark.curves
def test_a_training_is_what_the_run_wrote_and_what_the_server_tested(tmp_path):
    told = []
    training = train_in_process(config(tmp_path), 3, lambda epoch, accuracy: told.append((epoch, accuracy)))
    assert [epoch for epoch, _ in told] == [0, 1, 2]
    assert training.accuracy.tolist() == [accuracy for _, accuracy in told]
    assert [record["round"] for record in training.rounds] == [1, 2]
    assert training.rounds[1]["evaluate_serverapp"]["accuracy"] == training.accuracy[2]
    assert [(step["round"], step["step"]) for step in training.steps] == [(r, s) for r in (1, 2) for s in range(3)]
    assert all(0.05 <= accuracy <= 1 for accuracy in training.accuracy)
    assert (tmp_path / "curves.png").exists()


def test_simulated_seconds_follow_the_configured_delays(tmp_path):
    training = train_in_process(config(tmp_path, delays="slow-fraction", delays_latency=2.0), 3)
    # one of three clients is slow, and in batches of 479 it is always there
    assert [record["seconds_simulated"] for record in training.rounds] == [3 * 20.0, 3 * 20.0]
    without = train_in_process(config(tmp_path), 3)
    assert [record["seconds_simulated"] for record in without.rounds] == [None, None]
    assert np.array_equal(training.accuracy, without.accuracy)  # a virtual clock changes nothing else


def test_a_missing_file_with_delays_is_refused_before_training(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        train_in_process(config(tmp_path, delays="csv", delays_path=str(tmp_path / "none.csv")), 3)


def test_progress_counts_epochs_and_guesses_the_rest(capsys):
    log = logging.getLogger("flwr")
    before = log.level
    try:
        progress = Progress(12)
        report = progress.of("ugs, seed 1")
        report(0, 0.1)
        report(1, 0.5)
        progress.of("fls, seed 1")(1, 0.25)
    finally:
        log.setLevel(before)
    first, second, third = capsys.readouterr().err.splitlines()
    assert first == " 0/12  ugs, seed 1: epoch 0, accuracy 0.100   ETA unknown"
    assert second.startswith(" 1/12  ugs, seed 1: epoch 1, accuracy 0.500   ETA 0:0")
    assert third.startswith(" 2/12  fls, seed 1: epoch 1, accuracy 0.250   ETA 0:0")


@pytest.mark.parametrize("measured", [False, True])
def test_with_sleep_clients_really_wait_for_their_delays(tmp_path, monkeypatch, measured):
    model = {"delays": "measured", "simulated_delays": "slow-fraction"} if measured else {"delays": "slow-fraction"}
    waits = []
    monkeypatch.setattr("time.sleep", waits.append)
    train_in_process(config(tmp_path, sleep=True, delays_latency=2.0, **model), 3)
    waits = [seconds for seconds in waits if seconds >= 1]  # the others are those of an exchange
    assert sorted(waits) == 2 * 3 * 2 * [2.0] + 2 * 3 * [
        20.0
    ]  # two epochs of three steps; one of three clients is slow
