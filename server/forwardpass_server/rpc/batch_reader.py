"""Reads the batches of a stream: frames in, ordered batches out."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from google.protobuf.message import Message

from forwardpass.wire import errors, frames
from forwardpass_server.calls.ordered_batches import OrderedBatches
from forwardpass_server.rpc.admitted_inbox import AdmittedInbox
from forwardpass_server.rpc.codec import Codec

# After so many frames other tasks of the event loop get a turn.
_FRAMES_PER_TURN = 64


class BatchReader:
    """Joins the frames of a stream to batches, and adds them to ordered batches.

    batch_type: the message of one batch. update_id: the id of a batch, from its header; None for batches without ids.
    inbox: of this stream only.
    """

    def __init__(
        self,
        batch_type: type[Message],
        update_id: Callable[[Any], bytes | None],
        codec: Codec,
        inbox: AdmittedInbox,
        batches: OrderedBatches[Any],
    ) -> None:
        self._batch_type = batch_type
        self._update_id = update_id
        self._codec = codec
        self._inbox = inbox
        self._batches = batches

    async def take(self, message: bytes) -> None:
        """Takes the frames of one message. Waits while too many batches are in progress.

        Raises InvalidRequest or a subclass, MessageTooLarge, and ServerOverloaded.
        """
        for index, frame in enumerate(frames.decode_calls(message), 1):
            whole = await self._inbox.take_when_admitted(frame)
            if whole is not None:
                first, data = whole
                await self._add(first.call, data)
            if not index % _FRAMES_PER_TURN:
                await asyncio.sleep(0)

    async def _add(self, sequence: int, data: bytes | memoryview) -> None:
        try:
            # protobuf parses a memoryview like bytes.
            incoming = self._codec.open(self._batch_type, data)  # type: ignore[arg-type]
        except errors.InvalidRequest as error:
            raise type(error)(f"batch {sequence}: {error}") from None
        await self._batches.add(sequence, self._update_id(incoming.header), incoming.size_bytes, incoming.parts)
