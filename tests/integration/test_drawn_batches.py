"""Runs whose clients draw their examples by chance: exact on what was drawn, each step once, and DP-SGD of them."""

import json
import math
from collections import defaultdict

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Context, RecordDict
from killed import Killed, dying_after
from support import (
    CUT,
    client_data,
    largest_difference,
    load_partition_64,
    load_partition_with_test,
    population,
    sgd,
    tiny_resnet,
    tiny_resnet_64,
)
from torch import nn
from torch.utils.data import TensorDataset

from psl_flower import (
    FaultPolicy,
    InProcessGrid,
    ParallelSplitLearning,
    PoissonGlobalSampler,
    SplitClient,
    UniformGlobalSampler,
    replace_batch_norm,
    split_client_app,
)
from psl_flower.app import client_app, server_app
from psl_flower.callbacks import EarlyStopping
from psl_flower.client import process
from psl_flower.client.process import ContextCache
from psl_flower.errors import ConfigError, MembershipError, StepError
from psl_flower.privacy import DPSGD
from psl_flower.samplers import poisson
from psl_flower.strategy import drawn
from psl_flower.strategy import strategy as strategy_module

K, B = 5, 25
N = int(population(K).sizes.sum())
SAMPLER = PoissonGlobalSampler(B, seed=3)
PARTS = {"parallel": {"cut": CUT}, "u-shaped": {"cut": CUT, "tail": "head"}}
RUNS = [  # carriers know no method: one of each is enough, but now and then
    ("parallel", "streams"),
    ("u-shaped", "messages"),
    pytest.param("parallel", "messages", marks=pytest.mark.slow),
    pytest.param("u-shaped", "streams", marks=pytest.mark.slow),
]
PRIVATE = DPSGD(clip=0.8, noise=0.0, batch_size=B, examples=N)


def resnet():
    """Without batch norm: it sees batches of one."""
    return replace_batch_norm(tiny_resnet_64())


class Recording(SplitClient):
    """Takes note of what it draws, in what order steps were first drawn for."""

    drawn = {}  # noqa: RUF012 - (epoch, step): {client: rows}

    def draw(self, order):
        rows = super().draw(order)
        if order.test:
            return rows
        before = Recording.drawn.setdefault((order.epoch, order.step), {}).setdefault(order.client, rows.tolist())
        assert before == rows.tolist()  # whenever it is asked again
        return rows


@pytest.fixture(autouse=True)
def nothing_drawn():
    Recording.drawn = {}


def grid_of(method="parallel", client_class=Recording, data_fn=load_partition_64, model_fn=resnet, **options):
    app = split_client_app(model_fn, data_fn=data_fn, client_class=client_class, **PARTS[method], **options)
    return InProcessGrid(app, K)


def strategy_of(method="parallel", model_fn=resnet, **options):
    options = {
        "sampler": SAMPLER,
        "optimizer": sgd,
        "evaluate_every": 0,
        **PARTS.get(method, {"cut": CUT, "method": method}),
        **options,
    }
    return ParallelSplitLearning(model_fn(), min_available_nodes=K, device="cpu", **options)


def trained(method="parallel", num_rounds=1, grid=None, private=None, **options):
    grid = grid or grid_of(method, private=private)
    return strategy_of(method, private=private, **options).start(grid, ArrayRecord(resnet().state_dict()), num_rounds)


def batches():
    """Return what was drawn as the batches of a trainer that has all data."""
    data = [client_data(k, K, torch.float64).tensors for k in range(K)]
    for step in sorted(Recording.drawn):
        rows = sorted(Recording.drawn[step].items())
        yield torch.cat([data[k][0][r] for k, r in rows]), torch.cat([data[k][1][r] for k, r in rows])


def centralised(model):
    optimizer = sgd(model.parameters())
    for x, y in batches():
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.state_dict()


def clipped(model, method, clip):
    """Train in one place, example by example: each part's gradient is clipped, and the sum divided by B."""
    parts = [("stem", "layer1"), ("layer2", "head")] if method == "parallel" else [["stem", "layer1"], ["layer2"]]
    parts = parts if method == "parallel" else [*parts, ["head"]]
    bound, optimizer, cut_down = clip / math.sqrt(len(parts)), sgd(model.parameters()), 0
    for x, y in batches():
        total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        for i in range(len(y)):
            model.zero_grad()
            nn.functional.cross_entropy(model(x[i : i + 1]), y[i : i + 1]).backward()
            for part in parts:
                mine = {n: p.grad for n, p in model.named_parameters() if n.split(".")[0] in part}
                norm = math.sqrt(sum(float(g.square().sum()) for g in mine.values()))
                cut_down += norm > bound
                for name, g in mine.items():
                    total[name] += g * min(1, bound / norm) / B
        for name, p in model.named_parameters():
            p.grad = total[name]
        optimizer.step()
    return model.state_dict(), cut_down


