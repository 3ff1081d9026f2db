"""What fine-tuning recipes are made of, by torch's own classes: groups, warm-up, clipping, averages of weights."""

import pytest
import torch
from flwr.app import ArrayRecord
from support import (
    CUT,
    largest_difference,
    load_partition_64,
    planned_batches,
    population,
    tiny_resnet,
    tiny_resnet_64,
)
from torch.nn.utils import clip_grad_norm_
from torch.optim.swa_utils import get_ema_multi_avg_fn

from psl_flower import InProcessGrid, ParallelSplitLearning, UniformGlobalSampler, split_client_app

K = 3
SAMPLER = UniformGlobalSampler(40, seed=1)


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
