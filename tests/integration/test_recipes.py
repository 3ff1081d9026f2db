"""What fine-tuning recipes are made of, by torch's own classes: groups, warm-up, clipping, averages of weights."""

import pytest
import torch
from flwr.app import ArrayRecord
from support import (
    CUT,
    NUM_CLASSES,
    SIDE,
    largest_difference,
    load_partition_64,
    planned_batches,
    population,
    tiny_resnet,
    tiny_resnet_64,
)
from torch.nn.utils import clip_grad_norm_
from torch.optim.swa_utils import get_ema_multi_avg_fn

from psl_flower import (
    Callback,
    ConfigError,
    InProcessGrid,
    ParallelSplitLearning,
    StepError,
    UniformGlobalSampler,
    accumulate,
    split_client_app,
)

K = 3
SAMPLER = UniformGlobalSampler(40, seed=1)
EVERY = 3  # gradients to a step, of 10 or 11 steps an epoch: groups go over its end


class Recipe:
    """An optimizer as recipes have it, and the moving average of the weights."""

    def __init__(self):
        self.average = {}
        self.norms = []

    def __call__(self, named_parameters):
        parameters = dict(named_parameters)
        decayed = [p for p in parameters.values() if p.ndim > 1]
        others = [p for p in parameters.values() if p.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0, "lr": 0.02}]
        optimizer = torch.optim.AdamW(groups, lr=0.01)
        self.average = {name: p.detach().clone() for name, p in parameters.items()}
        average = get_ema_multi_avg_fn(0.8)

        def clip(*_):
            self.norms.append(float(clip_grad_norm_(parameters.values(), 0.3)))

        optimizer.register_step_pre_hook(clip)
        optimizer.register_step_post_hook(
            lambda *_: average(list(self.average.values()), [p.detach() for p in parameters.values()], None)
        )
        return optimizer


def warm_up(optimizer):
    """Rise for five steps, then decay, in steps and not in rounds."""
    rise = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=5)
    fall = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    return torch.optim.lr_scheduler.SequentialLR(optimizer, [rise, fall], [5])


def test_a_recipe_equals_the_loop_that_it_is_from():
    model, recipe, own = tiny_resnet_64(), Recipe(), Recipe()
    strategy = ParallelSplitLearning(
        model,
        cut=CUT,
        sampler=SAMPLER,
        optimizer=recipe,
        scheduler=lambda optimizer: {"scheduler": warm_up(optimizer), "interval": "step"},
        device="cpu",
        min_available_nodes=K,
        evaluate_every=0,
    )
    grid = InProcessGrid(split_client_app(tiny_resnet_64, cut=CUT, data_fn=load_partition_64, device="cpu"), K)
    result = strategy.start(grid, ArrayRecord(model.state_dict()), 2)

    reference = tiny_resnet(torch.float64).train()
    optimizer = own(list(reference.named_parameters()))
    scheduler = warm_up(optimizer)
    for epoch in range(2):
        plan = SAMPLER.plan(population(K), epoch)
        for x, y in planned_batches(plan, K, seed=1, epoch=epoch, dtype=torch.float64):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(reference(x), y).backward()
            optimizer.step()
            scheduler.step()
    assert largest_difference(result.arrays.to_torch_state_dict(), reference.state_dict()) < 1e-9
    assert largest_difference(recipe.average, own.average) < 1e-9
    assert max(float((own.average[n] - p.detach()).abs().max()) for n, p in reference.named_parameters()) > 1e-3
    assert recipe.norms == pytest.approx(own.norms)
    assert min(own.norms) < max(own.norms)
    assert max(own.norms) > 0.3


def resumed(folder, factory, rounds):
    model = tiny_resnet_64()
    strategy = ParallelSplitLearning(
        model,
        cut=CUT,
        sampler=SAMPLER,
        optimizer=factory,
        min_available_nodes=K,
        evaluate_every=0,
        output_dir=folder,
        resume_from="latest",
    )
    grid = InProcessGrid(split_client_app(tiny_resnet_64, cut=CUT, data_fn=load_partition_64, device="cpu"), K)
    return strategy.start(grid, ArrayRecord(model.state_dict()), rounds)


