"""Detects responses that were not sent because the client disconnected: gRPC only logs them."""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import Callable

from grpc._cython.cygrpc import ExecuteBatchError

_LOGGER = logging.getLogger(__name__)

# gRPC creates its log record in the task of the call that failed.
_GRPC_LOGGER = logging.getLogger("grpc._cython.cygrpc")

LONG_BYTES = 2**16
"""A shorter response fits into the initial window of HTTP/2: gRPC takes it whole, read or not."""

_sending: contextvars.ContextVar[_Sending] = contextvars.ContextVar("sending")


class _Sending:
    """A response that is being sent. count: called once, with the status of the call."""

    def __init__(self, path: str, count: Callable[[str], None]) -> None:
        self._path = path
        self._count = count
        self._is_counted = False

    def end(self, status: str) -> None:
        """Counts the call, unless it is counted already."""
        if not self._is_counted:
            self._is_counted = True
            self._count(status)

    def fail(self) -> None:
        """Counts the call as cancelled, and logs it."""
        _LOGGER.info("call of %s: the client disconnected before the response was sent", self._path)
        self.end("CANCELLED")


def watch(path: str, count: Callable[[str], None]) -> None:
    """Counts the call of the current task when its response is sent or has failed.

    path: of the method. count: called with the status.
    """
    sending = _Sending(path, count)
    _sending.set(sending)
    task = asyncio.current_task()
    assert task is not None
    task.add_done_callback(lambda task: sending.end("CANCELLED" if task.cancelled() else "OK"))


class _Filter(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        kind = record.exc_info[0] if record.exc_info else None
        if kind is None or not issubclass(kind, ExecuteBatchError):
            return True
        sending = _sending.get(None)
        if sending is not None:
            sending.fail()
        else:
            _LOGGER.info("a client disconnected before the response was sent")
        return False


_FILTER = _Filter()


def expect() -> None:
    """Installs the filter that replaces gRPC's error with a traceback for an unsent response by one line."""
    _GRPC_LOGGER.addFilter(_FILTER)
