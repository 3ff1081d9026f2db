"""A real Flower deployment on this machine: SuperLink and SuperNodes as processes of their own, stopped at the end.

For tests, and to try out what a deployment does before there is one::

    python -m psl_flower.app.deployment . --num-supernodes 2 --tls -c "num-server-rounds=2"
"""

from __future__ import annotations

import argparse
import datetime
import ipaddress
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from psl_flower.app.local import LocalSuperLink, free_ports, stop_group
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
            with (self.home / f"supernode-{partition}.log").open("wb") as log:
                self.supernodes.append(
                    subprocess.Popen(
                        command,
                        cwd=self._folder,
                        env={**share, **self.environment},
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )

    def stop(self) -> None:
        """Stop all of them, and what they started."""
        while self.supernodes:
            stop_group(self.supernodes.pop())
        super().stop()


def make_certificates(folder: Path) -> None:
    """Write ``ca.crt``, and ``server.crt`` and ``server.key`` for 127.0.0.1 and localhost, valid for 30 days."""
    now = datetime.datetime.now(datetime.UTC)
    keys = {name: ec.generate_private_key(ec.SECP256R1()) for name in ("ca", "server")}
    authority = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "psl-flower example CA")])
    for name, key in keys.items():
        is_ca = name == "ca"
        subject = authority if is_ca else x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(authority)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=30))
            .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(keys["ca"].public_key()), critical=False)
        )
        if not is_ca:
            here = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
            builder = builder.add_extension(x509.SubjectAlternativeName(here), critical=False)
        certificate = builder.sign(keys["ca"], hashes.SHA256())
        (folder / f"{name}.crt").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    key_file = folder / "server.key"
    key_file.touch(mode=0o600)
    key_file.write_bytes(
        keys["server"].private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Run a Flower app on a deployment of its own, stopped at the end.")
    parser.add_argument("app", nargs="?", default=".", help="folder with the app's pyproject.toml (default: this one)")
    parser.add_argument("--num-supernodes", type=int, default=2, help="SuperNodes (default: 2)")
    parser.add_argument("--tls", action="store_true", help="encrypt Flower's own connections, too")
    parser.add_argument("-c", "--run-config", action="append", default=[], help="overrides, as flwr run takes them")
    parser.add_argument("--home", help="FLWR_HOME to use (default: a temporary one)")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="psl-flower-") as temporary:
        try:
            with LocalDeployment(options.home or temporary, options.num_supernodes, tls=options.tls) as deployment:
                deployment.run(options.app, run_config=options.run_config)
        except RuntimeError as error:
            print(error, file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
