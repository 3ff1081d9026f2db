"""Batches of one client each: turn after turn, or all clients side by side."""

from __future__ import annotations

import numpy as np

from psl_flower.batch_plan import BatchPlan
from psl_flower.checks import check_choice
from psl_flower.population import Population
from psl_flower.samplers.base import Sampler

TURNS = ("ascending", "random", "side by side")


class TurnsSampler(Sampler):
    """Client k's n_k examples make ceil(n_k / B) batches of its own, which differ in size by at most 1.

    For methods that update weights with one client's batch at a time, such as sequential split learning; they choose it
    themselves.

    Parameters
    ----------
    batch_size : int
        B, of one client's batch.
    seed : int
        Not negative.
    turns : str
        "ascending" or "random": a step is one batch of one client, who makes all its batches in its turn; turns go by
        ascending id, or in a random order, another one every epoch. "side by side": step t has the t-th batch of every
        client that has so many.
    """

    def __init__(self, batch_size: int, *, seed: int = 0, turns: str = "ascending") -> None:
        super().__init__(batch_size, seed=seed)
        self.turns = check_choice(turns, "turns", TURNS)

    def _plan(self, population: Population, rng: np.random.Generator) -> BatchPlan:
        count = len(population)
        order = rng.permutation(count) if self.turns == "random" else np.arange(count)
        sizes = population.sizes[order]
        batches = -(-sizes // self.batch_size)  # (K,): how many of each
        rows = np.repeat(np.arange(count), batches)
        index = np.arange(len(rows)) - np.repeat(np.cumsum(batches) - batches, batches)  # within its client's
        quotas = sizes[rows] // batches[rows] + (index < sizes[rows] % batches[rows])
        clients = population.client_ids[order][rows]
        if self.turns != "side by side":
            return BatchPlan(population, np.arange(len(rows) + 1), clients, quotas)
        by_step = np.argsort(index, kind="stable")
        offsets = np.concatenate(([0], np.cumsum(np.bincount(index))))
        return BatchPlan(population, offsets, clients[by_step], quotas[by_step])
