"""The principal of the current call."""

from __future__ import annotations

import contextvars

_CURRENT = contextvars.ContextVar("principal", default="")


def current() -> str:
    """The authenticated name of the caller, chosen by the operator; "" without authentication."""
    return _CURRENT.get()


def enter(principal: str) -> None:
    """Sets the principal for this task and the tasks that it starts."""
    _CURRENT.set(principal)
