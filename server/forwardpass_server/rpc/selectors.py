"""How a request names its model, where that is not by a label."""

from __future__ import annotations

from forwardpass import v1
from forwardpass.wire import errors


def without_label(selector: v1.ModelSelector) -> v1.ModelSelector:
    """Raises InvalidRequest for a label: what lasts is of one version, which GetModel tells."""
    if selector.label:
        raise errors.InvalidRequest(place="model", expected="a version", found=f"the label {selector.label[:128]!r}")
    return selector
