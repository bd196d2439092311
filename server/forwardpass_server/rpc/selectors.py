"""Checks the selector by which a request names its model."""

from __future__ import annotations

from forwardpass import v1
from forwardpass.wire import errors


def checked(selector: v1.ModelSelector) -> v1.ModelSelector:
    """The selector. Raises InvalidRequest if it has both a version and a label."""
    if selector.version and selector.label:
        raise errors.InvalidRequest(place="model", expected="a version or a label", found="both")
    return selector
