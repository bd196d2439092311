"""Converts exceptions to errors for callers, and logs unexpected ones."""

from __future__ import annotations

import logging
import secrets
import traceback

from forwardpass.wire import errors

_LOGGER = logging.getLogger(__name__)


def failure_of(error: Exception, what: str) -> errors.ForwardPassError:
    """The error for the caller: the exception itself if it is in the catalogue, else an InternalError.

    An unexpected exception is logged under the request id that the InternalError holds. what: the failed operation, for
    the log.
    """
    if isinstance(error, errors.ForwardPassError):
        return error
    request_id = secrets.token_hex(8)
    # The log gets the traceback without the message: a message may hold an example or a weight.
    places = "".join(traceback.format_tb(error.__traceback__))
    fields = {"request_id": request_id, "failed": what, "error": type(error).__name__}
    _LOGGER.error("request %s: %s failed: %s\n%s", *fields.values(), places, extra=fields)
    return errors.InternalError(f"the server failed; request {request_id}", request_id=request_id)
