"""What is let in: every reply is checked here against what its stage gives, before anything is computed with it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from psl_flower.errors import ProtocolError
from psl_flower.exchange.outliers import SPREAD_OF_GRADIENTS, SPREAD_OF_ROWS, NormBounds, row_norms, sum_norm
from psl_flower.failures import Failure
from psl_flower.failures import Kind as FailureKind
from psl_flower.methods.base import Stage
from psl_flower.protocol import Kind, Leaf, Part, Reply, Request
from psl_flower.tree import is_finite, map_leaves, named_leaves
from psl_flower.typing import FloatArray

# What the leaves of a reply look like: dtype and shape without the batch, by path.
Spec = tuple[tuple[str, torch.dtype, tuple[int, ...]], ...]


@dataclass(frozen=True, eq=False)
class Checked:
    """The parts of a reply that passed, and what is wrong with the other clients."""

    parts: list[Part]
    failures: dict[int, Failure]


class Validator:
    """Checks replies against what was asked for; learns what crosses the cuts.

    The server cannot know the shape of the rows beforehand: it is what most clients have sent. Every client has one
    vote a stage, what it sent last; a draw changes nothing, at first the lowest id decides it. So a bad reply to the
    very first request, which may be the only one, shuts nobody out for longer than a step.

    Parameters
    ----------
    outlier_bound : float, optional
        Of norms in training, see `NormBounds`; None: any finite value passes.

    Attributes
    ----------
    bounds : NormBounds or None
    longest : float
        Where rows may differ in length, the second size of a tensor, the most it may be; else 0.
    """

    def __init__(self, outlier_bound: float | None = None, *, longest: float = 0) -> None:
        self._longest = longest
        self.bounds = None if outlier_bound is None else NormBounds(outlier_bound)
        self._everyone: set[int] = set()  # who has ever been asked: one alone has nobody to be compared with
        self._specs: dict[str, Spec] = {}
        self._votes: dict[str, dict[int, Spec]] = {}

    def check(
        self, stage: Stage, request: Request, reply: Reply, expected: Mapping[str, Mapping[str, Tensor]]
    ) -> Checked:
        """Return what passes.

        Parameters
        ----------
        stage : Stage
        request : Request
            By client id, as is `reply`.
        reply : Reply
        expected : dict of str to dict
            What sums must look like, by the name of the output: tensors of the same names, shapes and dtypes. A sum of
            another name is voted on as rows are.
        """
        step = None if request.orders is None else request.orders.step
        counts = dict(zip(request.nodes, request.counts(), strict=True))
        failures, passed, specs = dict(reply.failures), [], {}
        for part in reply.parts:
            try:
                _check_form(part, stage, step)
                if request.cohort is not None:
                    _check_masked(part, expected, scaled=request.cohort.max_norm is not None)
                specs[id(part)] = _spec(part, expected, self._longest)
                passed.append(part)
            except ProtocolError as error:
                failures |= _of_all(part, error.failure())
        sent: dict[int, Spec] = {}
        for part in passed:
            sent.update(dict.fromkeys(part.nodes, specs[id(part)]))
        spec = self._vote(stage.name, sent)
        parts = []
        for part in passed:
            wrong = None if spec is None else _difference(specs[id(part)], spec)
            sums = {} if request.cohort is not None else expected
            guilty = self._values(part, counts, sums) if wrong is None else _of_all(part, wrong)
            guilty = guilty or _other_classes(part, stage, request)
            if request.cohort is None:
                guilty = guilty or self._counted(part, stage)
            failures |= guilty
            parts += _innocent(part, guilty, counts, failures)
        self._everyone.update(request.nodes)
        training = request.orders is not None and not request.orders.test
        if self.bounds is not None and training and len(self._everyone) > 1:
            readable = (Kind.ROWS,) if request.cohort is not None else (Kind.ROWS, Kind.SUM)  # not what is masked
            guilty = self._outliers(self.bounds, stage, parts, counts, readable)
            failures |= guilty
            parts = [each for part in parts for each in _innocent(part, guilty, counts, failures)] if guilty else parts
        if parts:
            if spec is not None:
                self._specs[stage.name] = spec
            self._votes.setdefault(stage.name, {}).update(sent)
        return Checked(parts, dict(sorted(failures.items())))

    def wants_each(self, stage: Stage) -> bool:
        """Return whether a stage's sums must come client by client: no sum of several can be compared with anything."""
        sums = [name for name, kind in stage.outputs.items() if kind is Kind.SUM]
        return self.bounds is not None and not all(map(self.bounds.knows, sums))

    def forget(self, clients: Iterable[int]) -> None:
        """Take their votes from clients that turned out to send what the server's part cannot use."""
        for name, votes in self._votes.items():
            for client in clients:
                votes.pop(client, None)
            if not votes:
                self._specs.pop(name, None)

    def _vote(self, stage: str, sent: Mapping[int, Spec]) -> Spec | None:
        """Return what most clients have sent, these ones last."""
        now = self._specs.get(stage)
        if now is not None and all(spec == now for spec in sent.values()):
            return now
        votes = Counter({**self._votes.get(stage, {}), **sent}.values())
        best = max(votes.values(), default=0)
        if now is not None and votes[now] == best:
            return now
        return next((spec for spec, count in votes.items() if count == best), None)

    def _outliers(
        self,
        bounds: NormBounds,
        stage: Stage,
        parts: list[Part],
        counts: Mapping[int, int],
        readable: tuple[Kind, ...],
    ) -> dict[int, Failure]:
        """Return the clients that sent what is far larger than what all have sent."""
        failures: dict[int, Failure] = {}
        nodes = [node for part in parts for node in part.nodes]
        clients = np.repeat(nodes, [counts[node] for node in nodes])
        total = len(clients)
        for name, kind in stage.outputs.items():
            if name in stage.exact or kind not in readable:
                continue
            # what comes first is what the model makes of the data, what follows on it are gradients
            spread = SPREAD_OF_ROWS if kind is Kind.ROWS and stage.after is None else SPREAD_OF_GRADIENTS
            norms: dict[str, list[FloatArray]] = {}
            for part in parts:
                found = [(path, t) for path, t in named_leaves(part.outputs[name].value, name) if t.is_floating_point()]
                if kind is Kind.ROWS:
                    for path, tensor in found:
                        norms.setdefault(path, []).append(row_norms(tensor))
                else:
                    # of the mean over the batch: a part's own mean is that times the batch over its share
                    share = sum(counts[node] for node in part.nodes) / total
                    norms.setdefault(name, []).append(sum_norm(tensor for _, tensor in found) / share)
            for path, each in norms.items():
                whose = clients if kind is Kind.ROWS else [part.nodes[0] for part in parts]
                reasons = bounds.outliers(path, np.concatenate(each), np.array(whose, dtype=np.int64), spread)
                far = {sender: Failure(FailureKind.OUTLIER, why) for sender, why in reasons.items()}
                if kind is Kind.ROWS:
                    failures |= far
                    continue
                for part in parts:
                    if part.nodes[0] in far:
                        failures |= _of_all(part, far[part.nodes[0]])
        return failures

    def _counted(self, part: Part, stage: Stage) -> dict[int, Failure]:
        """Return the clients of a part that do not count as one can, or say what most others do not."""
        failures: dict[int, Failure] = {}
        for name in stage.counts:
            numbers = [float(n) for _, t in named_leaves(part.outputs[name].value, name) for n in t.flatten()]
            if min(numbers, default=0.0) < 0:
                failures |= _of_all(
                    part, Failure(FailureKind.MALFORMED, f"{name}: expected counts, got {min(numbers)}")
                )
            elif numbers and self.bounds and 0 < 2 * numbers[-1] < len(self._everyone | set(part.nodes)):
                what = f"{name}: it says that its loss or gradients are not finite, the others' are"
                failures |= _of_all(part, Failure(FailureKind.OUTLIER, what))
        return failures

    def _values(
        self, part: Part, counts: Mapping[int, int], expected: Mapping[str, Mapping[str, Tensor]]
    ) -> dict[int, Failure]:
        """Return the clients of a part whose values are not those asked for."""
        failures: dict[int, Failure] = {}
        for name, leaf in part.outputs.items():
            if leaf.kind is Kind.SUM and name in expected:
                try:
                    _check_sum(name, leaf.value, expected[name])
                except ProtocolError as error:
                    failures |= _of_all(part, error.failure())
                continue
            if leaf.kind is Kind.EACH:
                for node, value in zip(part.nodes, leaf.value, strict=True):
                    wrong = [(path, t) for path, t in named_leaves(value, name) if not is_finite(t)]
                    failures |= {node: _not_finite(*wrong[0])} if wrong else {}
                continue
            for path, tensor in named_leaves(leaf.value, name):
                if is_finite(tensor):
                    continue
                if leaf.kind is not Kind.ROWS:
                    failures |= _of_all(part, _not_finite(path, tensor))
                    continue
                pieces = torch.split(tensor, [counts[node] for node in part.nodes])
                failures |= {
                    node: _not_finite(path, rows)
                    for node, rows in zip(part.nodes, pieces, strict=True)
                    if not is_finite(rows)
                }
        return failures


