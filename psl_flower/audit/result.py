"""What an audit found: trainings with their findings, as figures over seeds, and as tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from psl_flower.audit.finding import Finding, Gallery


@dataclass(frozen=True, eq=False, kw_only=True)
class Case:
    """One training and what attacks found in it.

    Parameters
    ----------
    cut : str
    defence : str
        What the clients' defences are called.
    seed : int
    accuracy : float
    bytes_a_round : int
    seconds : float
        Of the training, of a processor.
    findings : list of Finding
    galleries : list of Gallery
    idle : list of str
        Attacks that had nothing to attack.
    """

    cut: str
    defence: str
    seed: int
    accuracy: float
    bytes_a_round: int
    seconds: float
    findings: list[Finding] = field(default_factory=list)
    galleries: list[Gallery] = field(default_factory=list)
    idle: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON can have it; pictures are files of their own."""
        plain = {name: value for name, value in vars(self).items() if name not in ("findings", "galleries")}
        return {**plain, "findings": [finding.to_dict() for finding in self.findings]}


@dataclass(frozen=True, eq=False, kw_only=True)
class Line:
    """A figure over all seeds.

    Parameters
    ----------
    cut, defence : str
    attack, party, measure : str
    values, floors : tuple of float
        A seed each.
    leaks : bool
        Whether it is more than chance, for most seeds.
    interval : (float, float) or None
        Of the only seed.
    p_value : float or None
        Of the only seed.
    detection : bool
        Whether it is no leak, but how well clients notice.
    """

    cut: str
    defence: str
    attack: str
    party: str
    measure: str
    values: tuple[float, ...]
    floors: tuple[float, ...]
    leaks: bool
    interval: tuple[float, float] | None
    p_value: float | None
    detection: bool

    @property
    def value(self) -> float:
        """The mean."""
        return float(np.mean(self.values))

    def sure(self) -> str:
        """Return how sure it is, in words."""
        if len(self.values) > 1:
            return f"± {np.std(self.values, ddof=1):.3f}"
        if self.p_value is not None:
            return f"p = {self.p_value:.3f}"
        return "" if self.interval is None else "{:.3f} to {:.3f}".format(*self.interval)


@dataclass(frozen=True, eq=False)
class AuditResult:
    """What an audit found.

    Parameters
    ----------
    cases : list of Case
    settings : dict
        What was audited, and on what machine, as JSON can have it.
    """

    cases: list[Case]
    settings: dict[str, Any]

    def lines(self) -> list[Line]:
        """Return the figures, seeds put together, in the order in which they were found."""
        groups: dict[tuple[str, str, str, str], list[Finding]] = {}
        for case in self.cases:
            for finding in case.findings:
                groups.setdefault((case.cut, case.defence, finding.attack, finding.measure), []).append(finding)
        return [_line(cut, defence, found) for (cut, defence, _, _), found in groups.items()]

    def value(self, attack: str, measure: str, *, cut: str | None = None, defence: str | None = None) -> float:
        """Return the mean of a figure over seeds, of the first cut and defence unless they are named.

        Raises
        ------
        KeyError
            If there is none.
        """
        for line in self.lines():
            asked = cut in (None, line.cut) and defence in (None, line.defence)
            if asked and (line.attack, line.measure) == (attack, measure):
                return line.value
        raise KeyError(f"no {measure!r} of {attack!r}")

    def markdown(self) -> str:
        """Return all as tables in Markdown: a table of prices, a table of leaks for each cut and defence."""
        text = ["# What leaks", "", *_prices(self.cases)]
        found = _grouped(self.lines())
        idle = {(case.cut, case.defence): case.idle for case in self.cases}
        for (cut, defence), nothing in idle.items():
            text += ["", f"## Cut {cut}, {defence}"]
            if (cut, defence) in found:
                text += ["", *_table(found[cut, defence])]
            if nothing:
                text += ["", f"Had nothing to attack here, which is no sign of safety: {', '.join(nothing)}."]
        return "\n".join(text) + "\n"


def _line(cut: str, defence: str, found: Sequence[Finding]) -> Line:
    first = found[0]
    alone = len(found) == 1
    return Line(
        cut=cut,
        defence=defence,
        attack=first.attack,
        party=first.party,
        measure=first.measure,
        values=tuple(each.value for each in found),
        floors=tuple(each.floor for each in found),
        leaks=sum(each.leaks for each in found) * 2 > len(found),
        interval=(first.low, first.high) if alone and first.low is not None and first.high is not None else None,
        p_value=first.p_value if alone else None,
        detection=first.detection,
    )


def _grouped(lines: Iterable[Line]) -> dict[tuple[str, str], list[Line]]:
    groups: dict[tuple[str, str], list[Line]] = {}
    for line in lines:
        groups.setdefault((line.cut, line.defence), []).append(line)
    return groups


def _table(lines: Iterable[Line]) -> list[str]:
    rows = ["| attack | by | measure | found | 95 % | where nothing leaks | leaks |", "|---|---|---|---|---|---|---|"]
    for line in lines:
        floor = float(np.mean(line.floors))
        verdict = "" if line.detection else "**yes**" if line.leaks else "no"
        cells = (line.attack, line.party, line.measure, f"{line.value:.3f}", line.sure(), f"{floor:.3f}", verdict)
        rows.append("| " + " | ".join(cells) + " |")
    return rows


def _prices(cases: Iterable[Case]) -> list[str]:
    rows = ["| cut | defence | accuracy | MB a round | training (CPU s) |", "|---|---|---|---|---|"]
    groups: dict[tuple[str, str], list[Case]] = {}
    for case in cases:
        groups.setdefault((case.cut, case.defence), []).append(case)
    for (cut, defence), some in groups.items():
        accuracy = np.array([case.accuracy for case in some])
        spread = f" ± {accuracy.std(ddof=1):.3f}" if len(some) > 1 else ""
        size, seconds = (float(np.mean([getattr(c, name) for c in some])) for name in ("bytes_a_round", "seconds"))
        rows.append(f"| {cut} | {defence} | {accuracy.mean():.3f}{spread} | {size / 1e6:.2f} | {seconds:.1f} |")
    return rows
