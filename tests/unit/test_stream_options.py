"""Where a server listens for streams, and what clients are told."""

import pytest

from psl_flower.errors import ConfigError
from psl_flower.exchange.streams.options import StreamOptions, split_address


@pytest.mark.parametrize(
    ("address", "expected"),
    [("127.0.0.1:0", ("127.0.0.1", 0)), ("[::]:9095", ("[::]", 9095)), ("example.org:1", ("example.org", 1))],
)
def test_addresses(address, expected):
    assert split_address(address, "bind") == expected


@pytest.mark.parametrize("address", ["", "host", "host:", "host:x", "host:70000", ":80", "::1", "a:b:80", "[]:80"])
def test_addresses_without_host_or_port_are_refused(address):
    with pytest.raises(ConfigError, match="bind must be host:port"):
        StreamOptions(bind=address)


@pytest.mark.parametrize(
    ("advertise", "address"),
    [
        ("", "0.0.0.0:4711"),
        ("psl.example.org", "psl.example.org:4711"),
        ("10.0.0.1:443", "10.0.0.1:443"),
        ("[::1]", "[::1]:4711"),
    ],
)
def test_what_clients_are_told(advertise, address):
    assert StreamOptions(bind="0.0.0.0:0", advertise=advertise).address(4711) == address
