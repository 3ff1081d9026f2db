"""What the server is told of a client's classes; see ``psl_flower.data.classes``."""

from __future__ import annotations

import logging

from psl_flower.client.client import SplitClient
from psl_flower.data import ClassNumbers
from psl_flower.errors import ConfigError
from psl_flower.failures import IN_LOG, without_values
from psl_flower.methods.base import SplitMethod

log = logging.getLogger("flwr.psl_flower")


def told_classes(method: SplitMethod, client: SplitClient) -> ClassNumbers | None:
    """Return digests of the names of a client's classes, with their numbers, where the server is sent its labels.

    Nothing where labels stay, or a defence replaces them: which classes a client has says something of them.

    Raises
    ------
    ConfigError
        If the client's data contradict each other.
    """
    tells = method.sends_labels() and client.told_labels is None
    try:
        found = client.class_numbers()
    except ConfigError as exc:
        if tells:
            raise
        log.error("client %s: %s", client.partition_id, exc)
        raise ConfigError(without_values(str(exc)) + IN_LOG) from exc
    return found.digests() if tells and found is not None else None