def _of_all(part: Part, failure: Failure) -> dict[int, Failure]:
    """Return it as that of each client of a part, any of whom may be at fault."""
    return dict.fromkeys(part.nodes, replace(failure, joint=len(part.nodes) > 1))


def _innocent(
    part: Part, guilty: Mapping[int, Failure], counts: Mapping[int, int], failures: dict[int, Failure]
) -> list[Part]:
    """Return what is left of a part without some of its nodes; adds those to `failures` that fall with them."""
    wrong = [node for node in part.nodes if node in guilty]
    if not wrong:
        return [part]
    if any(leaf.kind is Kind.SUM for leaf in part.outputs.values()):  # theirs cannot be taken out of it
        failures |= {node: replace(guilty[wrong[0]], joint=True) for node in part.nodes if node not in guilty}
        return []
    rest = [i for i, node in enumerate(part.nodes) if node not in guilty]
    return [_without(part, rest, counts)] if rest else []


def _other_classes(part: Part, stage: Stage, request: Request) -> dict[int, Failure]:
    """Return the clients whose labels are not of the classes that were asked for."""
    orders, sent = request.orders, part.outputs.get("labels")
    if orders is None or orders.class_counts is None or sent is None or "labels" not in stage.exact:
        return {}
    labels = sent.value
    if not isinstance(labels, Tensor) or labels.ndim != 1 or labels.is_floating_point():
        return {}
    at = {node: i for i, node in enumerate(request.nodes)}
    positions = np.array([at[node] for node in part.nodes])
    asked, counts = orders.class_counts[positions], orders.counts[positions]
    num_clients, num_classes = asked.shape
    sent_classes = labels.numpy().clip(-1, num_classes) + 1  # all that is out of range on either side
    cells = np.repeat(np.arange(num_clients), counts) * (num_classes + 2) + sent_classes
    found = np.bincount(cells, minlength=num_clients * (num_classes + 2)).reshape(num_clients, -1)
    wrong = np.pad(asked, ((0, 0), (1, 1))) != found
    failures = {}
    for i in np.flatnonzero(wrong.any(axis=1)):
        which = int(np.flatnonzero(wrong[i, 1:-1])[0])  # one too many elsewhere is one too few here
        failures[part.nodes[i]] = Failure(
            FailureKind.LABELS,
            f"labels: asked for {asked[i, which]} examples of class {which}, as it described its data, got "
            f"{found[i, which + 1]}: SplitClient.labels and the targets of the batches must agree",
        )
    return failures


