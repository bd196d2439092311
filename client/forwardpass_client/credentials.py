"""Credentials: how a connection is encrypted, and how a call identifies its caller."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any, TypeAlias

import grpc

from forwardpass_client import proxies, targets, trace_context
from forwardpass_client.trace_context import Metadata

Token: TypeAlias = str | Callable[[], str]
"""A bearer token, or a function that returns it: it is called for each attempt, and may return another each time."""

# With one of these the caller has decided about the proxy.
_PROXY_OPTIONS = ("grpc.enable_http_proxy", "grpc.http_proxy")
_TOKEN = re.compile(r"[!-~]+")


@dataclasses.dataclass(frozen=True)
class Tls:
    """The certificates of an encrypted connection: the contents of PEM files, as bytes.

    root_certificates: the authorities that are trusted to certify the server; None for those that come with gRPC.
    certificate, key: the certificate chain of this client and its key, for a server that asks for them.
    server_name: the name in the server's certificate, where it is not the host of the target.
    Raises TypeError for a path or text, and ValueError for a certificate without its key.
    """

    root_certificates: bytes | None = None
    certificate: bytes | None = None
    key: bytes | None = dataclasses.field(default=None, repr=False)
    server_name: str | None = None

    def __post_init__(self) -> None:
        for name in ("root_certificates", "certificate", "key"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, bytes):
                # The value is not shown: it may be the text of a key.
                raise TypeError(
                    f"tls: expected {name} as bytes, the contents of a PEM file such as "
                    f'pathlib.Path("file.pem").read_bytes(), got {type(value).__name__}'
                )
        if (self.certificate is None) != (self.key is None):
            raise ValueError("tls: expected a certificate and its key, got only one of them")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Credentials:
    """The target, certificates and token of a client. Raises ValueError for a token that would be sent unencrypted."""

    target: str
    tls: Tls | None = None
    token: Token | None = dataclasses.field(default=None, repr=False)
    allow_insecure_token: bool = False

    def __post_init__(self) -> None:
        if self.token is None or self.tls is not None or self.allow_insecure_token or targets.is_loopback(self.target):
            return
        raise ValueError(
            f"token: expected tls with it, because {self.target} is another machine and the network could read the "
            "token: "
            "pass tls=True, or allow_insecure_token=True if something else encrypts the connection"
        )

    def of_replica(self, address: str) -> Credentials:
        """The same for one of several replicas. Its certificate is for the name of all of them, if they have one."""
        name = targets.named(self.target)
        tls = self.tls
        if tls is not None and tls.server_name is None and name is not None:
            tls = dataclasses.replace(tls, server_name=name[0])
        return dataclasses.replace(self, target=targets.of_address(address), tls=tls)

    @property
    def proxy(self) -> str:
        """The proxy for the target: see `proxies.of`."""
        return proxies.of(self.target)

    def channel(self, api: Any, options: list[tuple[str, Any]]) -> Any:
        """The channel. api: `grpc` or `grpc.aio`."""
        if not self.proxy and not any(name in _PROXY_OPTIONS for name, _ in options):
            options = [*options, ("grpc.enable_http_proxy", 0)]
        if self.tls is None:
            if self.token is not None and not self.allow_insecure_token:
                # A proxy may be on another machine, even for a target on this one.
                options = [*options, ("grpc.enable_http_proxy", 0)]
            return api.insecure_channel(self.target, options)
        if self.tls.server_name is not None:
            options = [*options, ("grpc.ssl_target_name_override", self.tls.server_name)]
        tls = grpc.ssl_channel_credentials(self.tls.root_certificates, self.tls.key, self.tls.certificate)
        return api.secure_channel(self.target, tls, options)

    def metadata(self) -> Metadata | None:
        """The metadata of a call: the token, and the trace that it belongs to.

        Raises ValueError for a token that no header can hold, and the error of the function that returns the token.
        gRPC's own call credentials refuse insecure channels, and call the function on another thread.
        """
        context = trace_context.metadata()
        if self.token is None:
            return context or None
        token = self.token() if callable(self.token) else self.token
        if not isinstance(token, str) or not _TOKEN.fullmatch(token):
            # The token is secret: the message must not show it.
            raise ValueError("token: expected a str of ASCII characters without spaces")
        return (("authorization", f"Bearer {token}"), *context)
