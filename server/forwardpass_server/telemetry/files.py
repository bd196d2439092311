"""Metrics of files that are reloaded while the server runs, and of expiry dates."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

from forwardpass_server.telemetry.families import Families

OF_WATCHED_FILES = "Only if such files are watched."
WITH_TLS = "Only with TLS."
WITH_TOKENS = "Only with tokens."


class FileMetrics:
    """The file metrics of one server."""

    def __init__(self, families: Families) -> None:
        self._good = families.gauge(
            "forwardpass_last_reload_successful",
            "1 if the last reload of these files succeeded, 0 if it failed and their former contents are still in use.",
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
            "When the first principal loses its last token with a role, in seconds since 1970; +Inf for never.",
            ("role",),
            WITH_TOKENS,
        )

    def watched(self, files: str, are_good: Callable[[], bool]) -> None:
        """Reports whether files are valid. files: the value of the label."""
        self._good.labels(files).set_function(are_good)

    def certificates(self, expire_s: Callable[[], Mapping[str, float]]) -> None:
        """Reports when certificates expire. expire_s: by the value of the label."""
        for name in expire_s():
            self._certificates.labels(name).set_function(functools.partial(_of, name, expire_s))

    def tokens(self, role: str, expire_s: Callable[[], float]) -> None:
        """Reports when tokens with a role expire."""
        self._tokens.labels(role).set_function(expire_s)


def _of(name: str, expire_s: Callable[[], Mapping[str, float]]) -> float:
    return expire_s()[name]
