"""How a connection is encrypted, and what it shows of its caller."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any, TypeAlias

import grpc

from forwardpass_client import proxies, targets, trace_context
from forwardpass_client.trace_context import Metadata

Token: TypeAlias = str | Callable[[], str]
"""A bearer token, or what is asked for one at each call: it may answer otherwise from one to the next."""

# With one of them the caller has decided on a proxy.
_PROXY_OPTIONS = ("grpc.enable_http_proxy", "grpc.http_proxy")
_TOKEN = re.compile(r"[!-~]+")


@dataclasses.dataclass(frozen=True)
class Tls:
    """An encrypted connection. All files in PEM, as bytes.

    root_certificates: whom to believe that the server is who it says; None for those that come with gRPC.
    certificate, key: who this client is, for a server that asks; with those between it and its root.
    server_name: what the server's certificate names it, where that is not the host of the target.
    """

    root_certificates: bytes | None = None
    certificate: bytes | None = None
    key: bytes | None = dataclasses.field(default=None, repr=False)
    server_name: str | None = None

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.key is None):
            raise ValueError("tls: expected a certificate with its key, got one without the other")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Credentials:
    """What a channel is opened with. Raises ValueError for a token that would be there for all to read."""

    target: str
    tls: Tls | None = None
    token: Token | None = dataclasses.field(default=None, repr=False)
    allow_insecure_token: bool = False

    def __post_init__(self) -> None:
        if self.token is None or self.tls is not None or self.allow_insecure_token or targets.is_loopback(self.target):
            return
        raise ValueError(
            f"token: expected tls beside, for {self.target} is another machine, and whoever is between could read it; "
            "where something else encrypts, say allow_insecure_token=True"
        )

    @property
    def proxy(self) -> str:
        """What the target is called through: see `proxies.of`."""
        return proxies.of(self.target)

    def channel(self, api: Any, options: list[tuple[str, Any]]) -> Any:
        """The channel. api: `grpc` or `grpc.aio`."""
        if not self.proxy and not any(name in _PROXY_OPTIONS for name, _ in options):
            options = [*options, ("grpc.enable_http_proxy", 0)]
        if self.tls is None:
            if self.token is not None and not self.allow_insecure_token:
                # A proxy of the environment may be another machine after all.
                options = [*options, ("grpc.enable_http_proxy", 0)]
            return api.insecure_channel(self.target, options)
        if self.tls.server_name is not None:
            options = [*options, ("grpc.ssl_target_name_override", self.tls.server_name)]
        tls = grpc.ssl_channel_credentials(self.tls.root_certificates, self.tls.key, self.tls.certificate)
        return api.secure_channel(self.target, tls, options)

    def metadata(self) -> Metadata | None:
        """What a call carries: the token, and the trace that it belongs to.

        Raises ValueError for a token that no header can hold, and what asking for one raises.
        Not by gRPC's own call credentials: these take no insecure channel, and ask for the token on another thread.
        """
        context = trace_context.metadata()
        if self.token is None:
            return context or None
        token = self.token() if callable(self.token) else self.token
        if not isinstance(token, str) or not _TOKEN.fullmatch(token):
            # What it is must not be said.
            raise ValueError("token: expected a str of ASCII without spaces")
        return (("authorization", f"Bearer {token}"), *context)
