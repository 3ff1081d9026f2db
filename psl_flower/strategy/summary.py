"""What went wrong in a run, and where its time went."""

from __future__ import annotations

import logging
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from psl_flower.failures import Failure, Kind, failure_lines
from psl_flower.protocol import Reply
from psl_flower.strategy.progress import clock

log = logging.getLogger("flwr.psl_flower")

_SLOWEST = 5  # clients shown
_TOLD_SECONDS = 0.5  # less is not worth a word

# What a run spends its time on, and how that is called in the log. At every moment it is one of these.
SPENT = {
    "start": "connecting and describing clients",
    "planning": "planning",
    "server": "server's parts",
    "clients": "clients",
    "wire": "wire",
    "waiting": "waiting in vain",
    "evaluation": "evaluation",
    "records": "records and checkpoints",
    "other": "other",
}


@dataclass
class RunSummary:
    """Counts faults and adds up time, over a run and those that it resumes.

    Parameters
    ----------
    steps_committed : int
        Steps that changed the model.
    steps_short : int
        Of these, steps that some client was lost from.
    steps_redone : int
        Attempts that nothing came of, because too little arrived.
    steps_recomputed : int
        Times a step's forward and backward pass was repeated, without a client lost before its own backward pass.
    steps_skipped, examples_skipped : int
        Steps left out because they were not finite, or empty.
    examples_redone : int
        Examples that had to be asked for again.
    examples_unseen : dict of int to int
        By client: examples that an epoch went without, over all epochs.
    excluded : dict of int to str
        Clients that the run goes without because of a mistake or of replies far out of bounds, and which.
    failures : dict of int to int
        By client: requests it did not answer as asked.
    refused : dict of str to int
        The same by kind.
    evaluation_failures, evaluation_refused : dict
        The same two for requests of split evaluation.
    ignored : dict of str to int
        Replies nobody waited for: late ones, and duplicates.
    clipped : int
        Contributions of clients whose norm was too large.
    replans : int
        Times the rest of an epoch was planned anew.
    resumed : int
        Times the run went on from a checkpoint.
    seconds : dict of str to float
        What the run's time, on the wall clock, was spent on, see `SPENT`. "clients" is the work of the process that
        took longest, exchange by exchange and by its own clock, simulated delays that were slept included; "wire" is
        what exchanges took beyond it, or "waiting", where a client did not answer; attempts at steps that
        nothing came of, and pauses after them, are "waiting", too.
    client_seconds, client_examples : dict of int to float, int
        Work of each client, and examples it was about.
    """

    steps_committed: int = 0
    steps_short: int = 0
    steps_redone: int = 0
    steps_recomputed: int = 0
    steps_skipped: int = 0
    examples_skipped: int = 0
    examples_redone: int = 0
    examples_unseen: Counter[int] = field(default_factory=Counter)
    excluded: dict[int, str] = field(default_factory=dict)
    failures: Counter[int] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    evaluation_failures: Counter[int] = field(default_factory=Counter)
    evaluation_refused: Counter[str] = field(default_factory=Counter)
    ignored: Counter[str] = field(default_factory=Counter)
    clipped: int = 0
    replans: int = 0
    resumed: int = 0
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float, dict.fromkeys(SPENT, 0.0)))
    client_seconds: defaultdict[int, float] = field(default_factory=lambda: defaultdict(float))
    client_examples: Counter[int] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._now, self._since = ["other"], time.monotonic()

    @contextmanager
    def spending(self, on: str) -> Iterator[None]:
        """Count the time within as spent on one of `SPENT`, but for what is counted as something else within it."""
        self._count()
        self._now.append(on)
        try:
            yield
        finally:
            self._count()
            self._now.pop()

    def _count(self) -> None:
        now = time.monotonic()
        self.seconds[self._now[-1]] += now - self._since
        self._since = now

    def spent(self) -> dict[str, float]:
        """Return what the time until now was spent on."""
        self._count()
        return dict(self.seconds)

    def in_vain(self, before: Mapping[str, float]) -> None:
        """Count all time since `before`, what `spent` returned then, as waiting: nothing came of it."""
        lost = sum(self.spent().values()) - sum(before.values())
        self.seconds.update(before)
        self.seconds["waiting"] += lost

    def exchanged(self, reply: Reply, seconds: float, counts: Mapping[int, int]) -> None:
        """Count an exchange that took `seconds`, so far on the "wire"; `counts` are the examples asked of a client."""
        replied = {client: s for client, s in reply.seconds.items() if client not in reply.failures}
        worked = min(reply.busy, seconds)
        silent = any(failure.kind.is_outage for failure in reply.failures.values())
        self.seconds["wire"] -= seconds if silent else worked
        self.seconds["waiting"] += seconds - worked if silent else 0.0
        self.seconds["clients"] += worked
        for client, its_seconds in replied.items():
            self.client_seconds[client] += its_seconds
            self.client_examples[client] += counts[client]

    def refuse(self, failures: Mapping[int, Failure]) -> None:
        """Count failures; by client."""
        self.refused.update(failure.kind.value for failure in failures.values())
        self.failures.update(failures.keys())

    def refuse_in_evaluation(self, failures: Mapping[int, Failure]) -> None:
        """Count failures of split evaluation; by client."""
        self.evaluation_refused.update(failure.kind.value for failure in failures.values())
        self.evaluation_failures.update(failures.keys())

    def slowest(self) -> dict[int, float]:
        """Return seconds per example of the slowest clients, the slowest first."""
        speed = {k: s / n for k, s in self.client_seconds.items() if (n := self.client_examples[k])}
        return dict(sorted(speed.items(), key=lambda item: -item[1])[:_SLOWEST])

    def faultless(self) -> bool:
        """Return whether nothing went wrong."""
        skipped = self.steps_skipped + self.steps_redone + self.clipped
        refused = self.refused or self.evaluation_refused or self.ignored
        return not (skipped or refused or self.examples_unseen or self.excluded)

    def report(self) -> dict[str, Any]:
        """Return what ``summary.json`` holds."""
        self._count()
        counts = {k: v for k, v in self.state_dict().items() if k not in ("client_seconds", "client_examples")}
        return {**counts, "slowest_clients_seconds_per_example": {str(k): v for k, v in self.slowest().items()}}

    def log(self, name: Callable[[int], str] = "client {}".format) -> None:
        """Log it; `name` returns how a client is called."""
        self._count()
        spent = sorted(self.seconds.items(), key=lambda item: -item[1])
        log.info("Time: %s", ", ".join(f"{clock(s)} {SPENT[on]}" for on, s in spent if s >= _TOLD_SECONDS))
        if slowest := self.slowest():
            shown = ", ".join(f"{k} ({1000 * s:.2f} ms an example)" for k, s in slowest.items())
            log.info("Slowest clients: %s", shown)
        if self.faultless():
            log.info("Faults: none in %d steps", self.steps_committed)
            return
        log.warning(
            "Faults: %d of %d steps went on without some client, %d attempts were redone, %d examples asked for again",
            *(self.steps_short, self.steps_committed, self.steps_redone, self.examples_redone),
        )
        if self.refused:
            worst = ", ".join(f"{k} ({n})" for k, n in self.failures.most_common(_SLOWEST))
            log.warning("Failures: %s; clients that failed most: %s", _shown(self.refused), worst)
        if self.evaluation_refused:
            worst = ", ".join(f"{k} ({n})" for k, n in self.evaluation_failures.most_common(_SLOWEST))
            log.warning("Failures in evaluation: %s; of clients: %s", _shown(self.evaluation_refused), worst)
        if self.ignored:
            log.warning("Replies nobody waited for: %s", _shown(self.ignored))
        if self.clipped:
            log.warning("%d contributions of clients were scaled down to max_gradient_norm", self.clipped)
        if self.steps_skipped:
            log.warning("%d steps of %d examples were not finite", self.steps_skipped, self.examples_skipped)
        if self.excluded:
            mistakes = {client: Failure(Kind.RAISED, why) for client, why in self.excluded.items()}
            log.warning(
                "The run went without clients that made a mistake: %s", "; ".join(failure_lines(mistakes, name))
            )
        if self.examples_unseen:
            log.warning("Examples not seen, by client: %s", _shown(self.examples_unseen))

    def state_dict(self) -> dict[str, Any]:
        """Return everything as plain numbers and dicts with string keys (for JSON)."""
        return {
            name: {str(k): v for k, v in value.items()} if isinstance(value, dict) else value
            for name, value in vars(self).items()
            if not name.startswith("_")
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        for name, value in state.items():
            if isinstance(value, Mapping):
                getattr(self, name).clear()
                key = str if name in ("refused", "evaluation_refused", "ignored", "seconds") else int
                getattr(self, name).update({key(k): v for k, v in value.items()})
            else:
                setattr(self, name, value)


def _shown(counts: Mapping[Any, int]) -> str:
    items: Iterable[tuple[Any, int]] = sorted(counts.items(), key=lambda item: -item[1])
    return ", ".join(f"{key} {n}" for key, n in items)
