"""DP-SGD in whole runs: head, body and tail are trained with clipped gradients and noise, once an example a round."""

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
from flwr.app import ArrayRecord, Context, RecordDict
from support import CUT, DELAYS, NUM_CLASSES, largest_difference, load_partition_64, planned_batches, population, sgd
from support import tiny_resnet_64 as with_batch_norm
from torch import nn

from psl_flower import (
    FaultPolicy,
    InProcessGrid,
    LatentDirichletSampler,
    ParallelSplitLearning,
    StreamOptions,
    UniformGlobalSampler,
    replace_batch_norm,
    split_client_app,
)
from psl_flower.app import client_app, server_app
from psl_flower.errors import ConfigError, MembershipError, StepError
from psl_flower.privacy import DPSGD, DistanceCorrelation, GaussianNoise, TopK

K, B = 4, 60
SAMPLER = UniformGlobalSampler(B, seed=3)
CLIP = DPSGD(clip=0.8, noise=0, batch_size=B)
THREE = DPSGD(clip=0.8, noise=0, batch_size=B, colluding=3)


def resnet():
    return replace_batch_norm(with_batch_norm())


PARTS = {  # by method: how the model is cut, and what its parts' parameters are called
    "parallel": ({"cut": CUT}, ("stem", "layer1"), ("layer2", "head")),
    "u-shaped": ({"cut": CUT, "tail": "head"}, ("stem", "layer1"), ("layer2",), ("head",)),
}


def broken():
    model = resnet()
    model.stem.register_forward_pre_hook(lambda *_: 1 / 0)
    return model


def grid_of(method, private, model_fn=resnet, **options):
    cut = PARTS[method][0]
    return InProcessGrid(split_client_app(model_fn, data_fn=load_partition_64, private=private, **cut, **options), K)


def strategy_of(method, private, model_fn=resnet, **options):
    options = {"sampler": SAMPLER, "optimizer": sgd, **PARTS[method][0], **options}
    return ParallelSplitLearning(
        model_fn(), private=private, evaluate_every=0, min_available_nodes=K, device="cpu", **options
    )


def trained(method, private, num_rounds=1, grid=None, secure=False, **options):
    split = strategy_of(method, private, secure_aggregation=secure, **options)
    grid = grid or grid_of(method, private, secure_aggregation=secure)
    return split.start(grid, ArrayRecord(resnet().state_dict()), num_rounds)


def reference(method, clip):
    """Train in one place, example by example; each part's gradient is clipped by itself."""
    model, parts = resnet(), PARTS[method][1:]
    bound, optimizer = clip / B / math.sqrt(len(parts)), sgd(model.parameters())
    clipped = 0
    for x, y in planned_batches(SAMPLER.plan(population(K), 0), K, seed=3, epoch=0, dtype=torch.float64):
        total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        for i in range(len(y)):
            model.zero_grad()
            (nn.functional.cross_entropy(model(x[i : i + 1]), y[i : i + 1]) / len(y)).backward()
            for part in parts:
                mine = {n: p.grad for n, p in model.named_parameters() if n.split(".")[0] in part}
                norm = math.sqrt(sum(float(g.square().sum()) for g in mine.values()))
                clipped += norm > bound
                for name, g in mine.items():
                    total[name] += g * min(1, bound / norm)
        for name, p in model.named_parameters():
            p.grad = total[name]
        optimizer.step()
    return model.state_dict(), clipped


@pytest.mark.parametrize("transport", ["streams", "messages"])
@pytest.mark.parametrize("method", list(PARTS))
def test_equals_clipping_example_by_example_in_one_place(method, transport):
    expected, clipped = reference(method, 0.8)
    found = trained(method, CLIP, transport=transport).arrays.to_torch_state_dict()
    assert largest_difference(found, expected) < 1e-9
    assert 200 < clipped < 0.9 * len(PARTS[method][1:]) * sum(population(K).sizes)  # some, not all
    assert largest_difference(expected, trained(method, None).arrays.to_torch_state_dict()) > 1e-4


def test_secure_sums_are_the_same():
    expected, _ = reference("u-shaped", 0.8)
    found = trained("u-shaped", CLIP, secure=True).arrays.to_torch_state_dict()
    assert largest_difference(found, expected) < 1e-9


def test_without_clipping_and_noise_it_is_plain_training():
    none = DPSGD(clip=1e6, noise=0, batch_size=B)
    found, plain = (trained("parallel", each).arrays.to_torch_state_dict() for each in (none, None))
    assert largest_difference(found, plain) < 1e-9


def plain_sgd(parameters):
    return torch.optim.SGD(parameters, lr=1.0)


