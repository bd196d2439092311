"""Which server, or servers, a client calls."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence

from forwardpass.wire.hosts import is_loopback as is_loopback_host

_ADDRESS = re.compile(r"\[(?P<six>[^\]]+)\]:\d+|(?P<four>[\d.]+):\d+")

_ADDRESS_SCHEMES = re.compile(r"(?:ipv4|ipv6|dns)(?=:)")


def joined(target: str | Sequence[str]) -> str:
    """The gRPC target that stands for all of several addresses; one alone is a target already.

    Raises ValueError for what is no address: gRPC looks up one name, not several.
    """
    if isinstance(target, str):
        return target
    addresses = list(target)
    if len(addresses) == 1:
        return addresses[0]
    versions = {_version(address) for address in addresses}
    if len(versions) != 1:
        raise ValueError(f"target: expected addresses, all of IPv4 or all of IPv6, got {addresses}")
    return f"ipv{versions.pop()}:{','.join(addresses)}"


def _version(address: str) -> int:
    match = _ADDRESS.fullmatch(address)
    try:
        return ipaddress.ip_address((match["six"] or match["four"]) if match else "").version
    except ValueError:
        raise ValueError(
            f'target: expected addresses as "10.0.0.1:8500" where there are several, got {address!r}; '
            'a name that stands for several servers is a target of its own, "dns:///NAME:PORT"'
        ) from None


def are_several(target: str) -> bool:
    """Whether a target stands, or may stand, for several servers."""
    return target.startswith("dns:") or (target.startswith(("ipv4:", "ipv6:")) and "," in target)


def hosts(target: str) -> list[str]:
    """The names or addresses of the machines that a gRPC target stands for; those that are no addresses are ""."""
    scheme = _ADDRESS_SCHEMES.match(target)
    addresses = target[scheme.end() :].lstrip(":/") if scheme else target
    return [_host(address) for address in addresses.split(",")]


def _host(address: str) -> str:
    found = re.fullmatch(r"\[(.*)\](?::\d+)?|([^:]*)(?::\d+)?", address)
    return (found[1] or found[2] or "") if found else ""


def is_loopback(target: str) -> bool:
    """Whether a gRPC target is this machine, as far as its name tells."""
    return target.startswith(("unix:", "unix-abstract:")) or all(map(is_loopback_host, hosts(target)))
