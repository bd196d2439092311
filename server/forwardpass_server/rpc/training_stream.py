"""The stream of a training RPC: client updates one after another, their batches in, what they lead to out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import NamedTuple

from forwardpass import v1
from forwardpass.wire import errors, fields, limits
from forwardpass.wire.structures import Structure
from forwardpass_server.rpc.admitted_inbox import AdmittedInbox
from forwardpass_server.rpc.batch_reader import BatchReader
from forwardpass_server.rpc.codec import Codec
from forwardpass_server.rpc.drain import Drain
from forwardpass_server.rpc.selectors import checked
from forwardpass_server.training.service import Training, Trainings
from forwardpass_server.training.starts import Start
from forwardpass_server.training.update import Checkpoint, Result

_FRAMES = v1.TrainRequest.DESCRIPTOR.fields_by_name["frames"].number

# Fields of a request besides its frames: there are two.
_MAX_OTHERS = 16

# After so many fields of a request other tasks of the event loop get a turn.
_FIELDS_PER_TURN = 1024


class TrainingStream:
    """Joins one RPC's stream of messages to client updates.

    inbox: of this stream only. drain: when the server drains, an update that is received completely ends with its
    result. Any other ends after its received batches.
    """

    def __init__(self, trainings: Trainings, principal: str, codec: Codec, inbox: AdmittedInbox, drain: Drain) -> None:
        self._trainings = trainings
        self._principal = principal
        self._codec = codec
        self._inbox = inbox
        self._drain = drain

    async def run(self, requests: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """The responses, until the requests have ended after an update.

        Raises ServerUnavailable where the server drains before that.
        """
        try:
            while (message := await self._drain.until(_next(requests))) is not None:
                start = _start(message)
                async with self._trainings.begin(self._principal, start) as training:
                    async for response in self._update(training, message, requests):
                        yield response
        finally:
            self._inbox.close()

    async def _update(
        self, training: Training, message: _Message, requests: AsyncIterator[bytes]
    ) -> AsyncIterator[bytes]:
        """The responses of one update. message: the first one."""
        batches, update = training.batches, training.update
        position: int | None = batches.position
        at = v1.TrainingPosition(model=update.identity.message(), sequence=position)
        yield v1.TrainResponse(position=at).SerializeToString()
        reading = asyncio.ensure_future(self._read(training, message, requests))
        try:
            with self._drain.notifying(lambda: self._interrupt(training)):
                while (position := await batches.advance(position or 0)) is not None:
                    for checkpoint in update.new_checkpoints():
                        yield _checkpoint(checkpoint)
                    yield v1.TrainResponse(frames=[v1.AnswerFrame(call=position)]).SerializeToString()
            yield await self._result(await training.result())
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)

    def _interrupt(self, training: Training) -> None:
        """Ends an update whose batches have not all been received."""
        if not training.batches.is_complete:
            training.batches.fail(self._drain.error())

    async def _read(self, training: Training, message: _Message, requests: AsyncIterator[bytes]) -> None:
        batches = training.batches
        reader = BatchReader(v1.TrainingBatch, lambda header: None, self._codec, self._inbox, batches)
        try:
            while True:
                await reader.take(message.data)
                if message.head.finish:
                    break
                following = await _next(requests)
                if following is None:
                    raise errors.InvalidRequest(place="last message", expected="finish", found="the end of the stream")
                if following.head.HasField("start"):
                    raise errors.InvalidRequest(place="start", expected="finish of the update before it", found="start")
                message = following
        except Exception as error:
            batches.fail(error)
        else:
            batches.complete()

    async def _result(self, result: Result) -> bytes:
        message = v1.TrainingResult(
            weights_id=result.weights_id,
            loss=result.loss,
            num_examples=result.num_examples,
            num_steps=result.num_steps,
            optimizer_state_id=result.optimizer_state_id,
        )
        parts: Mapping[str, Structure] = {} if result.metrics is None else {"metrics": result.metrics}
        return (await self._codec.encode(v1.TrainResponse(result=message), parts)).join()


class _Message(NamedTuple):
    """A request of the stream. head: the request without its frames."""

    data: bytes
    head: v1.TrainRequest


async def _next(requests: AsyncIterator[bytes]) -> _Message | None:
    """The next request; None at the end. Raises InvalidRequest."""
    async for data in requests:
        return _Message(data, await _head(data))
    return None


async def _head(data: bytes) -> v1.TrainRequest:
    """A request without its frames. Raises InvalidRequest."""
    others: list[bytes] = []
    for count, (number, _, start, _, end) in enumerate(fields.scan(data, 0, len(data)), 1):
        if number != _FRAMES:
            if len(others) >= _MAX_OTHERS:
                raise fields.malformed(f"more than {_MAX_OTHERS} fields besides frames", start)
            others.append(data[start:end])
        if not count % _FIELDS_PER_TURN:
            await asyncio.sleep(0)
    return fields.parse(v1.TrainRequest, b"".join(others))


def _start(message: _Message) -> Start:
    """What an update begins with. Raises InvalidRequest."""
    if not message.head.HasField("start"):
        raise errors.InvalidRequest(place="first message", expected="start", found="another message")
    start = message.head.start
    if len(start.trainable) > limits.DEFAULT.max_leaves:
        raise errors.InvalidRequest(
            place="start.trainable",
            expected=f"at most {limits.DEFAULT.max_leaves} booleans",
            found=f"{len(start.trainable)}",
        )
    model = checked(start.model)
    return Start(
        name=model.name,
        version=model.version,
        label=model.label,
        weights_id=start.weights_id,
        optimizer=start.optimizer,
        learning_rate=start.learning_rate if start.HasField("learning_rate") else None,
        proximal=start.proximal,
        trainable=tuple(start.trainable),
        optimizer_state_id=start.optimizer_state_id,
        weighted=start.weighted,
        checkpoint_steps=start.checkpoint_steps,
        keep_optimizer_state=start.keep_optimizer_state,
        checkpoint_sequence=start.checkpoint_sequence,
        start_weights_id=start.start_weights_id,
    )


def _checkpoint(checkpoint: Checkpoint) -> bytes:
    message = v1.TrainingCheckpoint(
        sequence=checkpoint.sequence,
        weights_id=checkpoint.weights_id,
        optimizer_state_id=checkpoint.optimizer_state_id,
    )
    return v1.TrainResponse(checkpoint=message).SerializeToString()
