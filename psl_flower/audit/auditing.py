"""``audit``: train with each cut and defence, attack what was recorded, report."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from psl_flower.audit.attacks import ACTIVE, ATTACKS
from psl_flower.audit.finding import Finding
from psl_flower.audit.quiet import warning_once
from psl_flower.audit.rehearsal import Data, Setting, prepared, rehearse
from psl_flower.audit.result import AuditResult, Case
from psl_flower.audit.target_epsilon import TargetEpsilon, apart
from psl_flower.checks import check_choice, check_int
from psl_flower.client.defending import UNDEFENDED_SUMS
from psl_flower.data import Examples
from psl_flower.errors import ConfigError
from psl_flower.privacy import Defence
from psl_flower.split.model import cut_model
from psl_flower.strategy.progress import clock

Say = Callable[[str], None]
ModelFn = Callable[[int], nn.Module]

_LEAST_EXAMPLES = 16  # of a client: what is learned from fewer says nothing


def audit(
    model: nn.Module | ModelFn,
    train: Any,
    test: Any,
    *,
    cuts: str | Sequence[str | None] | None = None,
    tail: str | None = None,
    defences: Mapping[str, Sequence[Defence | TargetEpsilon]] | None = None,
    attacks: Iterable[str] | None = None,
    num_clients: int = 8,
    num_rounds: int = 3,
    batch_size: int = 64,
    optimizer: Callable[[Any], torch.optim.Optimizer] | None = None,
    secure_aggregation: bool = False,
    examples: int = 2000,
    seeds: Sequence[int] = (0,),
    output_dir: str | Path | None = None,
    say: Say | None = None,
) -> AuditResult:
    """Measure what a curious server can learn from what crosses a cut, by attacks on a real training.

    For each cut, set of defences and seed, a classifier is trained by the package's own clients and strategy, and what
    the server sends and receives in the last round is recorded. Attacks see the recording, the weights and the data of
    half of the clients, who are in league with the server (or which it invented, with public data); what they find out
    of the other half is compared with the truth.

    Parameters
    ----------
    model : nn.Module or callable
        The model with its first weights; or a function of the seed that makes it. Batch norm before the cut is replaced
        (see `psl_flower.replace_batch_norm`).
    train, test : map-style dataset
        Rows (x, y): x one tensor, y a class. Nobody trains on `test`.
    cuts : str or sequence of str
        Qualified names of first server-side submodules; None for a `SplitModel`.
    tail : str, optional
        Qualified name of the first submodule that is back on the clients.
    defences : dict of str to sequence of Defence, optional
        What the clients do about it, by the name it has in the report: see `psl_flower.privacy.defences`, and
        `psl_flower.audit.TargetEpsilon` for differential privacy of the model. Default: ``{"none": ()}``.
    attacks : iterable of str, optional
        Some of `psl_flower.audit.ATTACKS` and `ACTIVE`. Default: all. Those that have nothing to attack find nothing.
    num_clients : int
        K, at least 2.
    num_rounds, batch_size, optimizer, secure_aggregation
        As in `psl_flower.ParallelSplitLearning`; the optimizer is SGD with learning rate 0.02 and momentum 0.9 by
        default.
    examples : int
        Largest number of training examples, and of test examples, that are used: the first of a random order.
    seeds : sequence of int
        Each decides data split, batches and the attacks' randomness, for a training of its own.
    output_dir : path, optional
        Where the report is written; None for nowhere.
    say : callable, optional
        Takes a line that says how far it is. Default: prints it to standard error. ``lambda line: None`` is silent.

    Returns
    -------
    AuditResult

    Raises
    ------
    ConfigError
        If an argument is out of range, or the data is of another form; before anything is trained.
    """
    check_int(num_clients, "num_clients", least=2)
    for name, value in (("num_rounds", num_rounds), ("batch_size", batch_size), ("examples", examples)):
        check_int(value, name, least=1)
    every = [*ATTACKS, *ACTIVE]
    chosen = [check_choice(name, "an attack", every) for name in (every if attacks is None else attacks)]
    all_cuts = [cuts] if cuts is None or isinstance(cuts, str) else list(cuts)
    all_defences = dict(defences) if defences else {"none": ()}
    if not all_cuts or not seeds:
        raise ConfigError(f"an audit needs at least one cut and one seed, got cuts {all_cuts} and seeds {list(seeds)}")
    known, others = (_read(data, examples, name) for data, name in ((train, "training data"), (test, "test data")))
    num_classes = int(max(known[1].max(), others[1].max())) + 1
    if len(known[1]) < _LEAST_EXAMPLES * num_clients:
        raise ConfigError(
            f"an audit needs at least {_LEAST_EXAMPLES} training examples a client, got {len(known[1])} for "
            f"{num_clients} clients: give more data, or lower num_clients"
        )
    for cut in all_cuts:  # refused now, not after the trainings of those before it
        some = model if isinstance(model, nn.Module) else model(seeds[0])
        cut_model(prepared(some, cut, tail), cut, tail)
    for defence in all_defences.values():
        apart(defence)
    progress = _Progress(len(all_cuts) * len(all_defences) * len(seeds), say or _to_stderr)
    cases, seen = list[Case](), set[str]()
    for cut in all_cuts:
        for label, defence in all_defences.items():
            for seed in seeds:
                setting = Setting(
                    model=model if isinstance(model, nn.Module) else model(seed),
                    cut=cut,
                    tail=tail,
                    train=known,
                    test=others,
                    num_classes=num_classes,
                    num_clients=num_clients,
                    num_shadow=num_clients // 2,
                    num_rounds=num_rounds,
                    batch_size=batch_size,
                    optimizer=optimizer or _sgd,
                    secure_aggregation=secure_aggregation,
                    defences=defence,
                    seed=seed,
                )
                with warning_once(UNDEFENDED_SUMS, seen):
                    cases.append(_case(setting, label, chosen, progress))
    settings = {
        "model": type(setting.model).__name__,
        "tail": tail,
        "clients": num_clients,
        "shadow clients": num_clients // 2,
        "rounds": num_rounds,
        "batch size": batch_size,
        "secure aggregation": secure_aggregation,
        "training examples": len(known[1]),
        "test examples": len(others[1]),
        "seeds": list(seeds),
    }
    result = AuditResult(cases, settings)
    if output_dir is not None:
        from psl_flower.audit.report import save_report  # matplotlib takes a second: only those who use it pay

        save_report(result, output_dir)
    return result


def _case(setting: Setting, label: str, attacks: Sequence[str], progress: _Progress) -> Case:
    where = f"cut {setting.cut or 'by hand'}, {label}, seed {setting.seed}"
    progress.begin(where, 1 + len(attacks), "training")
    run = rehearse(setting)
    case = Case(
        cut=setting.cut or "by hand",
        defence=label,
        seed=setting.seed,
        accuracy=run.accuracy,
        bytes_a_round=run.bytes_a_round,
        seconds=run.seconds,
    )
    if run.epsilon is not None:  # no attack, but what bounds all that are on the model
        case.findings.append(
            Finding(attack="any", party="who gets the model", measure="epsilon, at most", value=run.epsilon, floor=0.0)
        )
    for name in attacks:
        progress.next(name)
        found = ACTIVE[name](setting) if name in ACTIVE else ATTACKS[name](run.scene)
        case.findings.extend(found.findings)
        if found.gallery is not None:
            case.galleries.append(found.gallery)
        if not found.findings:
            case.idle.append(name)
    progress.end()
    return case


def _read(data: Any, most: int, name: str) -> Data:
    """Return examples as one tensor of inputs and one of labels."""
    rows = np.random.default_rng(0).permutation(len(Examples(data, name=name)))[:most]
    inputs, labels = Examples(data, name=name).batch(rows)
    if not isinstance(inputs, torch.Tensor) or not inputs.is_floating_point():
        raise ConfigError(f"an audit reads inputs that are one tensor of floats, those of the {name} are not")
    if not isinstance(labels, torch.Tensor) or labels.ndim != 1 or labels.dtype != torch.int64 or labels.min() < 0:
        raise ConfigError(f"an audit reads labels that are class indices, (N,) int64, those of the {name} are not")
    return inputs, labels


def _sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.02, momentum=0.9)


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class _Progress:
    """Says what is being done, and when all will be done."""

    def __init__(self, cases: int, say: Say) -> None:
        self._cases, self._say, self._begin = cases, say, time.monotonic()
        self._done, self._part, self._parts, self._where = 0, 0, 1, ""

    def begin(self, where: str, parts: int, doing: str) -> None:
        self._where, self._part, self._parts = where, -1, parts
        self.next(doing)

    def next(self, doing: str) -> None:
        self._part += 1
        share = (self._done + self._part / self._parts) / self._cases
        passed = time.monotonic() - self._begin
        eta = f"  ETA {clock(passed * (1 - share) / share)}" if share else ""
        self._say(f"{self._done + 1}/{self._cases}  {self._where}: {doing}{eta}")

    def end(self) -> None:
        self._done += 1
