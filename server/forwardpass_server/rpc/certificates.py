"""TLS of the server's ports, from certificate files that may change."""

from __future__ import annotations

import pathlib
import ssl
from collections.abc import Sequence
from typing import Any

import grpc

from forwardpass_server.serving.watched_files import WatchedFiles


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
        self._files: WatchedFiles[Any] = WatchedFiles(paths, self._configuration)
        self.refresh = self._files.refresh

    @property
    def are_mutual(self) -> bool:
        """Whether clients have certificates too."""
        return self._client_ca is not None

    def credentials(self) -> grpc.ServerCredentials:
        """For one port. Connections that are there keep what they began with."""
        given = self._files.value

        def fetch() -> Any:
            # gRPC asks at each handshake, and wants None where nothing has changed.
            nonlocal given
            if self._files.value is given:
                return None
            given = self._files.value
            return given

        return grpc.dynamic_ssl_server_credentials(given, fetch, require_client_authentication=self.are_mutual)

    def _configuration(self, contents: Sequence[bytes]) -> Any:
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
        return grpc.ssl_server_certificate_configuration([(key, certificate)], client_ca[0] if client_ca else None)


def _said(error: ssl.SSLError) -> str:
    """What OpenSSL has against a file; of one without any PEM in it, it says nothing that a person could read."""
    return error.reason or "the file holds none"
