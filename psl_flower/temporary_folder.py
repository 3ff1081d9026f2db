"""Whether Ray's sockets have room in the paths of the temporary folder."""

from __future__ import annotations

import os
import sys

from psl_flower.errors import ConfigError

# Ray's sockets have paths below its temporary folder; the system limits those of sockets, here without the final zero.
_SOCKET = f"/ray/session_2026-12-31_23-59-59_999999_{os.getpid()}/sockets/plasma_store"
_SOCKET_PATH_LIMIT = 103 if sys.platform == "darwin" else 107


def check_temporary_folder() -> None:
    """Refuse a temporary folder in which Ray's sockets would have longer paths than the system allows."""
    names = ["RAY_TMPDIR", "TMPDIR"] if sys.platform.startswith("linux") else ["RAY_TMPDIR"]  # as Ray has it
    name = next((name for name in names if name in os.environ), "")
    folder = os.environ.get(name, "")
    length, most = len(os.fsencode(folder)), _SOCKET_PATH_LIMIT - len(_SOCKET)
    if length > most:
        raise ConfigError(
            f"{name} must have at most {most} bytes, or the paths of Ray's sockets are longer than the system allows, "
            f"got {length} in {folder!r}: set {name}=/tmp before the SuperLink starts"
        )
