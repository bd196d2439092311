"""Errors that name the item of an iterable to which they belong."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from forwardpass.wire import errors


@contextlib.contextmanager
def naming(item: str) -> Iterator[None]:
    """Adds the item, such as "clients[3]", to the message and to the place of an error."""
    try:
        yield
    except errors.ForwardPassError as error:
        error.args = (f"{item}: {error}",)
        error.place = f"{item}.{error.place}" if error.place else item
        raise
