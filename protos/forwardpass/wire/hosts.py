"""Network hosts: whether one is this machine."""

from __future__ import annotations

import ipaddress


def is_loopback(host: str) -> bool:
    """Whether a host name or IP address is this machine, judged by its text alone.

    "localhost" and the loopback addresses of IPv4 and IPv6 are. Any other name is not: it is not resolved.
    """
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
