"""Certificates and tokens, from the settings that name their files."""

from __future__ import annotations

import functools
import logging

from forwardpass.wire.hosts import is_loopback
from forwardpass_server.access.access import Access
from forwardpass_server.access.certificates import Certificates
from forwardpass_server.access.tokens import Role, Tokens
from forwardpass_server.app.settings import Settings, SettingsError
from forwardpass_server.rpc.server import OPENABLE
from forwardpass_server.telemetry.files import FileMetrics

_LOGGER = logging.getLogger(__name__)


class Security:
    """What guards the ports. Raises SettingsError for files that cannot be read, and warns of half a guard."""

    def __init__(self, settings: Settings) -> None:
        self.certificates: Certificates | None = None
        self._tokens: Tokens | None = None
        self._open_services = frozenset(name for one in settings.open_services for name in OPENABLE[one])
        if settings.tls_certificate is not None and settings.tls_key is not None:
            try:
                self.certificates = Certificates(settings.tls_certificate, settings.tls_key, settings.tls_client_ca)
            except (OSError, ValueError) as error:
                raise SettingsError(f"--tls-certificate, --tls-key, --tls-client-ca: {error}") from None
        if settings.tokens is not None:
            try:
                self._tokens = Tokens(settings.tokens)
            except (OSError, ValueError) as error:
                raise SettingsError(f"--tokens: {error}") from None
        if not is_loopback(settings.host):
            if self.certificates is None:
                _LOGGER.warning("what is called and answered on %s is not encrypted here", settings.host)
            if not settings.tells_principals_apart:
                _LOGGER.warning("whoever reaches %s may call", settings.host)

    def access(self, role: Role) -> Access:
        """Who may call what takes this role."""
        return Access(
            role=role,
            tokens=self._tokens,
            has_client_certificates=self.certificates is not None and self.certificates.are_mutual,
            open_services=self._open_services,
        )

    def show(self, metrics: FileMetrics) -> None:
        """Has metrics tell how the files are, and how long they are good."""
        certificates, tokens = self.certificates, self._tokens
        if certificates is not None:
            metrics.watched("certificates", lambda: certificates.are_good)
            metrics.certificates(lambda: certificates.expire_s)
        if tokens is not None:
            metrics.watched("tokens", lambda: tokens.are_good)
            for role in Role:
                metrics.tokens(role.value, functools.partial(tokens.expire_s, role))

    def refresh(self) -> None:
        """Reads files that have changed. To be called every second or so."""
        for files in (self.certificates, self._tokens):
            if files is not None:
                files.refresh()
