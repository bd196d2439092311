"""Calls that arrive in frames, counted by admission while they arrive."""

from __future__ import annotations

import asyncio

from forwardpass.wire import errors
from forwardpass.wire.frames import Frame, Inbox
from forwardpass_server.calls.admission import Admission


class AdmittedInbox:
    """A `frames.Inbox` for the calls of one stream. A call counts with its full length from its first frame on.

    max_message_bytes: the limit for one call. principal: the caller of the stream.
    """

    def __init__(self, max_message_bytes: int, admission: Admission, principal: str) -> None:
        # No limit here for all calls together: admission limits them across all streams.
        self._inbox = Inbox(max_message_bytes, 2**62)
        self._admission = admission
        self._principal = principal

    def take(self, frame: Frame) -> tuple[Frame, bytes | memoryview] | None:
        """See `Inbox.take`. A complete call does not count here any more.

        Also raises ServerOverloaded if the server has no room for a call that begins with this frame.
        """
        before = self._inbox.size_bytes
        try:
            whole = self._inbox.take(frame)
        finally:
            grown = self._inbox.size_bytes - before
            if grown < 0:
                self._admission.leave(self._principal, -grown, calls=0)
        if grown > 0:
            try:
                self._admission.enter(self._principal, grown, calls=0)
            except errors.ServerOverloaded:
                self._inbox.drop(frame.call)
                raise
        return whole

    async def take_when_admitted(self, frame: Frame) -> tuple[Frame, bytes | memoryview] | None:
        """Like `take`, but waits for room. Raises ServerOverloaded if too many bytes are waiting already."""
        while True:
            try:
                return self.take(frame)
            except errors.ServerOverloaded as error:
                if self._inbox.size_bytes:
                    # The incomplete calls of this stream may take the room: waiting could be a deadlock.
                    raise
                with self._admission.waiting(self._principal, len(frame.data), error):
                    await asyncio.sleep(error.retry_after_s)

    def close(self) -> None:
        """Drops the incomplete calls."""
        if self._inbox.size_bytes:
            self._admission.leave(self._principal, self._inbox.size_bytes, calls=0)
            self._inbox.clear()
