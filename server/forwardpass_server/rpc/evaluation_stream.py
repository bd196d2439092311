"""The stream of an evaluation RPC: it receives batches, and sends their numbers once they are counted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from forwardpass import v1
from forwardpass.wire import errors, frames
from forwardpass_server.rpc.admitted_inbox import AdmittedInbox
from forwardpass_server.rpc.codec import Codec
from forwardpass_server.rpc.drain import Drain
from forwardpass_server.sessions.evaluation import Evaluation

# After so many frames other tasks of the event loop get a turn.
_FRAMES_PER_TURN = 64


class EvaluationStream:
    """Joins one RPC's stream of messages to an evaluation.

    inbox: of this stream only. drain: when the server drains, the stream ends after all received batches are counted.
    """

    def __init__(self, evaluation: Evaluation, codec: Codec, inbox: AdmittedInbox, drain: Drain) -> None:
        self._identity = evaluation.identity
        self._batches = evaluation.batches
        self._codec = codec
        self._drain = drain
        self._inbox = inbox

    async def run(self, requests: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """The responses, until the requests have ended and every batch is counted.

        Raises ServerUnavailable where the server drains before that.
        """
        batches = self._batches
        position: int | None = batches.position
        at = v1.EvaluationPosition(model=self._identity.message(), sequence=position)
        yield v1.EvaluateResponse(position=at).SerializeToString()
        reading = asyncio.ensure_future(self._read(requests))
        try:
            with self._drain.notifying(lambda: batches.fail(self._drain.error())):
                while (position := await batches.advance(position or 0)) is not None:
                    yield v1.EvaluateResponse(frames=[v1.AnswerFrame(call=position)]).SerializeToString()
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
            self._inbox.close()

    async def _read(self, requests: AsyncIterator[bytes]) -> None:
        try:
            async for message in requests:
                for index, frame in enumerate(frames.decode_calls(message), 1):
                    whole = await self._inbox.take_when_admitted(frame)
                    if whole is not None:
                        first, data = whole
                        await self._add(first.call, data)
                    if not index % _FRAMES_PER_TURN:
                        await asyncio.sleep(0)
        except Exception as error:
            self._batches.fail(error)
        else:
            self._batches.complete()

    async def _add(self, sequence: int, data: bytes | memoryview) -> None:
        try:
            # protobuf parses a memoryview like bytes.
            incoming = self._codec.open(v1.EvaluationBatch, data)  # type: ignore[arg-type]
        except errors.InvalidRequest as error:
            raise type(error)(f"batch {sequence}: {error}") from None
        await self._batches.add(sequence, incoming.header.update_id, incoming.size_bytes, incoming.parts)
