"""Who makes the call that is being answered."""

from __future__ import annotations

import contextvars

_CURRENT = contextvars.ContextVar("principal", default="")


def current() -> str:
    """The caller's name, as the operator chose it; "" where nobody has to say so."""
    return _CURRENT.get()


def enter(principal: str) -> None:
    """Says who makes the call that this task, and those that it starts, are about to answer."""
    _CURRENT.set(principal)
