"""What is shown of files that an operator changes while the server runs, and of how long they are good."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

from forwardpass_server.telemetry.families import Families

OF_WATCHED_FILES = "Where such files are watched."
WITH_TLS = "With TLS alone."
WITH_TOKENS = "With tokens alone."


class FileMetrics:
    """Of one server."""

    def __init__(self, families: Families) -> None:
        self._good = families.gauge(
            "forwardpass_last_reload_successful",
            "0 while files are not what they should be, and what was read of them before is used on; else 1.",
            ("files",),
            OF_WATCHED_FILES,
        )
        self._certificates = families.gauge(
            "forwardpass_certificate_expiry_timestamp_seconds",
            "When the first certificate of a file expires, in seconds since 1970.",
            ("certificate",),
            WITH_TLS,
        )
        self._tokens = families.gauge(
            "forwardpass_token_expiry_timestamp_seconds",
            "When the first principal is left without a token for a role, in seconds since 1970; or +Inf.",
            ("role",),
            WITH_TOKENS,
        )

    def watched(self, files: str, are_good: Callable[[], bool]) -> None:
        """Shows whether files are good. files: what they hold, in a word."""
        self._good.labels(files).set_function(are_good)

    def certificates(self, expire_s: Callable[[], Mapping[str, float]]) -> None:
        """Shows when the certificates expire, by what they are of."""
        for name in expire_s():
            self._certificates.labels(name).set_function(functools.partial(_of, name, expire_s))

    def tokens(self, role: str, expire_s: Callable[[], float]) -> None:
        """Shows when tokens for a role expire."""
        self._tokens.labels(role).set_function(expire_s)


def _of(name: str, expire_s: Callable[[], Mapping[str, float]]) -> float:
    return expire_s()[name]
