"""Who may call the methods of a port."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from forwardpass.wire import errors
from forwardpass_server.access import principals
from forwardpass_server.access.tokens import Role, Token, Tokens

Metadata = Iterable[Sequence[Any]]
"""Keys and values, as gRPC hands them over."""

_KEY = "authorization"
_SCHEME = "bearer "


@dataclasses.dataclass(frozen=True, kw_only=True)
class Access:
    """Decides by token, or else by the client's certificate; with neither, everybody may call and is nobody.

    role: what a token must be good for. A certificate is good for calls; where there are tokens, for nothing else.
    has_client_certificates: TLS has seen to it that every client has a certificate of a trusted signer.
    open_services: may be called by everybody who gets as far as the port.
    """

    role: Role = Role.CALL
    tokens: Tokens | None = None
    has_client_certificates: bool = False
    open_services: frozenset[str] = frozenset()

    @property
    def is_open(self) -> bool:
        """Whether everybody may call everything."""
        return self.tokens is None and not self.has_client_certificates

    def admits(self, metadata: Metadata) -> bool:
        """Whether a call may go on, and enters its principal if its token says who that is. Takes no time to speak of.

        True for a call without a token where there are certificates: see `enter_by_certificate`.
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
        """Why a call was not admitted."""
        found = self._find(metadata)
        if found is not None and not found.is_expired:
            return _lacks(found.principal, self.role)
        if found is not None:
            return errors.Unauthenticated(f"the token of {found.principal!r} has expired")
        if _credential(metadata) is not None:
            return errors.Unauthenticated("the server does not know this token, or no longer")
        return errors.Unauthenticated(place="authorization", expected="Bearer and a token", found="nothing")

    def enter_by_certificate(self, context: Any) -> None:
        """Enters the principal that the client's certificate names, where no token did. Raises PermissionDenied.

        Raises Unauthenticated for a certificate that names nobody.
        """
        if self.tokens is not None and _credential(context.invocation_metadata()) is not None:
            return
        properties = context.auth_context()
        names = [*properties.get("x509_common_name", ()), *properties.get("x509_subject_alternative_name", ())]
        principal = next((name.decode(errors="replace") for name in names if name), "")
        if not principal:
            raise errors.Unauthenticated("the client's certificate has neither a common name nor an alternative one")
        if self.tokens is not None and self.role is not Role.CALL:
            raise _lacks(principal, self.role)
        principals.enter(principal)

    def _find(self, metadata: Metadata) -> Token | None:
        credential = _credential(metadata)
        if self.tokens is None or credential is None:
            return None
        return self.tokens.find(credential)


def _credential(metadata: Metadata) -> str | None:
    """What the caller shows as its token; "" for what is none."""
    for key, value in metadata:
        if key == _KEY:
            return value[len(_SCHEME) :] if value[: len(_SCHEME)].lower() == _SCHEME else ""
    return None


def _lacks(principal: str, role: Role) -> errors.PermissionDenied:
    return errors.PermissionDenied(f"{principal!r} has not the role {role.value!r} that this port asks for")
