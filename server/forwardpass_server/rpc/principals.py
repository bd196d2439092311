"""Who makes the call that is being answered."""

from __future__ import annotations

import contextvars

_CURRENT = contextvars.ContextVar("principal", default="")


def current() -> str:
    """The caller's name, as the operator chose it; "" where nobody has to say so."""
    return _CURRENT.get()
