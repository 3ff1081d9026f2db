"""Work orders in frames, and who gives a sum together: columns, an entry a client."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from psl_flower.errors import ProtocolError
from psl_flower.exchange.fields import field, integers, limited, node_of
from psl_flower.exchange.limits import MAX_ENTRIES
from psl_flower.exchange.tensors import Packer, Unpacker
from psl_flower.privacy import Cohort
from psl_flower.privacy.cohort import KEY_BYTES
from psl_flower.protocol import MAX_CLASSES, Orders

_SCALARS = ("seed", "epoch", "step")
_COLUMNS = ("clients", "starts", "counts")
_TABLES = ("class_starts", "class_counts")


def encode_orders(orders: Orders, packer: Packer) -> dict[str, Any]:
    """Return orders as a header, with columns."""
    header: dict[str, Any] = {name: getattr(orders, name) for name in _SCALARS}
    header |= {name: packer.column(getattr(orders, name)) for name in _COLUMNS}
    header |= {name: packer.column(table) for name in _TABLES if (table := getattr(orders, name)) is not None}
    if orders.checksums is not None:
        header["checksums"] = packer.column(orders.checksums)
    header["left-out"] = {str(client): list(rows) for client, rows in orders.left_out.items()}
    header["put-off"] = {str(client): [list(each) for each in moved] for client, moved in orders.put_off.items()}
    if orders.drawing is not None:
        header["drawing"] = orders.drawing
    header["test"] = orders.test
    return header


def decode_orders(header: Mapping[str, Any], length: int, unpacker: Unpacker) -> Orders:
    """Return the orders of so many clients.

    Raises
    ------
    ProtocolError
        If they are none.
    """
    scalars: dict[str, Any] = {name: field(header, name, int) for name in _SCALARS}
    if "drawing" in header:
        scalars["drawing"] = field(header, "drawing", int)
    columns: dict[str, Any] = {name: unpacker.column(header.get(name), torch.int64, (length,)) for name in _COLUMNS}
    least = min(*scalars.values(), *(column.min(initial=0) for column in columns.values()))
    if least < 0 or columns["counts"].min(initial=1) < 1:
        raise ProtocolError("orders must not hold negative numbers, and count at least one example a client")
    tables: dict[str, Any] = {
        name: unpacker.column(header[name], torch.int64, (length, None)) for name in _TABLES if name in header
    }
    if any(table.shape[1] > MAX_CLASSES for table in tables.values()):
        raise ProtocolError(f"orders are of at most {MAX_CLASSES} classes")
    if len({table.shape for table in tables.values()}) > 1 or len(tables) == 1:
        raise ProtocolError("class_starts and class_counts must name the same classes")
    checksums = unpacker.column(header["checksums"], torch.int64, (length,)) if "checksums" in header else None
    left_out = {
        node_of(client): tuple(integers({"rows": rows}, "rows"))
        for client, rows in field(header, "left-out", dict).items()
    }
    put_off = {node_of(client): _put_off(moved) for client, moved in field(header, "put-off", dict).items()}
    return Orders(
        **scalars,
        **columns,
        **tables,
        left_out=left_out,
        put_off=put_off,
        checksums=checksums,
        test=field(header, "test", bool),
    )


def _put_off(moved: Any) -> tuple[tuple[int, int, int], ...]:
    found = []
    for each in limited(moved, MAX_ENTRIES) if isinstance(moved, list) else [moved]:
        if not isinstance(each, list) or len(each) != 3 or not all(type(n) is int and -1 <= n < 2**62 for n in each):
            raise ProtocolError(f"expected class, start and count of examples that are put off, got {each!r:.80}")
        found.append((each[0], each[1], each[2]))
    return tuple(found)


def encode_cohort(cohort: Cohort, packer: Packer) -> dict[str, Any]:
    """Return a cohort as a header, with columns."""
    return {
        "session": cohort.session,
        "attempt": cohort.attempt,
        "degree": cohort.degree,
        "places": dict(cohort.places),
        "max-norm": cohort.max_norm,
        "clients": packer.column(cohort.clients),
        "counts": packer.column(cohort.counts),
        "keys": packer.column(cohort.keys),
    }


def decode_cohort(header: Mapping[str, Any], unpacker: Unpacker) -> Cohort:
    """Return a cohort.

    Raises
    ------
    ProtocolError
        If it is none.
    """
    clients = unpacker.column(header.get("clients"), torch.int64, (None,))
    length = len(clients)
    cohort = Cohort(
        session=field(header, "session", str),
        attempt=field(header, "attempt", int),
        degree=field(header, "degree", int),
        places={name: field({name: n}, name, int) for name, n in field(header, "places", dict).items()},
        max_norm=None if header.get("max-norm") is None else field(header, "max-norm", float),
        clients=clients,
        counts=unpacker.column(header.get("counts"), torch.int64, (length,)),
        keys=unpacker.column(header.get("keys"), torch.uint8, (length, KEY_BYTES)),
    )
    if (
        cohort.attempt < 0
        or not 0 <= cohort.degree < max(length, 1)
        or any(abs(n) > 1000 for n in cohort.places.values())
        or not (cohort.max_norm is None or 0 < cohort.max_norm < math.inf)
    ):
        raise ProtocolError("attempt, degree, places or largest norm of a cohort are out of range")
    return cohort
