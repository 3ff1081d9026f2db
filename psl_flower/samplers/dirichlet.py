"""LDS: quotas drawn from client probabilities that a Dirichlet prior leans toward the stragglers."""

from __future__ import annotations

import numpy as np

from psl_flower.batch_plan import BatchPlan
from psl_flower.checks import check_choice, check_float, check_int
from psl_flower.extras import check_extra
from psl_flower.population import Delays, Population
from psl_flower.samplers.base import ORDERS, Sampler
from psl_flower.typing import FloatArray, IntArray

# Note [EM iterations]: with c = 1 the EM converges in 5 to 20 iterations. Where about c * sample_size clients or more
# share the data, the prior's alpha_k fall below 1, its mode lies on the border of the simplex, and the EM creeps toward
# it for tens of thousands of iterations an epoch, only to leave most clients out. Stopping early keeps pi closer to the
# clients' shares r, with which it starts: quicker, and of lower deviation (K = 1,000, c = 1: .22 instead of .26).
_MAX_ITERATIONS = 100

# Note [Clients alike]: where all clients hold the same classes in the same proportions, labels cannot tell clients
# apart: the likelihood is flat, and EM only walks to the prior's mode, alpha_k - 1, which drops small clients and for
# small c collapses to one client a step. The posterior is then the prior, and we take its mean, alpha / sum(alpha),
# which for delta = 0 is r itself, as in UGS. "The same" is what a chi-square test of homogeneity at this level says.
_ALIKE_LEVEL = 0.01

# exp() of more overflows; a client this far out in the prior has all of its mass anyway
_MAX_EXPONENT = 500.0