@pytest.mark.parametrize("secure", [False, True])
@pytest.mark.parametrize("transport", ["streams", "messages"])
def test_each_part_of_a_step_has_the_noise_once(secure, transport):
    """Whoever adds it: the server, or the clients of several processes together, in shares."""
    total = sum(population(K).sizes)
    options = {"sampler": UniformGlobalSampler(total, seed=3), "optimizer": plain_sgd, "transport": transport}
    noise = 50.0
    quiet, loud = (
        trained(
            "u-shaped", DPSGD(clip=0.8, noise=n, batch_size=total), secure=secure, **options
        ).arrays.to_torch_state_dict()
        for n in (0, noise)
    )
    for part in PARTS["u-shaped"][1:]:
        added = torch.cat([(loud[n] - quiet[n]).flatten() for n in quiet if n.split(".")[0] in part])
        expected = noise * 0.8 / total
        if secure and part != PARTS["u-shaped"][2]:
            expected *= math.sqrt(K / (K - 1))  # what is left without the share of one
        # within four standard errors of a standard deviation
        assert float(added.std()) == pytest.approx(expected, rel=4 / math.sqrt(2 * len(added)))
        assert abs(float(added.mean())) < 4 * expected / math.sqrt(len(added))


def test_what_a_round_gives_away_is_told(tmp_path, caplog):
    caplog.set_level("INFO")
    private = DPSGD.for_epsilon(3.0, rounds=2, clip=1.0, batch_size=B, delta=1e-4)
    result = trained("parallel", private, num_rounds=2, output_dir=tmp_path)
    told = [result.train_metrics_clientapp[r]["epsilon"] for r in (1, 2)]
    assert told[0] < told[1] == pytest.approx(3.0)
    assert "round 2  differential privacy of the model: epsilon 3.000, delta 0.0001" in caplog.text
    rounds = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["metrics_of_user"]["epsilon"] for r in rounds if r["kind"] == "round"] == told
    settings = json.loads((tmp_path / "config.json").read_text())["strategy"]
    assert settings["private"]["clip"] == 1.0


def test_epsilon_goes_on_from_start_to_start():
    private = DPSGD(clip=1.0, noise=4.0, batch_size=B)
    split, grid = strategy_of("parallel", private), grid_of("parallel", private)
    arrays, told = ArrayRecord(resnet().state_dict()), []
    for rounds in (1, 2):
        result = split.start(grid, arrays, rounds)
        told += [result.train_metrics_clientapp[r + 1]["epsilon"] for r in range(rounds)]
    assert told == pytest.approx([private.epsilon(rounds) for rounds in (1, 2, 3)])
    with pytest.raises(StepError):  # a round that does not come to its end counts, too
        split.start(grid_of("parallel", private, model_fn=broken), arrays, 1)
    result = split.start(grid, arrays, 1)
    assert result.train_metrics_clientapp[1]["epsilon"] == pytest.approx(private.epsilon(5))
    later = strategy_of("parallel", replace(private, spent_rounds=7)).start(grid, arrays, 1)  # clients need not know
    assert later.train_metrics_clientapp[1]["epsilon"] == pytest.approx(private.epsilon(8))


def test_defences_of_activations_go_with_it():
    grid = grid_of("parallel", CLIP, defences=[TopK(50), GaussianNoise(0.0)])
    unclipped = DPSGD(clip=1e6, noise=0, batch_size=B)
    free = grid_of("parallel", unclipped, defences=[TopK(50), GaussianNoise(0.0)])
    plain = grid_of("parallel", None, defences=[TopK(50), GaussianNoise(0.0)])
    clipped, same, expected = (
        trained("parallel", private, grid=each).arrays.to_torch_state_dict()
        for private, each in ((CLIP, grid), (unclipped, free), (None, plain))
    )
    assert largest_difference(same, expected) < 1e-9
    assert largest_difference(clipped, expected) > 1e-4


def test_the_default_app(tmp_path):
    config = {
        "model": "tiny-cnn",
        "tail": "head",
        "secure-aggregation": True,
        "target-epsilon": 8.0,
        "defences": "ClipCutGradient(0.01), RandomizedResponse(5, 10)",
        "batch-size": 256,
        "learning-rate": 0.3,
        "momentum": 0.0,
        "num-server-rounds": 1,
        "output-dir": str(tmp_path),
    }
    grid = InProcessGrid(client_app.app, K, run_config=config)
    server_app.app(grid, Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=config))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["metrics_of_user"]["epsilon"] == pytest.approx(8.0)
    assert lines[-1]["num_examples"] == 1437


