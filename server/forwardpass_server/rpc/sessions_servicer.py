"""The methods of MetricsSessionService."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any

from google.protobuf.message import Message

from forwardpass import v1
from forwardpass.wire import errors, fields
from forwardpass.wire.chunks import Pieces
from forwardpass.wire.description import Function
from forwardpass.wire.structures import Structure
from forwardpass_server.access import principals
from forwardpass_server.calls.admission import Admission
from forwardpass_server.calls.execution import Invocation
from forwardpass_server.rpc.admitted_inbox import AdmittedInbox
from forwardpass_server.rpc.codec import Codec
from forwardpass_server.rpc.drain import Drain
from forwardpass_server.rpc.evaluation_stream import EvaluationStream
from forwardpass_server.rpc.selectors import checked
from forwardpass_server.sessions.evaluation import MAX_TARGETS, Evaluations
from forwardpass_server.sessions.records import UpdateIdentity
from forwardpass_server.sessions.service import Sessions
from forwardpass_server.sessions.session import Session


class SessionsServicer:
    """Each method has the name of its RPC, takes the request's bytes and returns the response's, or its pieces."""

    def __init__(
        self,
        sessions: Sessions,
        evaluations: Evaluations,
        codec: Codec,
        max_message_bytes: int,
        admission: Admission,
        drain: Drain,
    ) -> None:
        self._sessions = sessions
        self._evaluations = evaluations
        self._max_message_bytes = max_message_bytes
        self._drain = drain
        self._codec = codec
        self._admission = admission

    async def OpenSession(self, data: bytes, context: object) -> bytes:
        incoming = self._codec.open(v1.OpenSessionRequest, data)
        header = incoming.header
        model = checked(header.model)
        session = await self._sessions.open(
            principals.current(),
            header.session_id,
            model.name,
            model.version,
            model.label,
            resume=header.resume,
            read=incoming.parts,
            size_bytes=incoming.size_bytes,
        )
        identity = session.servable.identity.message()
        return v1.OpenSessionResponse(model=identity, updates=session.record.updates).SerializeToString()

    async def UpdateSession(self, data: bytes, context: object) -> bytes:
        incoming = self._codec.open(v1.UpdateSessionRequest, data)
        update = UpdateIdentity.of(incoming.header.update)
        session = await self._sessions.update(principals.current(), update, incoming.parts, incoming.size_bytes)
        return (await self._answer(v1.UpdateSessionResponse, session, {})).join()

    async def ForwardPassInSession(self, data: bytes, context: object) -> Pieces:
        incoming = self._codec.open(v1.ForwardPassInSessionRequest, data)
        header = incoming.header
        principal = principals.current()
        update = UpdateIdentity.of(header.update)

        async def read() -> Invocation:
            parts = await incoming.parts()
            function, size_bytes = Function.FORWARD_PASS, incoming.size_bytes
            return Invocation(function, parts, size_bytes, header.training, header.weights_id, principal)

        session, results = await self._sessions.forward_pass(
            principal, update, read, incoming.size_bytes, header.without_predictions
        )
        return await self._answer(v1.ForwardPassInSessionResponse, session, results)

    async def MergeIntoSession(self, data: bytes, context: object) -> bytes:
        incoming = self._codec.open(v1.MergeIntoSessionRequest, data)
        header = incoming.header
        update = UpdateIdentity.of(header.update)
        session = await self._sessions.merge(
            principals.current(), update, header.other_session_id, incoming.parts, incoming.size_bytes
        )
        return (await self._answer(v1.MergeIntoSessionResponse, session, {})).join()

    async def GetSessionState(self, data: bytes, context: object) -> Pieces:
        header = fields.parse(v1.GetSessionStateRequest, data)
        session = await self._sessions.get(principals.current(), header.session_id)
        return await self._answer(v1.GetSessionStateResponse, session, {"state": session.record.state})

    async def GetSessionResult(self, data: bytes, context: object) -> Pieces:
        header = fields.parse(v1.GetSessionResultRequest, data)
        session, metrics = await self._sessions.result(principals.current(), header.session_id)
        return await self._answer(v1.GetSessionResultResponse, session, {"metrics": metrics})

    async def CloseSession(self, data: bytes, context: object) -> bytes:
        header = fields.parse(v1.CloseSessionRequest, data)
        await self._sessions.close(principals.current(), header.session_id)
        return b""

    async def Evaluate(self, requests: AsyncIterator[bytes], context: object) -> AsyncIterator[bytes]:
        start = await self._drain.until(_start(requests))
        # One too many is refused as well as a million.
        targets = [(target.session_id, target.weights_id) for target in start.targets[: MAX_TARGETS + 1]]
        principal = principals.current()
        async with self._evaluations.begin(
            principal, start.writer_id, start.training, targets, start.allow_rounding
        ) as evaluation:
            inbox = AdmittedInbox(self._max_message_bytes, self._admission, principal)
            stream = EvaluationStream(evaluation, self._codec, inbox, self._drain)
            async for response in stream.run(requests):
                yield response

    async def _answer(self, response_type: type[Message], session: Session, parts: Mapping[str, Structure]) -> Pieces:
        header: Any = session.servable.response_header(response_type)
        return await self._codec.encode(header, parts)


async def _start(requests: AsyncIterator[bytes]) -> v1.EvaluationStart:
    """What the first message of an evaluation says. Raises InvalidRequest."""
    async for message in requests:
        request = fields.parse(v1.EvaluateRequest, message)
        if request.HasField("start"):
            return request.start
        break
    raise errors.InvalidRequest(place="first message", expected="start", found="another message")