@pytest.mark.parametrize(("method", "transport"), RUNS)
def test_equals_centralised_training_on_what_was_drawn(method, transport):
    found = trained(method, num_rounds=2, transport=transport)
    sizes = [sum(map(len, clients.values())) for clients in Recording.drawn.values()]
    assert len(sizes) == 2 * math.ceil(N / B)
    assert len(set(sizes)) > 5
    assert largest_difference(found.arrays.to_torch_state_dict(), centralised(resnet())) < 1e-9
    used = defaultdict(list)
    for clients in Recording.drawn.values():
        for client, rows in clients.items():
            used[client] += rows
    assert sum(map(len, used.values())) == sum(found.train_metrics_clientapp[r]["num_examples"] for r in (1, 2))
    assert any(len(set(rows)) < len(rows) for rows in used.values())  # some repeatedly


@pytest.mark.parametrize(("method", "transport"), RUNS)
def test_dp_sgd_clips_each_example_and_divides_by_what_was_expected(method, transport):
    found = trained(method, private=PRIVATE, transport=transport).arrays.to_torch_state_dict()
    expected, cut_down = clipped(resnet(), method, 0.8)
    assert largest_difference(found, expected) < 1e-9
    assert cut_down > 100
    assert largest_difference(expected, centralised(resnet())) > 1e-4


