"""The options of a client."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """See `client.connect`."""

    timeout_s: float | None
    max_message_bytes: int
    reuse_weights: bool
    channel_options: Sequence[tuple[str, Any]] = ()
