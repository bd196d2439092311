"""HTTP proxies: which proxy of the environment gRPC uses for a target."""

from __future__ import annotations

import ipaddress
import os
import urllib.parse

from forwardpass_client import targets

# The variables that gRPC reads, in its order.
_PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")
# gRPC reads only one of the first two. Other programs read NO_PROXY, too.
_EXCEPTIONS = ("no_grpc_proxy", "no_proxy", "NO_PROXY")


def of(target: str) -> str:
    """The proxy for a gRPC target and the variable that names it, as `proxy:3128 (https_proxy)`; "" for none.

    No proxy is used for this machine, nor for a host that an exception names.
    """
    for name in _PROXIES:
        proxy = os.environ.get(name)
        if proxy:
            break
    else:
        return ""
    url = urllib.parse.urlsplit(proxy)
    # gRPC ignores proxies of other schemes.
    if url.scheme != "http" or targets.is_loopback(target):
        return ""
    hosts = targets.hosts(target)
    if hosts and all(map(_is_exception, hosts)):
        return ""
    # Without the user and password that may precede the host.
    return f"{url.netloc.rpartition('@')[2]} ({name})"


def _is_exception(host: str) -> bool:
    entries = ",".join(os.environ.get(name, "") for name in _EXCEPTIONS).split(",")
    return any(_matches(host, entry.strip()) for entry in entries if entry.strip())


def _matches(host: str, entry: str) -> bool:
    """Whether an exception is for a host: `*`, a name with or without a dot before it, or a network."""
    if entry == "*":
        return True
    try:
        return ipaddress.ip_address(host) in ipaddress.ip_network(entry, strict=False)
    except ValueError:
        # A suffix matches, as in gRPC.
        name = entry.lower().lstrip("*").lstrip(".")
        return bool(name) and host.lower().endswith(name)
