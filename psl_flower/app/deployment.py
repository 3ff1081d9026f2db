"""A real Flower deployment on this machine: SuperLink and SuperNodes as processes of their own, stopped at the end.

For tests, and to try out what a deployment does before there is one: ``psl-flower deploy`` runs an app on it.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from psl_flower.app.certificates import make_certificates
from psl_flower.app.local import LocalSuperLink, free_ports
from psl_flower.threads import available_cores


class LocalDeployment(LocalSuperLink):
    """A SuperLink and SuperNodes on loopback; a context manager.

    Parameters
    ----------
    home : path
        FLWR_HOME of all of them, with their logs. Made if it is not there.
    num_supernodes : int
        SuperNodes; they get ``partition-id`` and ``num-partitions`` in their node configuration.
    folder : path, optional
        Where they run. Default: the current one.
    tls : bool
        Whether Flower's own connections are encrypted, with certificates made for it. Streams always are.
    """

    def __init__(
        self, home: str | Path, num_supernodes: int = 2, folder: str | Path | None = None, *, tls: bool = False
    ) -> None:
        super().__init__(home, folder)
        self._num_supernodes, self._tls = num_supernodes, tls
        self.supernodes: list[subprocess.Popen[bytes]] = []

    def _superlink_options(self) -> list[str]:
        if not self._tls:
            return ["--insecure"]
        make_certificates(self.home)
        names = {"--ssl-ca-certfile": "ca.crt", "--ssl-certfile": "server.crt", "--ssl-keyfile": "server.key"}
        return [word for option, name in names.items() for word in (option, str(self.home / name))]

    def _connection_config(self) -> str:
        return f'root-certificates = "{self.home / "ca.crt"}"\n' if self._tls else super()._connection_config()

    def _start_nodes(self, address: str) -> None:
        # all clients compute at the same time, here on one machine
        share = {"OMP_NUM_THREADS": str(max(1, available_cores() // self._num_supernodes))}
        for partition, port in enumerate(free_ports(self._num_supernodes)):
            command = ["flower-supernode", "--superlink", address, "--host", "127.0.0.1", "--port", str(port)]
            command += ["--root-certificates", str(self.home / "ca.crt")] if self._tls else ["--insecure"]
            command += ["--node-config", f"partition-id={partition} num-partitions={self._num_supernodes}"]
            self.supernodes.append(self._spawn(command, f"supernode-{partition}.log", **share))

    def stop(self) -> None:
        """Stop all of them, and what they started."""
        self._stop(*self.supernodes)
        self.supernodes.clear()
        super().stop()
