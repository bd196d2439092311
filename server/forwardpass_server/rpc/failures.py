"""What a caller is told of an error, and what the log."""

from __future__ import annotations

import logging
import secrets
import traceback

from forwardpass.wire import errors

_LOGGER = logging.getLogger(__name__)


def failure_of(error: Exception, what: str) -> errors.ForwardPassError:
    """The error itself where it is of the catalogue; else an InternalError under which the log says more.

    what: failed, for the log.
    """
    if isinstance(error, errors.ForwardPassError):
        return error
    request_id = secrets.token_hex(8)
    # Its message may hold an example or a weight: where it happened must do.
    places = "".join(traceback.format_tb(error.__traceback__))
    fields = {"request_id": request_id, "failed": what, "error": type(error).__name__}
    _LOGGER.error("request %s: %s failed: %s\n%s", *fields.values(), places, extra=fields)
    return errors.InternalError(f"the server failed; request {request_id}", request_id=request_id)
