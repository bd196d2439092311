"""Which servers a target stands for."""

from __future__ import annotations

import pytest

import forwardpass_client
from forwardpass_client import targets


@pytest.mark.parametrize(
    "target, expected",
    [
        ("models:8500", "models:8500"),
        (["models:8500"], "models:8500"),
        (["10.0.0.1:1", "10.0.0.2:2"], "ipv4:10.0.0.1:1,10.0.0.2:2"),
        (("[::1]:1", "[::2]:1"), "ipv6:[::1]:1,[::2]:1"),
    ],
)
def test_several_addresses_are_one_target(target, expected):
    assert targets.joined(target) == expected


@pytest.mark.parametrize("target", [["a:1", "b:1"], ["10.0.0.1:1", "b:1"], ["10.0.0.1", "10.0.0.2:1"], []])
def test_an_invalid_address_in_a_list_is_refused(target):
    with pytest.raises(ValueError, match=r"target: expected (each address of a list|only IPv4 or only IPv6)"):
        forwardpass_client.connect(target)


def test_addresses_of_two_kinds_are_refused():
    with pytest.raises(ValueError, match="only IPv4 or only IPv6"):
        targets.joined(["10.0.0.1:1", "[::1]:1"])


@pytest.mark.parametrize(
    "target, several",
    [
        ("models:8500", False),
        ("dns:///models:8500", True),
        ("ipv4:10.0.0.1:1", False),
        ("ipv4:10.0.0.1:1,10.0.0.2:1", True),
        ("unix:/run/models", False),
    ],
)
def test_targets_that_can_stand_for_several_servers_are_recognized(target, several):
    assert targets.are_several(target) is several


@pytest.mark.parametrize(
    "target, expected",
    [
        ("localhost:8500", True),
        ("localhost", True),
        ("127.0.0.1:8500", True),
        ("127.8.8.8:1", True),
        ("[::1]:8500", True),
        ("ipv4:127.0.0.1:1,127.0.0.1:2", True),
        ("ipv6:[::1]:1", True),
        ("dns:localhost:1", True),
        ("dns:///localhost:1", True),
        ("unix:/run/forwardpass.sock", True),
        ("example.org:8500", False),
        ("10.0.0.1:8500", False),
        ("0.0.0.0:8500", False),
        ("localhost.example.org:1", False),
        ("ipv4:127.0.0.1:1,10.0.0.1:2", False),
        ("dns://10.0.0.1/localhost:1", False),
        ("dns:///example.org:1", False),
        ("[::2]:1", False),
        ("xds:///localhost", False),
        ("", False),
    ],
)
def test_targets_are_this_machine_or_may_be_another(target, expected):
    assert targets.is_loopback(target) is expected
