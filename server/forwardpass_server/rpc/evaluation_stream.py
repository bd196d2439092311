"""The stream of an evaluation: batches in, their numbers out once they have counted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from forwardpass import v1
from forwardpass.wire import errors, frames, messages
from forwardpass.wire.frames import Inbox
from forwardpass_server.rpc.departure import Departure
from forwardpass_server.serving.evaluation import Batch, Evaluation


class EvaluationStream:
    """Speaks with the caller of an evaluation.

    max_message_bytes: of one batch. departure: ends the stream once the batches that were received have counted.
    """

    def __init__(self, evaluation: Evaluation, max_message_bytes: int, departure: Departure) -> None:
        self._evaluation = evaluation
        self._departure = departure
        self._inbox = Inbox(max_message_bytes, max_message_bytes)

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
            with self._departure.telling(lambda: evaluation.fail(self._departure.error())):
                while (position := await evaluation.advance(position or 0)) is not None:
                    yield v1.EvaluateResponse(frames=[v1.AnswerFrame(call=position)]).SerializeToString()
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)

    async def _read(self, requests: AsyncIterator[bytes]) -> None:
        try:
            async for message in requests:
                for frame in frames.decode_calls(message):
                    whole = self._inbox.take(frame)
                    if whole is not None:
                        first, data = whole
                        await self._add(first.call, data)
        except Exception as error:
            self._evaluation.fail(error)
        else:
            self._evaluation.complete()

    async def _add(self, sequence: int, data: bytes | memoryview) -> None:
        try:
            # A view is read like bytes.
            header, parts = messages.decode(v1.EvaluationBatch, data)  # type: ignore[arg-type]
        except errors.InvalidRequest as error:
            raise type(error)(f"batch {sequence}: {error}") from None
        await self._evaluation.add(Batch(sequence, header.update_id, parts, len(data)))
