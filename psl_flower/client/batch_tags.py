"""What a client gives the server to bring back, so that it sees whether a batch it draws again is the same.

A checksum of the batch would do, but tell the server more: who knows the inputs reads labels from it by trying, and
whoever has a guess at an example confirms it. So what leaves is made with the client's secret, and says nothing to
those who do not have it.
"""

from __future__ import annotations

import hmac
from collections.abc import Sequence

import numpy as np

from psl_flower.data.batch import check_drawn_again
from psl_flower.errors import ProtocolError
from psl_flower.failures import Kind
from psl_flower.orders import Orders, WorkOrder
from psl_flower.privacy import Secret
from psl_flower.typing import IntArray

_HALF = 32  # bits of either half: which secret, and what of the batch


def batch_tags(checksums: Sequence[int], orders: Orders, secrets: Sequence[Secret]) -> IntArray:
    """Return a tag for each client's batch, (A,) int64, not negative.

    Parameters
    ----------
    checksums : sequence of int
        Of what each client drew, see `psl_flower.data.checksum`.
    orders : Orders
    secrets : sequence of Secret
        Of each client.
    """
    each = zip(checksums, orders.each(), secrets, strict=True)
    return np.array([_tag(found, order, secret) for found, order, secret in each], dtype=np.int64)


def check_tags(now: IntArray, before: IntArray, name: str, *, by_secret: bool = False) -> None:
    """Raise ConfigError unless what was drawn again is what was drawn before.

    A client that has another secret by now, since its process died, cannot tell, and goes on; but where examples are
    drawn by the secret, they are others, and what came before is lost.

    Parameters
    ----------
    now, before : (A,) int64
        `batch_tags`.
    name : str
        What data they are of, for the message: "training data".
    by_secret : bool
        Whether clients drew by it.

    Raises
    ------
    ConfigError
        If a batch differs.
    ProtocolError
        If a client has lost the secret that it drew by.
    """
    for one, other in zip(now.tolist(), before.tolist(), strict=True):
        if one >> _HALF == other >> _HALF:
            check_drawn_again(one, other, name)
        elif by_secret:
            raise ProtocolError(
                "the client's process was another when the step began: it cannot draw those examples again",
                Kind.UNREACHABLE,
            )


def _tag(checksum: int, order: WorkOrder, secret: Secret) -> int:
    which, key = secret.tag_keys
    # of the order, too: where another order gives the same batch, that does not show
    about = f"{checksum} {order.seed} {order.epoch} {order.step} {order.start} {order.count} {order.test}"
    what = hmac.digest(key, about.encode(), "sha256")
    return int.from_bytes(which[:4] + what[:4], "big") & (2**63 - 1)