def test_evaluation_is_as_ever():
    app = split_client_app(tiny_resnet, cut=CUT, data_fn=load_partition_with_test)
    strategy = ParallelSplitLearning(
        tiny_resnet(), cut=CUT, sampler=SAMPLER, optimizer=sgd, min_available_nodes=K, device="cpu"
    )
    result = strategy.start(InProcessGrid(app, K), ArrayRecord(tiny_resnet().state_dict()), 1)
    model = tiny_resnet()
    model.load_state_dict(result.arrays.to_torch_state_dict())
    tests = [tuple(t[: len(t) // 2] for t in client_data(k, K).tensors) for k in range(K)]
    x, y = (torch.cat(column) for column in zip(*((x[: len(y)], y) for x, y in tests), strict=True))
    with torch.no_grad():
        expected = nn.functional.cross_entropy(model.eval()(x), y).item()
    assert result.evaluate_metrics_clientapp[1]["loss"] == pytest.approx(expected, rel=1e-4)


# --- differential privacy --------------------------------------------------------------------------------------------
def test_what_the_steps_give_away_is_told():
    chance = DPSGD.for_epsilon(3.0, rounds=2, clip=1.0, batch_size=B, examples=N, delta=1e-4)
    strategy, grid = strategy_of(private=chance), grid_of(private=chance)
    told = []
    for _ in range(2):  # of the same data, whatever the run
        Recording.drawn = {}
        result = strategy.start(grid, ArrayRecord(resnet().state_dict()), 1)
        told.append(result.train_metrics_clientapp[1]["epsilon"])
    assert told[0] < told[1] == pytest.approx(3.0, rel=1e-3)
    assert told == pytest.approx([chance.epsilon(rounds) for rounds in (1, 2)])
    once = DPSGD(clip=1.0, noise=chance.noise, batch_size=B, delta=1e-4)
    assert told[1] < 0.6 * once.epsilon(2)


def test_no_draw_is_made_again_in_another_run():
    grid, runs = grid_of(), []
    for _ in range(2):
        Recording.drawn = {}
        trained(grid=grid)
        runs.append({step: sorted(clients.items()) for step, clients in Recording.drawn.items()})
    same = sum(runs[0][step] == runs[1].get(step) for step in runs[0])
    assert same <= 1


def test_other_numbers_of_examples_are_counted_as_they_are(caplog):
    fewer = DPSGD(clip=1.0, noise=2.0, batch_size=B, examples=N - 100)
    found = trained(private=fewer).train_metrics_clientapp[1]["epsilon"]
    assert found == pytest.approx(DPSGD(clip=1.0, noise=2.0, batch_size=B, examples=N).epsilon(1))
    assert found < 0.999 * fewer.epsilon(1)
    assert f"private was made for {N - 100} examples, the clients hold {N}" in caplog.text


def test_fewer_examples_than_noise_was_made_for_are_refused_before_the_first_step():
    with pytest.raises(
        ConfigError, match=rf"made for {4 * N} examples, the clients hold {N}: 1 rounds would give away"
    ):
        trained(private=DPSGD.for_epsilon(8.0, rounds=2, clip=1.0, batch_size=B, examples=4 * N))
    assert not Recording.drawn


class Counting(torch.optim.SGD):
    steps = 0

    def step(self, closure=None):
        Counting.steps += 1
        return super().step(closure)


def two_examples(context):
    x = torch.randn(2, 1, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(context.node_id % 97))
    return TensorDataset(x, torch.tensor([0, 1]))


@pytest.mark.parametrize("private", [None, DPSGD(clip=1.0, noise=1.0, batch_size=1, examples=2 * K, delta=1e-3)])
def test_an_empty_step_is_one_of_noise_or_none(private, tmp_path):
    """Where it did not change the model, that nobody is in it would show."""
    Counting.steps = 0
    rounds, options = 3, {"sampler": PoissonGlobalSampler(1), "optimizer": lambda p: Counting(p, lr=0.01)}
    trained(
        num_rounds=rounds, grid=grid_of(data_fn=two_examples, private=private), private=private, output_dir=tmp_path,
        **options,
    )  # fmt: skip
    summary = json.loads((tmp_path / "summary.json").read_text())
    empty, made = summary["steps_skipped"], summary["steps_committed"]
    assert empty + made == rounds * 2 * K
    assert 1 <= empty < rounds * 2 * K  # a third of them; by chance none in 1e-5
    assert Counting.steps == (made if private is None else made + empty)
    steps = [sorted(step for of, step in Recording.drawn if of == epoch) for epoch in range(rounds)]
    assert sum(map(len, steps)) == made
    assert any(seen != list(range(len(seen))) for seen in steps)  # numbered as planned; else by chance in 1e-4


class Plateau(torch.optim.lr_scheduler.ReduceLROnPlateau):
    given = []  # noqa: RUF012 - losses

    def step(self, metrics, epoch=None):
        Plateau.given.append(metrics)
        super().step(metrics)


def test_a_round_of_empty_steps_has_no_loss(monkeypatch, caplog, tmp_path):
    successes, calls = poisson._successes, []

    def none_at_first(*arguments):
        calls.append(successes(*arguments))
        return calls[-1][: 0 if len(calls) == 1 else None]

    monkeypatch.setattr(poisson, "_successes", none_at_first)
    found = trained(
        num_rounds=2,
        grid=grid_of(data_fn=two_examples),
        sampler=PoissonGlobalSampler(5),
        scheduler=lambda optimizer: {"scheduler": Plateau(optimizer), "monitor": "loss"},
        callbacks=[EarlyStopping("loss")],
        output_dir=tmp_path,
    ).train_metrics_clientapp
    assert found[1]["num_steps"] == 0
    assert "loss" not in found[1]
    assert Plateau.given == [found[2]["loss"]]
    assert "round 1  no step with examples was made, so there is no loss" in caplog.text


def test_the_default_app(tmp_path):
    config = {
        "model": "tiny-cnn",
        "sampler": "poisson",
        "target-epsilon": 8.0,
        "dp-examples": 1437,
        "batch-size": 512,
        "num-server-rounds": 1,
        "momentum": 0.0,
        "output-dir": str(tmp_path),
    }
    grid = InProcessGrid(client_app.app, 4, run_config=config)
    server_app.app(grid, Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=config))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["metrics_of_user"]["epsilon"] == pytest.approx(8.0, rel=1e-3)
    assert lines[-1]["num_steps"] == 3
    assert lines[-1]["deviation_mean"] is None  # the labels of an epoch are not those of all data
    with pytest.raises(ConfigError, match="dp-examples must be the number of examples of all clients together, got 0"):
        server_app.make_strategy(server_app.RunConfig.read({**config, "sampler": "poisson-global", "dp-examples": 0}))


def once(**options):
    return strategy_of(sampler=UniformGlobalSampler(B), **options)


class Twice(PoissonGlobalSampler):
    def _plan(self, population, rng):
        return super()._plan(population, rng)


class OwnDraws(UniformGlobalSampler):
    clients_draw = True


@pytest.mark.parametrize(
    ("make", "message"),
    [
        *(
            (lambda kind=kind, private=private: strategy_of(private=private, sampler=kind(B)), "makes plans of its own")
            for kind in (Twice, OwnDraws)
            for private in (PRIVATE, DPSGD(clip=1.0, noise=1.0, batch_size=B))
        ),
        (lambda: strategy_of(private=DPSGD(clip=1.0, noise=1.0, batch_size=B)), r"DPSGD\(\.\.\., examples=N\)"),
        (lambda: once(private=PRIVATE), "which UniformGlobalSampler does not do: use PoissonGlobalSampler"),
        (lambda: strategy_of(private=PRIVATE, sampler=PoissonGlobalSampler(B, repeatable=True)), "repeatable=False"),
        (lambda: strategy_of(secure_aggregation=True), "PoissonGlobalSampler has steps of any size"),
        (lambda: strategy_of(method="sequential"), "no sampler has a say"),
    ],
)
def test_what_does_not_go_with_it_is_told(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_both_ends_need_the_same():
    with pytest.raises(MembershipError, match="examples=None"):
        trained(private=PRIVATE, grid=grid_of(private=DPSGD(clip=0.8, noise=0.0, batch_size=B)))


def test_clients_that_draw_themselves_take_no_orders_by_name(monkeypatch):
    """A server that names examples after all would know, and could tell, which are in a step."""
    monkeypatch.setattr(drawn.DrawnLedger, "orders", drawn.EpochLedger.orders)
    with pytest.raises(StepError, match=r"each client draws its examples itself, .* the server's orders name them"):
        trained(private=PRIVATE)


# --- faults ----------------------------------------------------------------------------------------------------------
def test_a_resumed_run_draws_the_same(tmp_path, monkeypatch):
    """The secrets of its clients, which live on here, and the name of the epoch's draws decide."""
    monkeypatch.setattr(drawn.secrets, "randbits", lambda _: 12345)
    options = {"sampler": PoissonGlobalSampler(B, seed=3, repeatable=True), "checkpoint_every": 3}
    grid = grid_of()
    whole = trained(num_rounds=2, grid=grid, output_dir=tmp_path / "whole", **options)

    # in the second round, between two checkpoints
    with monkeypatch.context() as patch:
        patch.setattr(strategy_module, "LocalBackend", dying_after(math.ceil(N / B) + 8))
        with pytest.raises(Killed):
            trained(num_rounds=2, grid=grid, output_dir=tmp_path / "cut", **options)
    monkeypatch.setattr(drawn.secrets, "randbits", lambda _: 1)  # what is drawn for is in the checkpoint
    resumed = trained(num_rounds=2, grid=grid, output_dir=tmp_path / "cut", resume_from="latest", **options)
    found, expected = (each.arrays.to_torch_state_dict() for each in (resumed, whole))
    assert largest_difference(found, expected) == 0


class Absent(Recording):
    """Client 1 is not there for a few steps."""

    def draw(self, order):
        if order.client == 1 and 3 <= order.step < 6:
            raise OSError("not now")
        return super().draw(order)


def test_what_a_lost_client_does_not_give_lapses(tmp_path):
    sampler = PoissonGlobalSampler(B, seed=3, repeatable=True)
    planned = sampler.plan(population(K)).dense()
    found = trained(
        grid=grid_of(client_class=Absent), sampler=sampler, faults=FaultPolicy(mistakes="retry"), output_dir=tmp_path
    )
    given = np.zeros_like(planned)
    for (_, step), clients in Recording.drawn.items():
        for client, rows in clients.items():
            given[step, population(K).client_ids[population(K).sizes > 0].tolist().index(client)] = len(rows)
    others = np.arange(planned.shape[1]) != 1
    assert np.array_equal(given[:, others], planned[:, others])  # in the same steps, no more and no less
    lapsed = planned[:, 1] - given[:, 1]
    assert lapsed[3:6].sum() > 0
    assert ((lapsed == 0) | (lapsed == planned[:, 1])).all()
    assert found.train_metrics_clientapp[1]["examples_unseen"] == lapsed.sum()
    assert json.loads((tmp_path / "summary.json").read_text())["replans"] == 0
    assert largest_difference(found.arrays.to_torch_state_dict(), centralised(resnet())) < 1e-9


def test_clients_that_lost_their_secret_are_out_of_the_step(monkeypatch, tmp_path):
    """Their process was another when the step began: what they would draw now is not what they have sent."""
    pop, lost = ContextCache.pop, []

    def forgets(cache, work):
        found = pop(cache, work)
        if found is None or len(lost) > 0 or work[0][3] != 4:  # as it is put, and but for one step
            return found
        lost.append(found)
        for state in process._runs.values():
            if state.contexts is cache:
                del state.secrets[next(iter(state.secrets))]
        return None

    monkeypatch.setattr(ContextCache, "pop", forgets)
    trained(grid=grid_of(client_class=SplitClient), output_dir=tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert len(lost) == 1
    assert set(summary["refused"]) == {"unreachable"}
    assert summary["steps_committed"] + summary["steps_skipped"] == math.ceil(N / B)