class Skipping(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.body, self.tail = nn.Linear(36, 8), nn.Linear(8, 8), nn.Linear(16, NUM_CLASSES)

    def forward(self, x):
        z = self.stem(x.flatten(1))
        return self.tail(torch.cat([z, self.body(z)], 1))


def skipping():
    return Skipping().double()


class Centring(nn.Module):
    def forward(self, x):
        return x - x.mean(dim=0)


def centred():
    model = resnet()
    model.layer2 = nn.Sequential(model.layer2, Centring())
    return model


def run_centred():
    grid = grid_of("parallel", CLIP, model_fn=centred)
    split = strategy_of("parallel", CLIP, model_fn=centred)
    split.start(grid, ArrayRecord(centred().state_dict()), 1)


def weighted_loss(outputs, target):
    return nn.functional.cross_entropy(outputs, target, weight=torch.tensor([1.0, 2.0, 1.0, 1.0]).double())


def run_skipping():
    options = {"cut": "body", "tail": "tail"}
    grid = InProcessGrid(split_client_app(skipping, data_fn=load_partition_64, private=CLIP, **options), K)
    split = ParallelSplitLearning(skipping(), sampler=SAMPLER, private=CLIP, evaluate_every=0, **options)
    split.start(grid, ArrayRecord(skipping().state_dict()), 1)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: strategy_of("parallel", "yes"), ConfigError, "private must be a psl_flower.privacy.DPSGD, got 'yes'"),
        (
            lambda: strategy_of("parallel", CLIP, sampler=UniformGlobalSampler(B + 1)),
            ConfigError,
            "the sampler's batch size, 61, got 60",
        ),
        (
            lambda: strategy_of("parallel", CLIP, sampler=LatentDirichletSampler(B), delays=DELAYS),
            ConfigError,
            "LatentDirichletSampler plans with labels",
        ),
        (
            lambda: strategy_of("parallel", CLIP, model_fn=with_batch_norm),
            ConfigError,
            r"of the body normalises over the batch: replace_batch_norm\(model\)",
        ),
        (lambda: strategy_of("parallel", CLIP, faults=FaultPolicy()), ConfigError, "outlier_bound=None"),
        (
            lambda: strategy_of("parallel", CLIP, faults=FaultPolicy(outlier_bound=None, mistakes="exclude")),
            ConfigError,
            "with mistakes='exclude' one that cannot be used takes all examples of its client out",
        ),
        (
            lambda: strategy_of("parallel", CLIP, faults=FaultPolicy(outlier_bound=None, non_finite_loss="skip")),
            ConfigError,
            "one whose gradient is not finite counts as zero. Leave out non_finite_loss='skip'",
        ),
        (
            lambda: strategy_of("parallel", CLIP, stream_options=StreamOptions(wire_dtype="float16")),
            ConfigError,
            "examples must not be scaled together, as float16 on the wire does",
        ),
        (
            lambda: strategy_of("u-shaped", THREE, secure_aggregation=True),
            ConfigError,
            r"up to 3 may take theirs away again: sums must be of more, SecureAggregation\(least=5\), got least=3",
        ),
        (
            lambda: grid_of("u-shaped", THREE, secure_aggregation=True),
            ConfigError,
            r"sums must be of more, SecureAggregation\(least=5\), got least=3",
        ),
        (
            lambda: trained("parallel", DPSGD(clip=1.0, noise=1.0, batch_size=B, delta=1e-2)),
            ConfigError,
            r"well below one over the number of examples, which is 406, got 0.01: DPSGD\(delta=0.0001\)",
        ),
        (
            lambda: strategy_of("parallel", CLIP, resume_from="latest", output_dir="/tmp/none"),
            ConfigError,
            "with private a run cannot be resumed",
        ),
        (
            lambda: ParallelSplitLearning(resnet(), cut=CUT, method="splitfed-v1", private=CLIP),
            ConfigError,
            "clients step parts of their own",
        ),
        (
            lambda: split_client_app(
                resnet, cut=CUT, data_fn=load_partition_64, private=CLIP, method="splitfed-v2", optimizer=sgd
            ),
            ConfigError,
            "clients step parts of their own, without noise",
        ),
        (
            lambda: grid_of("parallel", CLIP, defences=[DistanceCorrelation(1.0)]),
            ConfigError,
            "DistanceCorrelation gives an example a gradient that others have a part in",
        ),
        (lambda: grid_of("parallel", 1.0), ConfigError, "private must be a psl_flower.privacy.DPSGD, got 1.0"),
        (
            lambda: trained("parallel", CLIP, grid=grid_of("parallel", None)),
            MembershipError,
            r"the server's model is private=DPSGD\(clip=0.8, .*, that of client 0 private=None: give both the same",
        ),
        (
            lambda: trained("parallel", None, grid=grid_of("parallel", copy.copy(CLIP))),
            MembershipError,
            "the server's model is private=None",
        ),
        (run_centred, ConfigError, "with private, the server half must treat examples one by one"),
        (run_skipping, StepError, "not where something skips the body"),
        (
            lambda: trained("parallel", CLIP, loss=weighted_loss),
            ConfigError,
            "needs a loss that is the mean over the examples, got a mean over",
        ),
    ],
)
def test_what_does_not_go_with_it_is_told(make, error, message):
    with pytest.raises(error, match=message):
        make()
