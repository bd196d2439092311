"""One long call over a stream of its own, in pieces: large messages cost gRPC more than their bytes."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from typing import cast

from forwardpass.wire import errors, frames
from forwardpass.wire.chunks import Pieces
from forwardpass.wire.frames import Inbox, Outbox
from forwardpass.wire.methods import METHODS
from forwardpass_client.patience import AWAY, Patience, deadline_exceeded
from forwardpass_client.transfers import Exchange, Pause, Steps

# Measured, with an answer as long as the request: in pieces 4 MiB take a fifth longer and 16 MiB half the time, for
# gRPC takes fresh memory for each message of such a length.
MIN_BYTES = 8 * 2**20

_CALL = 1

# Long calls take a second or so: sooner there is hardly room for another.
_FIRST_OVERLOAD_PAUSE_S = 0.2

# As the retry policy of short calls has it.
_PAUSES_S = (0.2, 0.4, 0.8, 1.6)


class LongCall:
    """A call on its way in pieces."""

    def __init__(self, path: str, request: bytes | Pieces, timeout_s: float | None, max_message_bytes: int) -> None:
        self._outbox = Outbox(answers=False)
        method = path.rpartition("/")[2]
        offset = request.largest_offset() if isinstance(request, Pieces) else 0
        self._outbox.put(_CALL, frames.encode_call(method, timeout_s, len(request), offset), request)
        self._inbox = Inbox(max_message_bytes, max_message_bytes)

    def requests(self) -> Iterator[bytes]:
        """The messages of the stream."""
        while self._outbox:
            yield self._outbox.next_message()

    def take(self, message: bytes) -> bytes | None:
        """Takes a response of the stream: the whole answer once it is there. Raises the error that it stands for."""
        for frame in frames.decode_answers(message):
            frames.check(frame)
            whole = self._inbox.take(frame)
            if whole is not None:
                # A view of what was put together is read like bytes.
                return cast(bytes, whole[1])
        return None


def steps(
    path: str, request: bytes | Pieces, timeout_s: float | None, max_message_bytes: int, stays: bool = False
) -> Steps:
    """The steps of one long call: the whole answer in the end. stays: see `Exchange`.

    Tried again as short calls are; and, until its deadline or for half a minute, while the server has no memory for it.
    """
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    pauses_s = iter(_PAUSES_S)
    overload = Patience(_FIRST_OVERLOAD_PAUSE_S)
    reason: errors.ForwardPassError | None = None
    while True:
        remaining_s = None if deadline is None else max(deadline - time.monotonic(), 0)
        call = LongCall(path, request, remaining_s, max_message_bytes)
        try:
            answer = yield Exchange(METHODS["Pipeline"].path, call.requests(), call.take, remaining_s, stays)
            if answer is None:
                raise errors.ServerUnavailable("the server ended the stream without an answer")
            return answer
        except errors.DeadlineExceeded:
            if reason is None:
                raise
            raise deadline_exceeded(reason) from reason
        except errors.ServerOverloaded as error:
            reason, pause_s = error, overload.pause_s(limited=deadline is None)
            if pause_s is None:
                raise
            # Those that were refused together must not come back together.
            pause_s = max(error.retry_after_s, pause_s * random.uniform(0.5, 1.5))
        except AWAY as error:
            reason, pause_s = error, next(pauses_s, None)
            if pause_s is None:
                raise
        if deadline is not None and time.monotonic() + pause_s > deadline:
            raise reason
        yield Pause(pause_s)
