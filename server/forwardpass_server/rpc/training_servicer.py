"""The method of TrainingService."""

from __future__ import annotations

from collections.abc import AsyncIterator

from forwardpass_server.access import principals
from forwardpass_server.calls.admission import Admission
from forwardpass_server.rpc.admitted_inbox import AdmittedInbox
from forwardpass_server.rpc.codec import Codec
from forwardpass_server.rpc.drain import Drain
from forwardpass_server.rpc.training_stream import TrainingStream
from forwardpass_server.training.service import Trainings


class TrainingServicer:
    """The method has the name of its RPC; it takes a stream of requests' bytes, and returns one of responses'."""

    def __init__(
        self, trainings: Trainings, codec: Codec, max_message_bytes: int, admission: Admission, drain: Drain
    ) -> None:
        self._trainings = trainings
        self._codec = codec
        self._max_message_bytes = max_message_bytes
        self._admission = admission
        self._drain = drain

    def Train(self, requests: AsyncIterator[bytes], context: object) -> AsyncIterator[bytes]:
        """The responses of one stream of client updates."""
        principal = principals.current()
        inbox = AdmittedInbox(self._max_message_bytes, self._admission, principal)
        return TrainingStream(self._trainings, principal, self._codec, inbox, self._drain).run(requests)
