"""The server that a command calls, with its encryption and token."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import click

import forwardpass_client

_FILE = click.Path(exists=True, dir_okay=False, path_type=pathlib.Path)
_OPTIONS = (
    click.option("--tls", is_flag=True, help="Encrypt, and trust the certificates that come with gRPC."),
    click.option("--ca", type=_FILE, help="Encrypt, and trust the certificates in this file (PEM)."),
    click.option("--cert", type=_FILE, help="Encrypt, and show the server this certificate (PEM)."),
    click.option("--key", type=_FILE, help="The certificate's key (PEM)."),
    click.option(
        "--token",
        envvar="FORWARDPASS_TOKEN",
        show_envvar=True,
        help="The bearer token of the caller, from the operator of the server.",
    ),
    click.option("--allow-insecure-token", is_flag=True, help="Send the token unencrypted to another machine too."),
)


@dataclasses.dataclass(frozen=True)
class Host:
    """The options of the command line for the server."""

    target: str
    tls: bool
    ca: pathlib.Path | None
    cert: pathlib.Path | None
    key: pathlib.Path | None
    token: str | None = dataclasses.field(repr=False)
    allow_insecure_token: bool

    def words(self) -> list[str]:
        """The words that name the server on a command line, without the token, which is secret."""
        files = [(f"--{name}", str(path)) for name in ("ca", "cert", "key") if (path := getattr(self, name))]
        flags = [f"--{name.replace('_', '-')}" for name in ("tls", "allow_insecure_token") if getattr(self, name)]
        return [self.target, *(word for file in files for word in file), *flags]

    def connect(self) -> forwardpass_client.Client:
        """A client of the server. Raises ValueError for options that exclude each other."""
        ca, cert, key = (None if path is None else path.read_bytes() for path in (self.ca, self.cert, self.key))
        is_encrypted = self.tls or any(part is not None for part in (ca, cert, key))
        return forwardpass_client.connect(
            self.target,
            tls=forwardpass_client.Tls(ca, cert, key) if is_encrypted else False,
            token=self.token or None,
            allow_insecure_token=self.allow_insecure_token,
        )


def host_argument(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the argument HOST and the options of the connection: it takes a `Host` as `host`."""

    @functools.wraps(command)
    def with_host(host: str, **arguments: Any) -> None:
        names = [field.name for field in dataclasses.fields(Host)][1:]
        command(host=Host(host, *(arguments.pop(name) for name in names)), **arguments)

    for option in reversed(_OPTIONS):
        with_host = option(with_host)
    return click.argument("host")(with_host)
