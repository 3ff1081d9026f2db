"""Certificates for Flower's own connections, to try a deployment out with.

The streams need none: they have a key pair of their own for each run::

    python -m psl_flower.app.certificates the-server.example.org 192.0.2.7
"""

from __future__ import annotations

import argparse
import datetime
import ipaddress
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from psl_flower.checks import writing_to
from psl_flower.errors import ConfigError

_DNS_NAME = re.compile(r"(\*\.)?[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?")


def make_certificates(folder: Path, hosts: Sequence[str] = ("localhost", "127.0.0.1")) -> None:
    """Write ``ca.crt``, and ``server.crt`` and ``server.key`` for a server that is reached by these names or addresses.

    They are valid for 30 days. The CA's key is not kept. The folder is made where it is not there.

    Raises
    ------
    ConfigError
        If a host is neither a name nor an address, or the folder cannot be written to.
    """
    names = x509.SubjectAlternativeName([_name(host) for host in hosts])
    with writing_to(folder, "--folder"):
        _write(folder, names)


def _write(folder: Path, names: x509.SubjectAlternativeName) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    now = datetime.datetime.now(datetime.UTC)
    keys = {name: ec.generate_private_key(ec.SECP256R1()) for name in ("ca", "server")}
    subjects = {  # who checks a server looks at its alternative names: a common name has 64 characters at most
        name: x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, f"psl-flower example {what}")])
        for name, what in (("ca", "CA"), ("server", "server"))
    }
    for name, key in keys.items():
        is_ca = name == "ca"
        builder = (
            x509.CertificateBuilder()
            .subject_name(subjects[name])
            .issuer_name(subjects["ca"])
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=30))
            .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(keys["ca"].public_key()), critical=False)
        )
        if not is_ca:
            builder = builder.add_extension(names, critical=False)
        certificate = builder.sign(keys["ca"], hashes.SHA256())
        (folder / f"{name}.crt").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    key_file = folder / "server.key"
    key_file.touch(mode=0o600)
    key_file.write_bytes(
        keys["server"].private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )


def _name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        if not _DNS_NAME.fullmatch(host):
            raise ConfigError(
                f"a host must be a name of letters, digits, dots and hyphens, or an address, got {host!r}: give what "
                "clients connect to, without a port; other letters as xn--..."
            ) from None
        return x509.DNSName(host)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Write ca.crt, server.crt and server.key, valid for 30 days.")
    parser.add_argument("hosts", nargs="*", default=["localhost", "127.0.0.1"], help="the server's names and addresses")
    parser.add_argument("--folder", type=Path, default=Path(), help="where to (default: here)")
    options = parser.parse_args(arguments)
    try:
        make_certificates(options.folder, options.hosts)
    except ConfigError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
