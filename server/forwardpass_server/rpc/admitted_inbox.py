"""Calls that arrive in pieces, counted among what the server does at once."""

from __future__ import annotations

import asyncio

from forwardpass.wire import errors
from forwardpass.wire.frames import Frame, Inbox
from forwardpass_server.calls.admission import Admission


class AdmittedInbox:
    """`frames.Inbox` for the calls of one stream: what has begun to arrive counts with its full length.

    max_message_bytes: of one call. principal: whose stream it is.
    """

    def __init__(self, max_message_bytes: int, admission: Admission, principal: str) -> None:
        # How much may arrive together is for the admission to say, which knows of other streams too.
        self._inbox = Inbox(max_message_bytes, 2**62)
        self._admission = admission
        self._principal = principal

    def take(self, frame: Frame) -> tuple[Frame, bytes | memoryview] | None:
        """See `Inbox.take`. A call that is whole is not counted here any more.

        Raises ServerOverloaded too where the server has no room for a call that begins with this frame.
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
        """`take` that waits for room. Raises ServerOverloaded where too much waits already."""
        while True:
            try:
                return self.take(frame)
            except errors.ServerOverloaded as error:
                if self._inbox.size_bytes:
                    # The stream itself may hold what it would wait for.
                    raise
                with self._admission.waiting(self._principal, len(frame.data), error):
                    await asyncio.sleep(error.retry_after_s)

    def close(self) -> None:
        """Forgets the calls that are not whole."""
        if self._inbox.size_bytes:
            self._admission.leave(self._principal, self._inbox.size_bytes, calls=0)
            self._inbox.clear()
