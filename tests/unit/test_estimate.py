"""A sweep says how long it will take: by steps of the same trainings, as many examples as they have."""

from psl_flower.experiments import estimate as module
from psl_flower.experiments.estimate import estimate
from psl_flower.experiments.sweep import Sweep

CONFIG = {"model": "tiny-cnn", "batch-size": 64, "num-server-rounds": 3, "examples": 640, "num-clients": 4}
METHODS = {"UGS": {"sampler": "ugs"}, "FLS": {"sampler": "fls"}, "centralised": {"algorithm": "centralised"}}


def test_trainings_of_a_kind_are_tried_once_and_counted_each(monkeypatch):
    tried, real = [], module._try

    def slow(setting):
        seconds, examples = real(setting)
        assert seconds > 0
        tried.append(setting.algorithm)
        return 0.5, examples

    monkeypatch.setattr(module, "_try", slow)
    experiments = Sweep(title="t", config=CONFIG, axes={"seed": [0, 1]}, methods=METHODS).experiments()
    in_a_round = 640 + 360 / 3  # of training, and the tests' share
    assert estimate(experiments) == len(experiments) * 3 * 0.5 * in_a_round
    assert tried == ["psl", "centralised"]


def test_what_cannot_be_trained_is_left_out_as_are_real_clients():
    broken = Sweep(title="t", config={**CONFIG, "learning-rate": 1e30}, axes={"seed": [0]}, methods={"UGS": {}})
    assert estimate(broken.experiments()) == 0
    config = {key: value for key, value in CONFIG.items() if key != "examples"}
    sweep = Sweep(title="t", engine="in-process", config=config, axes={"seed": [0]}, methods={"UGS": {}})
    assert estimate(sweep.experiments()) == 0
