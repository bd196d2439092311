"""The certificates and tokens that protect a server's ports."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Protocol

from forwardpass_server.access.access import Access
from forwardpass_server.access.certificates import Certificates
from forwardpass_server.access.tokens import Role, Tokens
from forwardpass_server.errors import SettingsError


class FileObserver(Protocol):
    """Shows the state of the files."""

    def watched(self, files: str, are_good: Callable[[], bool]) -> None:
        """Shows whether the last reading of some files succeeded. files: "certificates" or "tokens"."""

    def certificates(self, expire_s: Callable[[], Mapping[str, float]]) -> None:
        """Shows when certificates expire, in seconds since 1970: the first of each file, "server" and "client_ca"."""

    def tokens(self, role: str, expire_s: Callable[[], float]) -> None:
        """Shows when the first principal loses its last token with a role, in seconds since 1970; inf for never."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GuardOptions:
    """The files, each None if it is not used. The certificate and its key go together.

    open_services: the services that may be called without credentials.
    """

    certificate: pathlib.Path | None = None
    key: pathlib.Path | None = None
    client_ca: pathlib.Path | None = None
    tokens: pathlib.Path | None = None
    open_services: frozenset[str] = frozenset()


class Guard:
    """Reads the files, and again when they change. Raises SettingsError for files that cannot be used."""

    def __init__(self, options: GuardOptions) -> None:
        self.certificates: Certificates | None = None
        self._tokens: Tokens | None = None
        self._open_services = options.open_services
        if options.certificate is not None and options.key is not None:
            try:
                self.certificates = Certificates(options.certificate, options.key, options.client_ca)
            except (OSError, ValueError) as error:
                raise SettingsError(f"--tls-certificate, --tls-key, --tls-client-ca: {error}") from None
        if options.tokens is not None:
            try:
                self._tokens = Tokens(options.tokens)
            except (OSError, ValueError) as error:
                raise SettingsError(f"--tokens: {error}") from None

    def access(self, role: Role) -> Access:
        """The access rules of a port whose methods need this role."""
        return Access(
            role=role,
            tokens=self._tokens,
            has_client_certificates=self.certificates is not None and self.certificates.are_mutual,
            open_services=self._open_services,
        )

    def show(self, observer: FileObserver) -> None:
        """Shows whether the files can be read, and when certificates and tokens expire."""
        certificates, tokens = self.certificates, self._tokens
        if certificates is not None:
            observer.watched("certificates", lambda: certificates.are_good)
            observer.certificates(lambda: certificates.expire_s)
        if tokens is not None:
            observer.watched("tokens", lambda: tokens.are_good)
            for role in Role:
                observer.tokens(role.value, functools.partial(tokens.expire_s, role))

    def refresh(self) -> None:
        """Reads files that have changed. To be called every second or so."""
        for files in (self.certificates, self._tokens):
            if files is not None:
                files.refresh()