@pytest.mark.parametrize("steps", [1, EVERY])
def test_averages_go_on_from_a_checkpoint_that_hooks_have_added_them_to(tmp_path, caplog, steps):
    class Saved(Recipe):
        def __call__(self, named_parameters):
            optimizer = super().__call__(named_parameters)
            optimizer.register_state_dict_post_hook(lambda _, state: state | {"averaged": self.average})
            optimizer.register_load_state_dict_pre_hook(lambda _, state: self.average.update(state.pop("averaged")))
            return optimizer

    whole, first, second, lost = Saved(), Saved(), Saved(), Recipe()
    made = [accumulate(each, steps) if steps > 1 else each for each in (whole, first, second, lost)]
    resumed(tmp_path / "whole", made[0], 2)
    resumed(tmp_path / "parts", made[1], 1)
    resumed(tmp_path / "parts", made[2], 2)
    assert largest_difference(second.average, whole.average) == 0
    assert "averages of the weights" not in caplog.text
    resumed(tmp_path / "parts", made[3], 3)
    assert "if they keep averages of the weights, those begin anew" in caplog.text


# --- several batches to one step of the optimizer --------------------------------------------------------------------


def accumulating(rounds, recipe, scheduler=warm_up, steps=EVERY, **options):
    """Return the weights, and how many bytes were sent in each step beside gradients."""
    sent, model = [], tiny_resnet_64()

    class Bytes(Callback):
        def on_step(self, record):
            sent.append(record.bytes_sent - record.batch_size * 4 * SIDE * SIDE * 8)

    strategy = ParallelSplitLearning(
        model,
        cut=CUT,
        sampler=SAMPLER,
        optimizer=accumulate(recipe, steps),
        scheduler=lambda optimizer: {"scheduler": scheduler(optimizer), "interval": "step"},
        device="cpu",
        min_available_nodes=K,
        evaluate_every=0,
        transport="streams",
        callbacks=[Bytes()],
        **options,
    )
    grid = InProcessGrid(split_client_app(tiny_resnet_64, cut=CUT, data_fn=load_partition_64, device="cpu"), K)
    result = strategy.start(grid, ArrayRecord(model.state_dict()), rounds)
    return result.arrays.to_torch_state_dict(), sent


def test_accumulated_gradients_equal_those_of_torchs_loop(tmp_path):
    """With weight decay for some, clipping and an average of the weights; also where a run resumes within a group."""
    recipe, own = Recipe(), Recipe()
    weights, sent = accumulating(2, recipe)
    reference = tiny_resnet(torch.float64).train()
    optimizer = own(list(reference.named_parameters()))
    scheduler, count = warm_up(optimizer), 0
    for epoch in range(2):
        for x, y in planned_batches(SAMPLER.plan(population(K), epoch), K, seed=1, epoch=epoch, dtype=torch.float64):
            (torch.nn.functional.cross_entropy(reference(x), y) / EVERY).backward()
            count += 1
            if count % EVERY == 0:
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
    assert count % EVERY
    assert count // 2 % EVERY  # a group goes over the end of the first round
    assert largest_difference(weights, reference.state_dict()) < 1e-9
    assert recipe.norms == pytest.approx(own.norms)
    assert len(own.norms) == count // EVERY
    model = tiny_resnet_64()
    head = sum(p.numel() * 8 for part in (model.stem, model.layer1) for p in part.parameters())
    assert sent == [0 if at % EVERY else head for at in range(count)]  # weights travel after the optimizer's steps only
    folder = {"output_dir": tmp_path, "checkpoint_every": 1}
    accumulating(1, Recipe(), **folder)
    resumed, _ = accumulating(2, Recipe(), resume_from="latest", **folder)
    assert largest_difference(resumed, weights) == 0


def test_a_run_does_not_resume_with_another_number_of_accumulated_steps(tmp_path):
    """Gradients that wait are shares of the number they were taken up with."""
    folder = {"output_dir": tmp_path, "checkpoint_every": 1}
    accumulating(1, Recipe(), **folder)
    for steps in (EVERY - 1, EVERY + 1):
        with pytest.raises(ConfigError, match=f"optimizer: class: .*{EVERY} gradients to a step.*{steps} gradients"):
            accumulating(2, Recipe(), steps=steps, resume_from="latest", **folder)


