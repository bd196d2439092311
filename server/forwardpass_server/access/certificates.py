"""TLS credentials of the server's ports, reloaded when their files change."""

from __future__ import annotations

import pathlib
import ssl
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import grpc

from forwardpass_server.access import certificate_dates
from forwardpass_server.access.watched_files import WatchedFiles


class _Loaded(NamedTuple):
    """configuration: gRPC's object. expire_s: when the first certificate of each file expires."""

    configuration: Any
    expire_s: Mapping[str, float]


class Certificates:
    """The server's certificate and key, and the authorities that sign the certificates of clients.

    client_ca: certificates of these authorities; every client must then have a certificate. None for no client
      certificates.
    Raises OSError or ValueError for files that cannot be read or are invalid.
    """

    def __init__(self, certificate: pathlib.Path, key: pathlib.Path, client_ca: pathlib.Path | None = None) -> None:
        self._certificate = certificate
        self._key = key
        self._client_ca = client_ca
        paths = [certificate, key] if client_ca is None else [certificate, key, client_ca]
        self._files: WatchedFiles[_Loaded] = WatchedFiles(paths, self._load)
        self.refresh = self._files.refresh

    @property
    def are_mutual(self) -> bool:
        """Whether clients need certificates (mutual TLS)."""
        return self._client_ca is not None

    @property
    def are_good(self) -> bool:
        """Whether the last reload succeeded. After a failed one the former certificates stay in use."""
        return self._files.are_good

    @property
    def expire_s(self) -> Mapping[str, float]:
        """When the first certificate of each file expires, in seconds since 1970, by "server" and "client_ca"."""
        return self._files.value.expire_s

    def credentials(self) -> grpc.ServerCredentials:
        """Credentials for one port. A reload affects new connections only."""
        given = self._files.value

        def fetch() -> Any:
            # gRPC calls this at each handshake, and expects None if nothing has changed.
            nonlocal given
            if self._files.value is given:
                return None
            given = self._files.value
            return given.configuration

        return grpc.dynamic_ssl_server_credentials(
            given.configuration, fetch, require_client_authentication=self.are_mutual
        )

    def _load(self, contents: Sequence[bytes]) -> _Loaded:
        certificate, key, *client_ca = contents
        # gRPC accepts any bytes and then fails every handshake: check them here.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            # Without this function OpenSSL prompts for the password of an encrypted key on the terminal.
            context.load_cert_chain(self._certificate, self._key, password=lambda: "")
        except ssl.SSLError as error:
            raise ValueError(f"expected a certificate and its unencrypted key in PEM: {_reason(error)}") from None
        try:
            context.load_verify_locations(self._client_ca) if self._client_ca else None
        except ssl.SSLError as error:
            raise ValueError(
                f"expected certificates of authorities for client certificates, in PEM: {_reason(error)}"
            ) from None
        return _Loaded(
            grpc.ssl_server_certificate_configuration([(key, certificate)], client_ca[0] if client_ca else None),
            {
                name: certificate_dates.first_end_s(content)
                for name, content in zip(("server", "client_ca"), (certificate, *client_ca), strict=False)
            },
        )


def _reason(error: ssl.SSLError) -> str:
    """Why OpenSSL rejects a file. For a file without PEM it gives no reason."""
    return error.reason or "the file holds none"
