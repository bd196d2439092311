"""gRPC targets: the server, or the replicas, that a client calls."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence

from forwardpass.wire.hosts import is_loopback as is_loopback_host

_ADDRESS = re.compile(r"\[(?P<six>[^\]]+)\]:\d+|(?P<four>[\d.]+):\d+")

_HOST_AND_PORT = re.compile(r"(?:\[[^\]\s]+\]|[^:\s]+):(?P<port>\d{1,9})")

_ADDRESS_SCHEMES = re.compile(r"(?:ipv4|ipv6|dns)(?=:)")


# Schemes that people write out of habit from HTTP: to gRPC "http" would be the name of a host.
_FOREIGN_SCHEME = re.compile(r"(?P<scheme>https?|grpcs?|tcp|h2c?)://(?P<rest>[^/]*)", re.IGNORECASE)
_OTHER_SCHEME = re.compile(r"(?:unix|unix-abstract|xds|vsock|google-c2p|passthrough):")


def joined(target: str | Sequence[str]) -> str:
    """The gRPC target of one server, or of all addresses in a list.

    Raises TypeError or ValueError for an invalid address. The message gives the address to write instead.
    """
    if isinstance(target, str):
        return _checked(target)
    if isinstance(target, (bytes, bytearray)):
        raise TypeError(
            f'target: expected a str such as "localhost:8500", got {type(target).__name__}: decode it with .decode()'
        )
    if not isinstance(target, Sequence):
        example = f"localhost:{target}" if isinstance(target, int) else "localhost:8500"
        raise TypeError(f'target: expected "host:port" such as "{example}", got {type(target).__name__}')
    addresses = list(target)
    for address in addresses:
        if not isinstance(address, str):
            raise TypeError(f'target: expected addresses such as "10.0.0.1:8500", got {type(address).__name__}')
    if len(addresses) == 1:
        return _checked(addresses[0])
    versions = {_version(address) for address in addresses}
    if len(versions) != 1:
        raise ValueError(f"target: expected only IPv4 or only IPv6 addresses, got {addresses}")
    return _checked(f"ipv{versions.pop()}:{','.join(addresses)}")


def _checked(target: str) -> str:
    """The target. Raises ValueError where it has a foreign scheme, no port, or a port out of range."""
    foreign = _FOREIGN_SCHEME.match(target)
    if foreign is not None:
        tls = ", tls=True" if foreign["scheme"].lower() in ("https", "grpcs") else ""
        raise ValueError(
            f'target: expected "host:port" without a scheme, got {target!r}: write connect("{foreign["rest"]}"{tls})'
        )
    if _OTHER_SCHEME.match(target):
        return target
    scheme = _ADDRESS_SCHEMES.match(target)
    # After the slashes of "dns://AUTHORITY/" stands the name.
    addresses = target[scheme.end() + 1 :] if scheme else target
    if "," in addresses and (scheme is None or scheme[0] == "dns"):
        raise ValueError(
            f"target: expected one address, got {target!r}: pass several as a list, {addresses.split(',')}"
        )
    for address in addresses.rpartition("/")[2].split(","):
        if "%" in address:
            # Encoded, as gRPC accepts it in a URI.
            continue
        found = _HOST_AND_PORT.fullmatch(address)
        if found is None:
            advice = f'give the port of the server, such as "{address.strip() or "localhost"}:8500"'
            if address.count(":") > 1:
                advice = f'write an IPv6 address in brackets, such as "[{address}]:8500"'
            raise ValueError(f'target: expected "host:port", got {target!r}: {advice}')
        if not 1 <= int(found["port"]) <= 65535:
            raise ValueError(f"target: expected a port from 1 to 65535, got {found['port']} in {target!r}")
    return target


def _version(address: str) -> int:
    match = _ADDRESS.fullmatch(address)
    try:
        return ipaddress.ip_address((match["six"] or match["four"]) if match else "").version
    except ValueError:
        raise ValueError(
            f'target: expected each address of a list in the form "10.0.0.1:8500", got {address!r}: '
            'for a name that stands for several servers, pass "dns:///NAME:PORT" instead of a list'
        ) from None


def are_several(target: str) -> bool:
    """Whether a target stands, or may stand, for several replicas."""
    return target.startswith("dns:") or (target.startswith(("ipv4:", "ipv6:")) and "," in target)


def listed(target: str) -> list[str]:
    """The addresses of a target that lists several; [] for any other."""
    return target[len("ipv4:") :].split(",") if are_several(target) and not target.startswith("dns:") else []


def named(target: str) -> tuple[str, int] | None:
    """The host and port of a target that is one name for several servers; None for any other.

    None also for a name that a certain DNS server resolves, as in "dns://10.0.0.1/NAME:PORT": Python cannot ask it.
    """
    found = re.fullmatch(r"dns:(?:///)?([^/:,]+):(\d+)", target)
    return (found[1], int(found[2])) if found else None


def of_address(address: str) -> str:
    """The gRPC target of one replica at an address such as "10.0.0.1:8500" or "[::1]:8500"."""
    return f"ipv{_version(address)}:{address}"


def beginning_with(target: str, address: str) -> str:
    """A target that lists several addresses, with one of them in front."""
    return target[: len("ipv4:")] + ",".join([address, *(one for one in listed(target) if one != address)])


def hosts(target: str) -> list[str]:
    """The host names or addresses in a gRPC target; "" for a part that is no address."""
    scheme = _ADDRESS_SCHEMES.match(target)
    addresses = target[scheme.end() :].lstrip(":/") if scheme else target
    return [_host(address) for address in addresses.split(",")]


def _host(address: str) -> str:
    found = re.fullmatch(r"\[(.*)\](?::\d+)?|([^:]*)(?::\d+)?", address)
    return (found[1] or found[2] or "") if found else ""


def is_loopback(target: str) -> bool:
    """Whether a gRPC target is this machine, as far as its name tells."""
    return target.startswith(("unix:", "unix-abstract:")) or all(map(is_loopback_host, hosts(target)))
