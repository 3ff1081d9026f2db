"""Sums that leave a process masked: the seam between what stages give, and ``psl_flower.privacy``.

A masked sum is a dict of trees. "values" are those of the sum in fixed point, with a zero where a client has None;
"present" counts, leaf by leaf, for how many it is there; where gradients are to be scaled down, "scaled" counts the
clients that did so, and adds up their factors (in parts of one, see `FACTOR`); all are masked. "like" has an empty
tensor of each leaf's dtype. Where a stage gives nothing at all (gradients, in evaluation), there is nothing to mask.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from psl_flower import tree
from psl_flower.client.client import SplitClient
from psl_flower.client.process import RunState
from psl_flower.errors import ProtocolError, PSLError
from psl_flower.failures import Failure, Kind
from psl_flower.methods.base import Stage
from psl_flower.privacy import DPSGD, FACTOR, Cohort, OutOfRangeError, Party, encode, fingerprint
from psl_flower.protocol import Kind as LeafKind
from psl_flower.protocol import Leaf, Request
from psl_flower.typing import IntArray

log = logging.getLogger("flwr.psl_flower")


def describe_key(state: RunState, node: int, session: str) -> bytes:
    """Return a client's public key in a run, made when it is first asked for; empty without secure aggregation.

    Raises
    ------
    ProtocolError
        If the server does not aggregate securely, and the client does.
    """
    if state.secure is None:
        return b""
    if not session:
        raise ProtocolError(
            "this client gives sums only, masked: give the server the same, ParallelSplitLearning(..., "
            "secure_aggregation=True), or the client none"
        )
    party = state.parties.get(node)
    if party is None or party.session != session:
        party = state.parties[node] = Party(session)
    return party.key


def agree(
    state: RunState, stage: Stage, request: Request, clients: Sequence[SplitClient]
) -> tuple[Masking | None, dict[int, Failure]]:
    """Take note of the sums that clients are to give; return what masks them, and why some do not give them."""
    cohort, orders = request.cohort, request.orders
    if LeafKind.SUM not in stage.outputs.values() or orders is None or (state.secure is None and cohort is None):
        return None, {}
    failures, parties = {}, {}
    version = " ".join(weights.version for weights in request.weights.values())
    for node, client, order in zip(request.nodes, clients, orders.each(), strict=True):
        try:
            if cohort is None or state.secure is None:
                raise ProtocolError(
                    "this client gives sums masked, the server asks for its own"
                    if cohort is None
                    else "the server asks for masked sums: split_client_app(..., secure_aggregation=True)"
                )
            if node not in state.parties:
                raise ProtocolError("this process has no key of the client: it must describe itself anew", Kind.KEY)
            data = "test" if order.test else "train"
            rows = client.draw(order)
            state.parties[node].agree(cohort, state.secure, order.client, stage.name, version, rows, data)
            parties[order.client] = state.parties[node]
        except ProtocolError as error:
            failures[node] = error.failure()
        except PSLError:
            continue  # it cannot draw its batch: that is told when it is to
    if cohort is None:
        return None, failures
    _tell_keys(state, cohort)
    return Masking(cohort, request, stage.name, parties, state.private), failures


def _tell_keys(state: RunState, cohort: Cohort) -> None:
    """Log the fingerprints of keys that this process has not met before, for people to compare."""
    keys = {int(client): cohort.key(i) for i, client in enumerate(cohort.clients)}
    own = {party.key for party in state.parties.values()}
    new = {client: key for client, key in keys.items() if key not in state.keys_told}
    if new:
        state.keys_told.update(new.values())
        told = [
            ", ".join(f"{c} {fingerprint(k)}" for c, k in new.items() if (k in own) is mine) for mine in (True, False)
        ]
        log.info("Secure aggregation: own keys, by client: %s; keys that the server names: %s", *told)


class Masking:
    """Masks the sums of a stage.

    Parameters
    ----------
    cohort : Cohort
    request : Request
        Has the parameters that sums of gradients are of.
    stage : str
    parties : dict of int to Party
        Those of this process, by client id.
    private : DPSGD, optional
        Has the clients add noise to gradients: each its share, so that their sum has it once.
    """

    def __init__(
        self,
        cohort: Cohort,
        request: Request,
        stage: str,
        parties: Mapping[int, Party],
        private: DPSGD | None = None,
    ) -> None:
        self._cohort, self._stage, self._parties, self._private = cohort, stage, parties, private
        self._training = request.orders is not None and not request.orders.test
        self._parameters = {name: weights.parameters for name, weights in request.weights.items()}

    def mask(self, leaves: Mapping[str, Leaf], clients: IntArray) -> dict[str, Leaf]:
        """Return the leaves of some clients of this process, with their sums masked.

        Raises
        ------
        ProtocolError
            If a value is not finite, or too large.
        """
        sums = {name: leaf.value for name, leaf in leaves.items() if self._is_masked(name, leaf)}
        whole, numbers = {}, []
        for name, value in sums.items():
            value, scaled = self._scaled(name, value, clients)
            present, filled = _filled(value, self._parameters.get(name))
            if self._private is not None and self._training and name in self._parameters:
                present = np.ones_like(present)  # there is noise, at least
                filled = self._private.noised(filled, self._private.share(len(clients), len(self._cohort)))
            whole[name] = filled
            numbers += [present, *scaled, *(self._encoded(name, leaf) for leaf in tree.leaves(filled))]
        if not numbers:
            return dict(leaves)
        total = np.concatenate(numbers)
        self._add_masks(total, clients)
        pieces = iter(torch.split(torch.from_numpy(total), [len(part) for part in numbers]))
        masked = dict(leaves)
        for name, filled in whole.items():
            masked[name] = Leaf(
                LeafKind.SUM,
                {
                    "like": tree.map_leaves(lambda t: torch.empty(0, dtype=t.dtype), filled),
                    "present": next(pieces),
                    **({"scaled": next(pieces)} if self._scales(name) else {}),
                    "values": tree.map_leaves(lambda t: next(pieces).reshape(t.shape), filled),
                },
            )
        return masked

    def _is_masked(self, name: str, leaf: Leaf) -> bool:
        if leaf.kind is not LeafKind.SUM:
            return False
        return bool(tree.leaves(leaf.value)) or (self._training and name in self._parameters)

    def _scales(self, name: str) -> bool:
        return self._cohort.max_norm is not None and name in self._parameters

    def _scaled(self, name: str, value: tree.Tree, clients: IntArray) -> tuple[tree.Tree, list[IntArray]]:
        """Return a client's gradient within the norm that all keep to, and by how much it was scaled down."""
        most, cohort = self._cohort.max_norm, self._cohort
        if most is None or not self._scales(name):
            return value, []
        assert len(clients) == 1, "each client keeps to the norm by itself"
        # of the mean over the batch: a client's own mean is that times the batch over its share
        share = int(cohort.counts[np.searchsorted(cohort.clients, clients[0])]) / int(cohort.counts.sum())
        norm = tree.norm(value) / share
        if not norm > most:
            return value, [np.zeros(2, dtype=np.int64)]
        factor = most / norm
        log.info("client %d: its %s gradient, of norm %.3g, is scaled down to %.3g", clients[0], name, norm, most)
        return tree.map_leaves(lambda t: t * factor, value), [np.array([1, round(factor * FACTOR)])]

    def _encoded(self, name: str, tensor: Tensor) -> IntArray:
        if tensor.is_complex():
            raise ProtocolError(f"{name}: sums of complex numbers cannot be masked")
        if not tree.is_finite(tensor):
            raise ProtocolError(f"{name}: expected finite values to mask, got NaN or infinite ones", Kind.NOT_FINITE)
        flat = tensor.detach().cpu().reshape(-1)
        values = (flat.double() if flat.is_floating_point() else flat).numpy()
        try:
            # with DP-SGD the loss of no example stops a step; what clipped gradients have is noise's, and stays whole
            clip = self._private is not None and name not in self._parameters
            return encode(values, self._cohort.places.get(name, 0), len(self._cohort), clip=clip)
        except OutOfRangeError as error:
            raise ProtocolError(f"{name}: {error}", Kind.RANGE) from error

    def _add_masks(self, total: IntArray, clients: IntArray) -> None:
        """Add the masks that these clients share with those elsewhere; those among themselves cancel."""
        cohort = self._cohort
        neighbours = cohort.neighbours()
        mine = np.flatnonzero(np.isin(cohort.clients, clients))
        for at in mine.tolist():
            party = self._parties[int(cohort.clients[at])]
            others = neighbours[at][~np.isin(neighbours[at], mine)]
            party.add_masks(total, cohort, self._stage, at, others.tolist())


def _filled(value: tree.Tree, parameters: Mapping[str, Tensor] | None) -> tuple[IntArray, tree.Tree]:
    """Return which leaves there are, and the tree with zeros for those that are None."""
    if parameters is None:
        return np.ones(len(tree.leaves(value)), dtype=np.int64), value
    names = sorted(parameters)
    present = np.array([value[name] is not None for name in names], dtype=np.int64)
    return present, {n: torch.zeros_like(parameters[n]) if value[n] is None else value[n] for n in names}
