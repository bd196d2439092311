"""Bearer tokens: the principal and the roles that each stands for.

A file has one line for each token; a comment begins with "#":

    sha256:HEX PRINCIPAL ROLE[,ROLE] EXPIRY

HEX is the SHA-256 of the token. A token has 256 random bits and cannot be guessed, so a slow password hash would add
no security and slow down calls. EXPIRY is a date or time in ISO 8601 (UTC without an offset), or "never".
"""

from __future__ import annotations

import base64
import dataclasses
import datetime
import enum
import hashlib
import hmac
import math
import pathlib
import re
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence

from forwardpass_server.access.watched_files import WatchedFiles

PRINCIPAL = re.compile(r"[!-\"$-~]{1,128}")
"""Names that a principal may have: printable ASCII without spaces and "#"."""

_HASH = re.compile(r"sha256:([0-9a-f]{64})")

# Identifies the token in a leak, and lets secret scanners find tokens that were committed.
_PREFIX = "forwardpass_"


class Role(enum.Enum):
    """A permission. CALL: every service but management. MANAGE: the management service."""

    CALL = "call"
    MANAGE = "manage"


@dataclasses.dataclass(frozen=True, slots=True)
class Token:
    """One line of the file. expires_s: seconds since 1970; None for never."""

    digest: bytes
    principal: str
    roles: frozenset[Role]
    expires_s: float | None

    @property
    def is_expired(self) -> bool:
        """Whether the token has expired."""
        return self.expires_s is not None and self.expires_s <= time.time()

    def line(self) -> str:
        """The line of the token file."""
        roles = ",".join(sorted(role.value for role in self.roles))
        return f"sha256:{self.digest.hex()} {self.principal} {roles} {_format_expiry(self.expires_s)}"


class Tokens:
    """The tokens of a file. Raises OSError if it cannot be read, or ValueError for an invalid line (names the line)."""

    def __init__(self, path: pathlib.Path) -> None:
        self._file: WatchedFiles[Mapping[bytes, Token]] = WatchedFiles(
            [path], lambda contents: _parse(path.name, contents)
        )
        self.refresh = self._file.refresh

    @property
    def are_good(self) -> bool:
        """Whether the last reload succeeded. After a failed one the former tokens stay valid."""
        return self._file.are_good

    def expire_s(self, role: Role) -> float:
        """When the first principal loses its last token with a role, in seconds since 1970; infinite for never."""
        last: dict[str, float] = {}
        for token in self._file.value.values():
            if role in token.roles:
                expires_s = math.inf if token.expires_s is None else token.expires_s
                last[token.principal] = max(expires_s, last.get(token.principal, 0.0))
        return min(last.values(), default=math.inf)

    def find(self, token: str) -> Token | None:
        """The entry of a token, also of an expired one; None for an unknown token."""
        digest = _digest(token)
        # The time of the look-up depends on the hash only, which an attacker cannot choose.
        found = self._file.value.get(digest)
        return found if found is not None and hmac.compare_digest(found.digest, digest) else None


def create(principal: str, roles: Iterable[Role], expires_s: float | None) -> tuple[str, Token]:
    """A new token and its entry for the file. Raises ValueError for an invalid name of a principal."""
    _check_principal(principal)
    token = _PREFIX + base64.urlsafe_b64encode(secrets.token_bytes(32)).rstrip(b"=").decode()
    return token, Token(_digest(token), principal, frozenset(roles), expires_s)


def parse_expiry(text: str) -> float | None:
    """Parses a date, a time, or "30d" (from now) to seconds since 1970; "never" to None. Raises ValueError."""
    if text == "never":
        return None
    if days := re.fullmatch(r"([1-9][0-9]{0,4})d", text):
        return float(int(time.time()) + int(days[1]) * 24 * 3600)
    try:
        # Python 3.10 does not accept "Z".
        parsed = datetime.datetime.fromisoformat(re.sub("Z$", "+00:00", text))
    except ValueError:
        raise ValueError(f"expiry: expected a date, a time, 30d or never, got {text!r}") from None
    return (parsed if parsed.tzinfo else parsed.replace(tzinfo=datetime.timezone.utc)).timestamp()


def _format_expiry(expires_s: float | None) -> str:
    if expires_s is None:
        return "never"
    return datetime.datetime.fromtimestamp(expires_s, datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode(errors="replace")).digest()


def _parse(name: str, contents: Sequence[bytes]) -> dict[bytes, Token]:
    text = contents[0].decode()
    # A file without a final newline is probably still being written. Reading half of it would lock out the callers of
    # the other half.
    if not text.endswith("\n"):
        raise ValueError(f"{name}: expected a newline at its end")
    tokens: dict[bytes, Token] = {}
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        try:
            token = _token(words)
            if token.digest in tokens:
                raise ValueError("the token is already in the file: delete this line")
        except ValueError as error:
            raise ValueError(f"{name}: line {number}: {error}") from None
        tokens[token.digest] = token
    return tokens


def _token(words: Sequence[str]) -> Token:
    if len(words) != 4:
        raise ValueError(f"expected sha256:HEX PRINCIPAL ROLE[,ROLE] EXPIRY, got {len(words)} words")
    digest, principal, roles, expiry = words
    found = _HASH.fullmatch(digest)
    if found is None:
        # The sentence does not quote the word: it may be the token itself, which must not reach the log.
        raise ValueError("expected sha256: and 64 hexadecimal digits at the start of the line")
    _check_principal(principal)
    known = {role.value for role in Role}
    named = roles.split(",")
    if unknown := set(named) - known:
        raise ValueError(f"expected roles of {', '.join(sorted(known))}, got {', '.join(sorted(unknown))}")
    if re.fullmatch(r"[0-9]+d", expiry):
        raise ValueError("expected a date, a time or never; a number of days has no fixed start in a file")
    return Token(bytes.fromhex(found[1]), principal, frozenset(map(Role, named)), parse_expiry(expiry))


def _check_principal(principal: str) -> None:
    if not PRINCIPAL.fullmatch(principal):
        raise ValueError(f"principal: expected 1 to 128 characters of ASCII without spaces and #, got {principal!r}")