def _check_form(part: Part, stage: Stage, step: int | None) -> None:
    if part.step != step:
        raise ProtocolError(f"reply to another step: expected step {step}, got {part.step}", FailureKind.STEP)
    kinds = {name: leaf.kind for name, leaf in part.outputs.items()}
    if kinds != dict(stage.outputs):
        shown = [", ".join(f"{n} ({k.value})" for n, k in each.items()) or "nothing" for each in (stage.outputs, kinds)]
        raise ProtocolError(f"{stage.name} gives {shown[0]}, got {shown[1]}")


def _spec(part: Part, expected: Mapping[str, Any], longest: float) -> Spec:
    found: list[tuple[str, torch.dtype, tuple[int, ...]]] = []
    for name, leaf in part.outputs.items():
        if leaf.kind is Kind.SUM and name in expected:
            continue
        values = leaf.value if leaf.kind is Kind.EACH else [leaf.value]
        each = {
            tuple((path, t.dtype, _shape(path, t, leaf.kind, longest)) for path, t in named_leaves(value, name))
            for value in values
        }
        if len(each) > 1:
            raise ProtocolError(f"{name}: expected tensors alike for each of {len(values)} clients", FailureKind.SHAPE)
        found += each.pop()
    return tuple(found)


def _shape(path: str, tensor: Tensor, kind: Kind, longest: float) -> tuple[int, ...]:
    """Return the shape of a row, or of all; -1 for a length that may be any up to the longest."""
    if kind is not Kind.ROWS:
        return tuple(tensor.shape)
    if not longest or tensor.ndim < 2:
        return tuple(tensor.shape[1:])
    if tensor.shape[1] > longest and (tensor.ndim > 2 or not tensor.is_floating_point()):
        raise ProtocolError(
            f"{path}: texts of at most {longest} positions, the model's max_position_embeddings, got "
            f"{tensor.shape[1]}: cut them where they are tokenized",
            FailureKind.SHAPE,
        )
    return (-1, *tensor.shape[2:])


