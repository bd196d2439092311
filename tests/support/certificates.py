"""Certificates of a signer of our own, made anew for each test."""

from __future__ import annotations

import pathlib

import trustme

from forwardpass_client import Tls


class Signer:
    """Signs certificates, in files of one folder, for a server on localhost and for its clients."""

    def __init__(self, folder: pathlib.Path) -> None:
        folder.mkdir(exist_ok=True)
        self._folder = folder
        self._ca = trustme.CA()
        self.ca = folder / "ca.pem"
        self._ca.cert_pem.write_to_path(self.ca)
        self.certificate = folder / "server.pem"
        self.key = folder / "server.key"
        self.renew()

    def renew(self) -> None:
        """Another certificate, and key, in the place of the server's."""
        made = self._ca.issue_cert("localhost", "127.0.0.1")
        made.private_key_pem.write_to_path(self.key)
        self.certificate.write_bytes(b"".join(pem.bytes() for pem in made.cert_chain_pems))

    def tls(self, common_name: str | None = None, *identities: str) -> Tls:
        """What a client connects with: with a certificate of its own where it has a name."""
        if common_name is None and not identities:
            return Tls(self.ca.read_bytes())
        made = self._ca.issue_cert(*identities, common_name=common_name)
        chain = b"".join(pem.bytes() for pem in made.cert_chain_pems)
        return Tls(self.ca.read_bytes(), chain, made.private_key_pem.bytes())

    def arguments(self, *, mutual: bool = False) -> list[str]:
        """The server's command line."""
        files = ["--tls-certificate", str(self.certificate), "--tls-key", str(self.key)]
        return [*files, "--tls-client-ca", str(self.ca)] if mutual else files
