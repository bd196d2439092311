"""The stream of an evaluation RPC: it receives batches, and sends their numbers once they are counted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from forwardpass import v1
from forwardpass_server.rpc.admitted_inbox import AdmittedInbox
from forwardpass_server.rpc.batch_reader import BatchReader
from forwardpass_server.rpc.codec import Codec
from forwardpass_server.rpc.drain import Drain
from forwardpass_server.sessions.evaluation import Evaluation


class EvaluationStream:
    """Joins one RPC's stream of messages to an evaluation.

    inbox: of this stream only. drain: when the server drains, the stream ends after all received batches are counted.
    """

    def __init__(self, evaluation: Evaluation, codec: Codec, inbox: AdmittedInbox, drain: Drain) -> None:
        self._identity = evaluation.identity
        self._batches = evaluation.batches
        self._drain = drain
        self._inbox = inbox
        self._reader = BatchReader(
            v1.EvaluationBatch, lambda header: header.update_id, codec, inbox, evaluation.batches
        )

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
                await self._reader.take(message)
        except Exception as error:
            self._batches.fail(error)
        else:
            self._batches.complete()