def test_an_optimizer_does_not_go_on_from_another_number_of_accumulated_steps():
    def make(steps):
        return accumulate(lambda parameters: torch.optim.SGD(parameters, lr=0.1), steps)(
            [torch.nn.Parameter(torch.ones(1))]
        )

    waiting = make(4)
    for _ in range(3):
        waiting.param_groups[0]["params"][0].grad = torch.ones(1)
        waiting.step()
    with pytest.raises(ConfigError, match="has 4 gradients to a step, this one accumulates 2"):
        make(2).load_state_dict(waiting.state_dict())


@pytest.mark.parametrize("method", ["splitfed-v1", "splitfed-v2"])
def test_copies_of_a_part_do_not_accumulate(method):
    """They are made anew every round: what waits at its end would be lost, and in short rounds nothing trains."""

    def plain(parameters):
        return torch.optim.SGD(parameters, lr=0.1)

    model, own = tiny_resnet_64(), method == "splitfed-v2"  # whose body is one, but heads are the clients'
    strategy = ParallelSplitLearning(
        model,
        cut=CUT,
        method=method,
        optimizer=plain if own else accumulate(plain, 2),
        device="cpu",
        min_available_nodes=K,
        evaluate_every=0,
        transport="messages",
    )
    app = split_client_app(
        tiny_resnet_64,
        cut=CUT,
        method=method,
        optimizer=accumulate(plain, 2) if own else plain,
        data_fn=load_partition_64,
        device="cpu",
    )
    with pytest.raises((ConfigError, StepError), match="accumulate counts steps over rounds"):
        strategy.start(InProcessGrid(app, K), ArrayRecord(model.state_dict()), 1)


@pytest.mark.parametrize(
    ("optimizer", "steps", "text"),
    [
        (
            torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1),
            2,
            "takes the function that makes the optimizer",
        ),
        (Recipe(), 0, "steps must be at least 1, got 0"),
    ],
)
def test_accumulate_refuses(optimizer, steps, text):
    with pytest.raises(ConfigError, match=text):
        accumulate(optimizer, steps)


# --- several losses --------------------------------------------------------------------------------------------------
class TwoHeads(torch.nn.Module):
    """Gives what many models give in training: its outputs, and those of an auxiliary head, by name."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.stem = torch.nn.Conv2d(1, 4, 3)
            self.trunk = torch.nn.Conv2d(4, 4, 3)
            self.auxiliary = torch.nn.Linear(16, NUM_CLASSES)
            self.head = torch.nn.Linear(16, NUM_CLASSES)
        self.double()

    def forward(self, x):
        x = self.trunk(self.stem(x).tanh()).tanh().flatten(1)
        return {"logits": self.head(x), "auxiliary": self.auxiliary(x), "norm": x.square().mean(1)}


def weighted_sum(outputs, labels):
    """Add what counts alike: a mean over the examples each."""
    auxiliary = torch.nn.functional.cross_entropy(outputs["auxiliary"], labels)
    return torch.nn.functional.cross_entropy(outputs["logits"], labels) + 0.3 * auxiliary + outputs["norm"].mean()


def balanced(outputs, labels):
    """Add a loss of the whole batch, as mixtures of experts have: no mean over its examples."""
    share = outputs["auxiliary"].softmax(1).mean(0)
    return torch.nn.functional.cross_entropy(outputs["logits"], labels) + 0.5 * share.square().sum()


@pytest.mark.parametrize(
    ("loss", "tail"), [(weighted_sum, None), (weighted_sum, "head"), (balanced, None)], ids=["sum", "u", "batch"]
)
def test_several_losses(loss, tail):
    model, where = TwoHeads(), {"cut": "trunk", "tail": tail}
    strategy = ParallelSplitLearning(
        model,
        sampler=SAMPLER,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        device="cpu",
        min_available_nodes=K,
        evaluate_every=0,
        transport="streams",
        **where,
        **({} if tail else {"loss": loss}),
    )
    app = split_client_app(TwoHeads, data_fn=load_partition_64, device="cpu", loss=loss, **where)
    result = strategy.start(InProcessGrid(app, K), ArrayRecord(model.state_dict()), 1)
    reference = TwoHeads()
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1)
    for x, y in planned_batches(SAMPLER.plan(population(K), 0), K, seed=1, epoch=0, dtype=torch.float64):
        optimizer.zero_grad()
        loss(reference(x), y).backward()
        optimizer.step()
    assert largest_difference(result.arrays.to_torch_state_dict(), reference.state_dict()) < 1e-9
    assert float((reference.auxiliary.weight - TwoHeads().auxiliary.weight).detach().abs().max()) > 1e-4
