"""Access control of a port: which calls are admitted."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from forwardpass.wire import errors
from forwardpass_server.access import principals
from forwardpass_server.access.tokens import Role, Token, Tokens

Metadata = Iterable[Sequence[Any]]
"""Keys and values of a call's metadata, as gRPC passes them."""

_KEY = "authorization"
_SCHEME = "bearer "


@dataclasses.dataclass(frozen=True, kw_only=True)
class Access:
    """Authenticates calls by bearer token, or else by the client's certificate.

    Without tokens and client certificates every call is admitted, and its principal is "".

    role: the role that a token needs. A certificate stands for the role CALL; if there are no tokens, for every role.
    has_client_certificates: TLS requires a certificate of a trusted signer from every client.
    open_services: full names of services that need no credentials.
    """

    role: Role = Role.CALL
    tokens: Tokens | None = None
    has_client_certificates: bool = False
    open_services: frozenset[str] = frozenset()

    @property
    def is_open(self) -> bool:
        """Whether every call is admitted."""
        return self.tokens is None and not self.has_client_certificates

    def admits(self, metadata: Metadata) -> bool:
        """Whether a call is admitted so far. Sets the current principal if the call has a valid token. Does not block.

        True for a call without a token if clients have certificates: `enter_by_certificate` checks those.
        """
        if self.tokens is None:
            return True
        found = self._find(metadata)
        if found is None:
            return self.has_client_certificates and _credential(metadata) is None
        if found.is_expired or self.role not in found.roles:
            return False
        principals.enter(found.principal)
        return True

    def refusal(self, metadata: Metadata) -> errors.ForwardPassError:
        """The error for a call that was not admitted."""
        found = self._find(metadata)
        if found is not None and not found.is_expired:
            return _lacks(found.principal, self.role)
        if found is not None:
            return errors.Unauthenticated(
                f"the token of {found.principal!r} has expired: ask the server's operator for a new one"
            )
        if _credential(metadata) is not None:
            return errors.Unauthenticated("the server does not know this token: ask its operator for a valid one")
        return errors.Unauthenticated("missing or invalid credentials: send a bearer token (connect(token=...))")

    def enter_by_certificate(self, context: Any) -> None:
        """Sets the current principal from the client's certificate, unless the call has a token.

        Raises Unauthenticated for a certificate without a name, or PermissionDenied if the port requires a token.
        """
        if self.tokens is not None and _credential(context.invocation_metadata()) is not None:
            return
        properties = context.auth_context()
        names = [*properties.get("x509_common_name", ()), *properties.get("x509_subject_alternative_name", ())]
        principal = next((name.decode(errors="replace") for name in names if name), "")
        if not principal:
            raise errors.Unauthenticated(
                "the client's certificate has neither a common name nor a subject alternative name: use a "
                "certificate with one of them"
            )
        if self.tokens is not None and self.role is not Role.CALL:
            raise _lacks(principal, self.role)
        principals.enter(principal)

    def _find(self, metadata: Metadata) -> Token | None:
        credential = _credential(metadata)
        if self.tokens is None or credential is None:
            return None
        return self.tokens.find(credential)


def _credential(metadata: Metadata) -> str | None:
    """The bearer token of a call; "" for another authorization scheme; None without authorization."""
    for key, value in metadata:
        if key == _KEY:
            return value[len(_SCHEME) :] if value[: len(_SCHEME)].lower() == _SCHEME else ""
    return None


def _lacks(principal: str, role: Role) -> errors.PermissionDenied:
    return errors.PermissionDenied(
        f"{principal!r} lacks the role {role.value!r}, which this port requires: use a token with that role"
    )