def _difference(spec: Spec, expected: Spec) -> Failure | None:
    """Return how what a client sent differs from what most sent."""
    if spec == expected:
        return None
    if not spec or not expected:
        rule = "all clients must give it, with every batch, or none (what `on_predict` returns, too)"
        got, wanted = (", ".join(path for path, _, _ in each) or "nothing" for each in (spec, expected))
        return Failure(FailureKind.NAMES, f"expected {wanted} as of the others, got {got}: {rule}")
    theirs = {path: (dtype, shape) for path, dtype, shape in spec}
    for path, dtype, shape in expected:
        if path not in theirs:
            return Failure(
                FailureKind.NAMES, f"{path}: expected as of the others, got {', '.join(theirs) or 'nothing'}"
            )
        if theirs[path][1] != shape:
            remedy = "rows must be of one shape at all clients"
            return Failure(FailureKind.SHAPE, f"{path}: shape: expected {shape} a row, got {theirs[path][1]}; {remedy}")
        if theirs[path][0] != dtype:
            return Failure(FailureKind.DTYPE, f"{path}: dtype: expected {dtype}, got {theirs[path][0]}")
    return Failure(FailureKind.NAMES, f"expected {len(expected)} tensors as of the others, got {len(spec)}")


def _check_masked(part: Part, expected: Mapping[str, Mapping[str, Tensor]], *, scaled: bool) -> None:
    """Raise ProtocolError unless sums are masked; of their values nothing can be told.

    See `psl_flower.client.masking` for their form.
    """
    for name, leaf in part.outputs.items():
        if leaf.kind is not Kind.SUM or not named_leaves(leaf.value, name):
            continue
        columns = {"present": len(expected.get(name, ())), **({"scaled": 2} if scaled and name in expected else {})}
        if not isinstance(leaf.value, Mapping) or set(leaf.value) != {"like", "values", *columns}:
            raise ProtocolError(f"{name}: expected a masked sum")
        if name in expected:
            whole = {n: torch.empty_like(t, dtype=torch.int64, device="meta") for n, t in expected[name].items()}
            _check_sum(name, leaf.value["values"], whole)
            numbers = {column: torch.empty(size, dtype=torch.int64) for column, size in columns.items()}
            _check_sum(name, {column: leaf.value[column] for column in columns}, numbers)
            if None in leaf.value["values"].values():
                raise ProtocolError(f"{name}: a masked sum must be whole", FailureKind.NAMES)


def _check_sum(output: str, tensors: Any, expected: Mapping[str, Tensor]) -> None:
    """Raise ProtocolError unless there is a finite tensor, or None, for each of `expected`."""
    if not isinstance(tensors, Mapping):
        raise ProtocolError(f"{output}: expected tensors by name")
    if missing := sorted(set(expected) - set(tensors)):
        raise ProtocolError(f"{output}: {len(missing)} missing, the first is {missing[0]!r}", FailureKind.NAMES)
    if unknown := sorted(set(tensors) - set(expected)):
        raise ProtocolError(
            f"{output}: {len(unknown)} of unknown name, the first is {unknown[0]!r:.80}", FailureKind.NAMES
        )
    for name, tensor in tensors.items():
        like = expected[name]
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise ProtocolError(f"{output} of {name!r}: expected a tensor, got a tree", FailureKind.NAMES)
        if tensor.shape != like.shape:
            shapes = f"expected {tuple(like.shape)}, got {tuple(tensor.shape)}"
            raise ProtocolError(f"{output} of {name!r}: shape: {shapes}", FailureKind.SHAPE)
        if tensor.dtype != like.dtype:
            raise ProtocolError(
                f"{output} of {name!r}: dtype: expected {like.dtype}, got {tensor.dtype}", FailureKind.DTYPE
            )
        if not is_finite(tensor):
            failure = _not_finite(f"{output} of {name!r}", tensor)
            raise ProtocolError(failure.detail, failure.kind)


def _not_finite(name: str, tensor: Tensor) -> Failure:
    wrong = int((~torch.isfinite(tensor)).sum())
    return Failure(FailureKind.NOT_FINITE, f"{name}: expected finite values, got {wrong} NaN or infinite")


def _without(part: Part, kept: list[int], counts: Mapping[int, int]) -> Part:
    """Return the part, which holds no sums, with some of its nodes only, by position."""
    sizes = [counts[node] for node in part.nodes]

    def rows(tensor: Tensor) -> Tensor:
        pieces = torch.split(tensor, sizes)
        return torch.cat([pieces[i] for i in kept])

    def some(leaf: Leaf) -> Leaf:
        if leaf.kind is Kind.ROWS:
            return Leaf(leaf.kind, map_leaves(rows, leaf.value), leaf.exact)
        return Leaf(leaf.kind, [leaf.value[i] for i in kept])

    return Part(
        tuple(part.nodes[i] for i in kept),
        {name: some(leaf) for name, leaf in part.outputs.items()},
        part.step,
        None if part.checksums is None else part.checksums[kept],
    )
