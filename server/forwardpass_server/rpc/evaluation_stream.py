"""The stream of an evaluation: batches in, their numbers out once they have counted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from forwardpass import v1
from forwardpass.wire import errors, frames
from forwardpass_server.rpc.admitted_inbox import AdmittedInbox
from forwardpass_server.rpc.codec import Codec
from forwardpass_server.rpc.drain import Drain
from forwardpass_server.sessions.evaluation import Evaluation

# Taken without a look at other callers.
_FRAMES_AT_ONCE = 64


class EvaluationStream:
    """Speaks with the caller of an evaluation.

    inbox: of the stream alone. drain: ends the stream once the batches that were received have counted.
    """

    def __init__(self, evaluation: Evaluation, codec: Codec, inbox: AdmittedInbox, drain: Drain) -> None:
        self._evaluation = evaluation
        self._codec = codec
        self._drain = drain
        self._inbox = inbox

    async def run(self, requests: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """The stream's responses, until its requests have ended and every batch has counted.

        Raises ServerUnavailable where the server leaves first.
        """
        evaluation = self._evaluation
        position: int | None = evaluation.position
        at = v1.EvaluationPosition(model=evaluation.identity.message(), sequence=position)
        yield v1.EvaluateResponse(position=at).SerializeToString()
        reading = asyncio.ensure_future(self._read(requests))
        try:
            with self._drain.notifying(lambda: evaluation.fail(self._drain.error())):
                while (position := await evaluation.advance(position or 0)) is not None:
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
                    if not index % _FRAMES_AT_ONCE:
                        await asyncio.sleep(0)
        except Exception as error:
            self._evaluation.fail(error)
        else:
            self._evaluation.complete()

    async def _add(self, sequence: int, data: bytes | memoryview) -> None:
        try:
            # A view is read like bytes.
            incoming = self._codec.open(v1.EvaluationBatch, data)  # type: ignore[arg-type]
        except errors.InvalidRequest as error:
            raise type(error)(f"batch {sequence}: {error}") from None
        await self._evaluation.add(sequence, incoming.header.update_id, incoming.size_bytes, incoming.parts)
