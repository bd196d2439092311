"""One long call over a stream of its own, in pieces: large messages cost gRPC more than their bytes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

from forwardpass.wire import errors, frames
from forwardpass.wire.chunks import Pieces
from forwardpass.wire.frames import Inbox, Outbox
from forwardpass.wire.methods import METHODS
from forwardpass_client.deadlines import Deadline
from forwardpass_client.transfers import Exchange, Steps

# Measured, with an answer as long as the request: in pieces 4 MiB take a fifth longer and 16 MiB half the time, because
# gRPC takes fresh memory for each message of such a length.
MIN_BYTES = 8 * 2**20

_CALL = 1


class LongCall:
    """One attempt of a call in pieces. timeout_s: what the server may take; None for no limit."""

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
        """Takes a response of the stream: returns the whole answer once it has arrived, and None before.

        Raises the error that the response stands for.
        """
        for frame in frames.decode_answers(message):
            frames.check(frame)
            whole = self._inbox.take(frame)
            if whole is not None:
                # A view of the answer's pieces is read like bytes.
                return cast(bytes, whole[1])
        return None


def exchange(
    path: str, request: bytes | Pieces, deadline: Deadline, max_message_bytes: int, sticky: bool, address: str | None
) -> Steps:
    """The steps of one attempt of a long call: the whole answer. sticky, address: see `Exchange`.

    Raises the error that the answer stands for, ServerUnavailable where the stream ends without an answer, and
    DeadlineExceeded.
    """
    call = LongCall(path, request, deadline.remaining_s(), max_message_bytes)
    answer = yield Exchange(METHODS["Pipeline"].path, call.requests(), call.take, sticky, address)
    if answer is None:
        raise errors.ServerUnavailable("the server ended the stream without an answer")
    return answer
