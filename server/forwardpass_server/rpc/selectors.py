"""How a request names its model."""

from __future__ import annotations

from forwardpass import v1
from forwardpass.wire import errors


def checked(selector: v1.ModelSelector) -> v1.ModelSelector:
    """Raises InvalidRequest for a version that is named twice."""
    if selector.version and selector.label:
        raise errors.InvalidRequest(place="model", expected="a version or a label", found="both")
    return selector