class LatentDirichletSampler(Sampler):
    """LDS (arXiv 2407.15738 v2): stragglers are drawn more, run out early, and later steps go without them.

    An epoch has T = ceil(N / B) steps of nearly equal size, as with UGS: sizes differ by at most 1. The quotas of a
    step are multinomial with probabilities pi, capped by what each client has left, the shortfall redrawn among the
    others. pi is the MAP estimate (EM, started from r) of the mixture that explains the labels still to come under the
    prior Dirichlet(alpha), ``alpha_k = r_k * c * Z * exp(delta * z_k)``; z_k is client k's standardised delay. It is
    estimated at the start and again whenever a client runs out, over the clients that remain; in between it stays.

    Parameters
    ----------
    batch_size : int
        Global batch size B.
    seed : int
        Not negative.
    delta : float
        How hard stragglers are favoured, at least 0. 0 behaves like UGS and needs no delays; 0.25 to 1 trades deviation
        for time; above 2 only raises deviation. It helps against latency; where only the seconds an example differ,
        quotas drawn in bulk from slow clients cost what they save.
    c : float
        Confidence in the prior, above 0. With 1 the prior's variance is that of drawing `sample_size` examples; less
        lets the labels decide more: lower deviation for the same delta, but fewer clients a step and a longer build.
        Keep ``c * sample_size`` above the number of clients: below it clients begin to be left out.
    sample_size : int
        S, labels the posterior counts as seen, at least 1; N - 1 at most is used.
    tolerance : float
        EM stops when an iteration moves less probability than this (L1), above 0. Less only costs time.
    order : {"shuffled", "natural"}
        "shuffled" (default) mixes the finished steps: an epoch's time is a sum, so it costs nothing, and the classes of
        stragglers do not all come first. "natural" is the paper's.

    Raises
    ------
    ConfigError
        If an argument is out of range.
    """

    needs_label_counts = True

    def __init__(
        self,
        batch_size: int,
        *,
        seed: int = 0,
        delta: float = 1.0,
        c: float = 1.0,
        sample_size: int = 1000,
        tolerance: float = 1e-3,
        order: str = "shuffled",
    ) -> None:
        check_extra("scipy", "samplers", "the sampler lds")
        super().__init__(batch_size, seed=seed)
        self.delta = check_float(delta, "delta", least=0)
        self.c = check_float(c, "c", above=0)
        self.sample_size = check_int(sample_size, "sample_size", least=1)
        self.tolerance = check_float(tolerance, "tolerance", above=0)
        self.order = check_choice(order, "order", ORDERS)
        self.needs_delays = self.delta > 0

    def _plan(self, population: Population, rng: np.random.Generator) -> BatchPlan:
        counts = population.label_counts
        assert counts is not None  # plan() has checked it
        total = population.num_examples
        sample_size = min(self.sample_size, total - 1)
        shares = population.sizes / total  # r
        label_shares = counts / population.sizes[:, None]  # beta, (K, C)
        prior = shares * self.c * prior_strength(sample_size, total)  # alpha
        if self.delta and population.delays is not None:
            scores = standardised_delays(population.delays, self.batch_size)
            prior = prior * np.exp(np.minimum(self.delta * scores, _MAX_EXPONENT))

        num_steps = -(-total // self.batch_size)
        batch_sizes = np.diff(np.arange(num_steps + 1) * total // num_steps)
        left = population.sizes.copy()
        rows: list[IntArray] = []  # of `population`, a step
        quotas: list[IntArray] = []
        active = np.flatnonzero(left)
        probabilities = None
        for size in batch_sizes:
            if probabilities is None:  # the first step, or a client ran out
                active = active[left[active] > 0]
                start = shares[active] / shares[active].sum()
                if clients_alike(counts[active]):
                    mass = np.maximum(prior[active], 0)
                    probabilities = mass / mass.sum() if mass.sum() > 0 else start
                else:
                    histogram = left[active] @ label_shares[active]
                    histogram *= min(sample_size, histogram.sum()) / histogram.sum()
                    probabilities = map_mixture(start, prior[active], label_shares[active], histogram, self.tolerance)
            drawn = capped_multinomial(rng, int(size), probabilities, left[active], shares[active])
            taking = np.flatnonzero(drawn)
            rows.append(active[taking])
            quotas.append(drawn[taking])
            left[active] -= drawn
            if not left[active].all():
                probabilities = None
        plan = BatchPlan(
            population,
            np.concatenate(([0], np.cumsum([len(part) for part in rows]))),
            population.client_ids[np.concatenate(rows)],
            np.concatenate(quotas),
        )
        return plan.shuffled(rng) if self.order == "shuffled" else plan


def prior_strength(sample_size: int, total: int) -> float:
    """Return Z: the shares of S examples drawn without replacement from N vary as a Dirichlet(r * Z) does."""
    return sample_size * (total - 1) / (total - sample_size) - 1


def standardised_delays(delays: Delays, batch_size: int) -> FloatArray:
    """Return (K,) ``z_k = (d_k - mean d) / std d``, ``d_k = latency_k + per_sample_k * B / K``; 0 if all are equal."""
    seconds = delays.latency + delays.per_sample * (batch_size / len(delays))
    spread = float(seconds.std())
    if spread <= 1e-9 * float(seconds.max()):  # equal delays differ by rounding
        return np.zeros(len(seconds))
    scores: FloatArray = (seconds - seconds.mean()) / spread
    return scores


def map_mixture(
    start: FloatArray, prior: FloatArray, label_shares: FloatArray, histogram: FloatArray, tolerance: float
) -> FloatArray:
    """Return the client probabilities that best explain a label histogram under a Dirichlet prior, by EM.

    Parameters
    ----------
    start : (A,) float64
        Where EM starts; also the answer if an iteration leaves no client any probability.
    prior : (A,) float64
        alpha.
    label_shares : (A, C) float64
        beta; rows add up to 1.
    histogram : (C,) float64
        h, how many labels of each class were seen.
    tolerance : float
        Stop when an iteration moves less probability (L1) than this.

    Returns
    -------
    (A,) float64
        Adds up to 1; zeros are possible.
    """
    probabilities, pull = start, prior - 1
    ratio = np.zeros(len(histogram))
    for _ in range(_MAX_ITERATIONS):
        expected = probabilities @ label_shares
        np.divide(histogram, expected, out=ratio, where=expected > 0)
        # sum_c h_c gamma_ck with gamma_ck = pi_k beta_kc / sum_j pi_j beta_jc
        updated = np.maximum(probabilities * (label_shares @ ratio) + pull, 0)
        mass = updated.sum()
        if mass <= 0:
            return start
        updated /= mass
        moved = np.abs(updated - probabilities).sum()
        probabilities = updated
        if moved <= tolerance:
            break
    return probabilities


def clients_alike(counts: IntArray) -> bool:
    """Return whether a chi-square test cannot tell the clients' label distributions apart, counts (A, C).

    Note [Clients alike] says what for.
    """
    from scipy.special import chdtrc  # here: see linear_program.py

    table = counts[:, counts.any(axis=0)]
    freedom = (table.shape[0] - 1) * (table.shape[1] - 1)
    if not freedom:
        return True
    expected = np.outer(table.sum(axis=1), table.sum(axis=0)) / table.sum()
    statistic = float(((table - expected) ** 2 / expected).sum())
    return bool(chdtrc(freedom, statistic) > _ALIKE_LEVEL)


def capped_multinomial(
    rng: np.random.Generator, total: int, probabilities: FloatArray, room: IntArray, fallback: FloatArray
) -> IntArray:
    """Draw `total` items, at most ``room[k]`` of kind k; what a full kind cannot give is redrawn from the others.

    Parameters
    ----------
    rng : np.random.Generator
        Source of the draw.
    total : int
        At most the sum of `room`.
    probabilities : (A,) float64
        Add up to 1.
    room : (A,) int64
        Caps, at least 0.
    fallback : (A,) float64
        Positive weights that take over when only kinds of probability 0 have room.

    Returns
    -------
    (A,) int64
        Adds up to `total`.
    """
    drawn = np.minimum(rng.multinomial(total, probabilities), room)
    while (missing := total - int(drawn.sum())) > 0:
        open_kinds = drawn < room
        weights = np.where(open_kinds, probabilities, 0)
        if not weights.any():
            weights = np.where(open_kinds, fallback, 0)
        drawn = np.minimum(drawn + rng.multinomial(missing, weights / weights.sum()), room)
    return drawn
