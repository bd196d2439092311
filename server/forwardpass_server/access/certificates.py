"""TLS of the server's ports, from certificate files that may change."""

from __future__ import annotations

import pathlib
import ssl
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import grpc

from forwardpass_server.access import certificate_dates
from forwardpass_server.access.watched_files import WatchedFiles


class _Loaded(NamedTuple):
    """configuration: as gRPC takes it. expire_s: when the first certificate of each file does."""

    configuration: Any
    expire_s: Mapping[str, float]


class Certificates:
    """A certificate and its key, and those by which clients are known.

    client_ca: who signs clients' certificates; every client must have one then. None for clients without.
    Raises OSError or ValueError for files that are not what they should be.
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
        """Whether clients have certificates too."""
        return self._client_ca is not None

    @property
    def are_good(self) -> bool:
        """Whether the files could be read when they were last looked at; what they said before is used otherwise."""
        return self._files.are_good

    @property
    def expire_s(self) -> Mapping[str, float]:
        """When the first certificate of each file expires, in seconds since 1970: "server", and "client_ca"."""
        return self._files.value.expire_s

    def credentials(self) -> grpc.ServerCredentials:
        """For one port. Connections that are there keep what they began with."""
        given = self._files.value

        def fetch() -> Any:
            # gRPC asks at each handshake, and wants None where nothing has changed.
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
        # gRPC takes any bytes and then fails every handshake.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            # An encrypted key would ask a person for its password.
            context.load_cert_chain(self._certificate, self._key, password=lambda: "")
        except ssl.SSLError as error:
            raise ValueError(f"expected a certificate and its unencrypted key in PEM: {_said(error)}") from None
        try:
            context.load_verify_locations(self._client_ca) if self._client_ca else None
        except ssl.SSLError as error:
            raise ValueError(f"expected certificates of clients' signers in PEM: {_said(error)}") from None
        return _Loaded(
            grpc.ssl_server_certificate_configuration([(key, certificate)], client_ca[0] if client_ca else None),
            {
                name: certificate_dates.first_end_s(content)
                for name, content in zip(("server", "client_ca"), (certificate, *client_ca), strict=False)
            },
        )


def _said(error: ssl.SSLError) -> str:
    """What OpenSSL has against a file; of one without any PEM in it, it says nothing that a person could read."""
    return error.reason or "the file holds none"
