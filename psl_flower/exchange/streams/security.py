"""Who may open a stream: a key pair made for the run, and a random token for each client."""

from __future__ import annotations

import datetime
import hmac
import secrets
import threading
from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import ConfigRecord

from psl_flower.errors import ProtocolError

# The name in the certificate: clients check it instead of the address, which proxies may change.
SERVER_NAME = "psl-flower"

# Tells whether server and client are one process: then a handler that waits would wait for itself.
PROCESS_ID = secrets.token_hex(16)

# Clocks may differ, and a run may take long; the key is forgotten with the run.
_BEFORE = datetime.timedelta(days=1)
_AFTER = datetime.timedelta(days=366)


@dataclass(frozen=True)
class Identity:
    """A private key and its self-signed certificate, both PEM."""

    key: bytes
    certificate: bytes


def make_identity() -> Identity:
    """Make a key pair (ECDSA on P-256) and a certificate for `SERVER_NAME`."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, SERVER_NAME)])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BEFORE)
        .not_valid_after(now + _AFTER)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(SERVER_NAME)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    return Identity(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
        certificate.public_bytes(pem),
    )


@dataclass(frozen=True)
class Ticket:
    """What a client needs to open its stream; travels inside a Flower message.

    Parameters
    ----------
    address : str
        ``host:port``.
    certificate : bytes
        The only one to trust, PEM.
    session : str
        Names the run of the strategy.
    token : str
        The client's secret.
    process : str
        The server's `PROCESS_ID`.
    """

    address: str
    certificate: bytes
    session: str
    token: str
    process: str = PROCESS_ID

    def encode(self) -> ConfigRecord:
        """Return it as a record."""
        return ConfigRecord(dict(self.__dict__))

    @staticmethod
    def decode(record: ConfigRecord | None) -> Ticket:
        """Return the ticket a record holds, or raise ProtocolError."""
        if record is None:
            raise ProtocolError("an attach message needs a ConfigRecord named 'attach'")
        for name, kind in _FIELDS.items():
            if type(record.get(name)) is not kind:
                raise ProtocolError(f"an attach message needs {name!r} of type {kind.__name__}")
        return Ticket(**{name: record[name] for name in _FIELDS})  # type: ignore[arg-type]

    def __repr__(self) -> str:
        return f"Ticket({self.address}, session {self.session})"  # never the token


_FIELDS = {"address": str, "certificate": bytes, "session": str, "token": str, "process": str}


class Tokens:
    """The tokens of one session. Safe for threads."""

    def __init__(self) -> None:
        self.session = secrets.token_hex(8)
        self._tokens: dict[int, str] = {}
        self._lock = threading.Lock()

    def issue(self, node: int) -> str:
        """Return a new token for a node; the one it had is of no use any more."""
        token = secrets.token_urlsafe(32)
        with self._lock:
            self._tokens[node] = token
        return token

    def refusal(self, session: str, node: int, token: str, *, use: bool = False) -> str | None:
        """Return why a token is refused, or None; with `use`, it is accepted this once only."""
        with self._lock:
            expected = self._tokens.get(node)
            # compared in constant time, and always: how long a refusal takes tells nothing
            right = hmac.compare_digest((expected or "").encode(), token.encode("utf-8", "replace"))
            if session != self.session:
                return "its session is not this run's"
            if expected is None:
                return "no token was given to it, or it was used before"
            if not right:
                return "wrong token"
            if use:
                del self._tokens[node]
            return None
