"""Answers that were not sent because their callers left, which gRPC tells the log alone."""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import Callable

from grpc._cython.cygrpc import ExecuteBatchError

_LOGGER = logging.getLogger(__name__)

# Its records are made in the task of the call that they are about.
_GRPC_LOGGER = logging.getLogger("grpc._cython.cygrpc")

LONG_BYTES = 2**16
"""A shorter answer goes into gRPC's buffers whole, whether anybody reads it or not: the initial window of HTTP/2."""

_sending: contextvars.ContextVar[_Sending] = contextvars.ContextVar("sending")


class _Sending:
    """An answer that gRPC is sending. count: is told, once, of the status that the call has ended with."""

    def __init__(self, path: str, count: Callable[[str], None]) -> None:
        self._path = path
        self._count = count
        self._is_counted = False

    def end(self, status: str) -> None:
        if not self._is_counted:
            self._is_counted = True
            self._count(status)

    def fail(self) -> None:
        _LOGGER.info("call of %s: the caller left before its answer was sent", self._path)
        self.end("CANCELLED")


def watch(path: str, count: Callable[[str], None]) -> None:
    """Counts the call of the current task once its answer is sent, or is known to be unread.

    path: of its method. count: is told of the status.
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
            _LOGGER.info("a caller left before its answer was sent")
        return False


_FILTER = _Filter()


def expect() -> None:
    """Says in one line what gRPC logs as an error with a traceback when a caller leaves before its answer is sent."""
    _GRPC_LOGGER.addFilter(_FILTER)
