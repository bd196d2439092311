"""Which hosts are this machine."""

from __future__ import annotations

import pytest

from forwardpass.wire import hosts


@pytest.mark.parametrize(
    "host, expected",
    [
        ("localhost", True),
        ("127.0.0.1", True),
        ("127.8.8.8", True),
        ("::1", True),
        ("0.0.0.0", False),
        ("::", False),
        ("::2", False),
        ("10.0.0.1", False),
        ("localhost.example.org", False),
        ("example.org", False),
        ("[::1]", False),
        ("127.0.0.1:8500", False),
        ("", False),
    ],
)
def test_only_localhost_and_loopback_addresses_are_this_machine(host, expected):
    assert hosts.is_loopback(host) is expected
