"""Training with differential privacy of what is released, the model (DP-SGD, Abadi et al. 2016, arXiv 1607.00133)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from psl_flower.checks import check_float, check_int
from psl_flower.errors import ProtocolError
from psl_flower.privacy import accounting, subsampling
from psl_flower.privacy.secret import Secret


@dataclass(frozen=True, kw_only=True)
class DPSGD:
    """Each example's gradient is clipped, and noise is added to the sums: nobody can tell from the model who was in it.

    Server and clients need the same. It protects the *model*, after every step, against those who get it: other
    clients, and whoever it is handed to. It does not keep anything from the server, which has activations, gradients at
    the cut and, but for a U shape, labels; and it says nothing of losses and accuracies, which are told without noise.

    Parameters
    ----------
    clip : float
        Largest L2 norm of an example's gradient, of its own loss, over all parts of the model: each of P parts is
        clipped to ``clip / sqrt(P)``.
    noise : float
        Standard deviation of the noise in a step's sum, over `clip`.
    batch_size : int
        The sampler's B. A step's loss is the mean over its examples, so that the gradients of one are clipped to
        ``clip / batch_size``, whatever the step's size.
    examples : int, optional
        N, of all clients together: batches are a `PoissonGlobalSampler`'s, and steps are counted as draws with the rate
        B / N. The sum of a step's losses is divided by B then, not by the step's size.
    delta : float
        For the epsilon that is told: well below one over the number of examples.
    colluding : int
        With secure aggregation clients add the noise, each a share, which it can take away again from what it gets.
        The shares of the others are enough even if so many clients put theirs together.
    spent_rounds : int
        Rounds that the same examples were trained on before, with the same noise; for the server only. A strategy
        counts its own, from one `start` to the next.

    Raises
    ------
    ConfigError
        If a value is out of range.
    """

    clip: float
    noise: float
    batch_size: int
    examples: int | None = None
    delta: float = 1e-5
    colluding: int = 1
    spent_rounds: int = field(default=0, repr=False)

    def __post_init__(self) -> None:
        check_float(self.clip, "clip", above=0)
        check_int(self.batch_size, "batch_size", least=1)
        if self.examples is not None:
            check_int(self.examples, "examples", least=self.batch_size)
        check_int(self.colluding, "colluding", least=0)
        check_int(self.spent_rounds, "spent_rounds", least=0)
        accounting.epsilon(self.noise, 1, self.delta)  # refuses both

    @classmethod
    def for_epsilon(
        cls,
        target_epsilon: float,
        *,
        rounds: int,
        clip: float,
        batch_size: int,
        examples: int | None = None,
        delta: float = 1e-5,
    ) -> DPSGD:
        """Return the options with the least noise that stays within (target_epsilon, delta) after some rounds."""
        noise = accounting.noise_for(target_epsilon, rounds, delta)  # refuses all three
        if examples is not None:
            steps = cls(clip=clip, noise=1, batch_size=batch_size, examples=examples).steps(rounds)
            ((rate, count),) = steps.items()
            noise = subsampling.noise_for_steps(target_epsilon, count, rate, delta)
        return cls(clip=clip, noise=noise, batch_size=batch_size, examples=examples, delta=delta)

    def epsilon(self, rounds: int) -> float:
        """Return what so many rounds give away; see `psl_flower.privacy.accounting`, or `subsampling`."""
        if self.examples is not None:
            return self.epsilon_of_steps(self.steps(rounds))
        return accounting.epsilon(self.noise, rounds, self.delta)

    def epsilon_of_steps(self, steps: Mapping[float, int]) -> float:
        """Return what steps give away, by the rate at which examples were drawn for them."""
        return subsampling.epsilon_of_steps(self.noise, steps, self.delta)

    def steps(self, rounds: int) -> dict[float, int]:
        """Return how many steps so many rounds of a `PoissonGlobalSampler` have, by their rate."""
        assert self.examples is not None, "only then are steps drawn"
        return {self.batch_size / self.examples: -(-self.examples // self.batch_size) * rounds}

    def divisor(self, rows: int) -> int:
        """Return what the losses of so many examples are divided by.

        Where batches vary by chance it is always B: a mean over the batch would tell each client how many are in it.
        """
        return rows if self.examples is None else self.batch_size

    def bound(self, parts: int) -> float:
        """Return the largest norm of an example's gradient of one of so many parts, as it is added up."""
        return self.clip / self.batch_size / math.sqrt(parts)

    def share(self, clients: int, of: int) -> float:
        """Return the share of the noise's variance that some clients add, of all in a sum.

        Raises
        ------
        ProtocolError
            If all of them may collude.
        """
        if of <= self.colluding:
            raise ProtocolError(
                f"a sum of {of} clients, of which {self.colluding} may collude, has noise that they know: it must be "
                "of more clients"
            )
        return clients / (of - self.colluding)

    def noised(self, gradients: Mapping[str, Tensor], share: float = 1.0) -> dict[str, Tensor]:
        """Return the sum of a part's gradients with noise, or with a share of its variance."""
        deviation = self.noise * self.clip / self.batch_size * math.sqrt(share)
        if not deviation:
            return dict(gradients)
        return {name: g + deviation * _normal(g) for name, g in gradients.items()}


def _normal(like: Tensor) -> Tensor:
    """Return standard normal numbers that nobody can draw again."""
    drawn = Secret().uniform(b"", np.zeros(1, dtype=np.int64), like.numel())
    numbers: Tensor = torch.special.ndtri(torch.from_numpy(drawn))
    return numbers.to(like.device, like.dtype).reshape(like.shape)
