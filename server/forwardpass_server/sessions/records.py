"""The record of a session, and its encoding as the bytes that a store keeps."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping, Sequence

from forwardpass import v1
from forwardpass.wire import errors, messages
from forwardpass.wire.description import ModelIdentity
from forwardpass.wire.structures import Structure
from forwardpass_server.calls import ids

# Each client object that resumes a session is one more writer.
_MAX_WRITERS = 1024

# An outcome is stored again with every update: this holds the outputs of a small batch, or the loss of any batch.
_MAX_OUTCOME_BYTES = 1024


@dataclasses.dataclass(frozen=True, slots=True)
class UpdateIdentity:
    """Identifies one update of a session: see `forwardpass.v1.UpdateIdentity`."""

    session_id: bytes
    writer_id: bytes
    sequence: int
    update_id: bytes

    @classmethod
    def of(cls, message: v1.UpdateIdentity) -> UpdateIdentity:
        """Decodes and checks a message. Raises InvalidRequest."""
        for name in ("session_id", "writer_id", "update_id"):
            ids.check(getattr(message, name), f"update.{name}")
        if message.sequence < 1:
            raise errors.InvalidRequest(place="update.sequence", expected="1 or more", found=f"{message.sequence}")
        return cls(message.session_id, message.writer_id, message.sequence, message.update_id)


@dataclasses.dataclass(frozen=True, slots=True)
class Writer:
    """The last applied update of one writer. outcome: the batch output that it was answered with; b"" for none."""

    sequence: int
    update_id: bytes
    outcome: bytes


class UpdateStatus(enum.Enum):
    """Whether an update is to be applied to a record."""

    NEW = "follows the last applied update of its writer"
    DUPLICATE = "is the last applied update of its writer, sent again"


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """A session at one moment.

    updates: the number of updates that were applied. writers: by their ids.
    state: as `spec.metrics_state` of the model.
    """

    identity: ModelIdentity
    state: Structure
    updates: int = 0
    writers: Mapping[bytes, Writer] = dataclasses.field(default_factory=dict)

    def sequence(self, writer_id: bytes) -> int:
        """The sequence number of a writer's last applied update; 0 for a new writer."""
        writer = self.writers.get(writer_id)
        return writer.sequence if writer else 0

    def status_of(self, update: UpdateIdentity) -> UpdateStatus:
        """Whether an update is new or a duplicate.

        Raises SequenceMismatch for an update that is neither, and SessionLimitExceeded for one writer too many.
        """
        writer = self.writers.get(update.writer_id)
        if writer is not None and update.sequence == writer.sequence:
            if update.update_id == writer.update_id:
                return UpdateStatus.DUPLICATE
            raise errors.SequenceMismatch(
                place="update.update_id",
                expected=f"{writer.update_id.hex()}, that of update {writer.sequence}, or the next sequence number",
                found=update.update_id.hex(),
            )
        last = writer.sequence if writer else 0
        if update.sequence != last + 1:
            raise errors.SequenceMismatch(place="update.sequence", expected=f"{last + 1}", found=f"{update.sequence}")
        if writer is None and len(self.writers) >= _MAX_WRITERS:
            raise errors.SessionLimitExceeded(
                place="writers of this session", expected=f"at most {_MAX_WRITERS}", found="more"
            )
        return UpdateStatus.NEW

    def applied(self, updates: Sequence[UpdateIdentity]) -> int:
        """How many of these consecutive updates of one writer, from the first on, were applied.

        Raises SequenceMismatch where the others do not follow, and SessionLimitExceeded for one writer too many.
        """
        last = self.sequence(updates[0].writer_id) - updates[0].sequence
        if 0 <= last < len(updates):
            self.status_of(updates[last])
            return last + 1
        self.status_of(updates[0])
        return 0

    def after(self, updates: Sequence[UpdateIdentity], state: Structure, outcome: bytes) -> Record:
        """The record after these updates, which follow. outcome: of the last one; is kept if it is short."""
        kept = outcome if len(outcome) <= _MAX_OUTCOME_BYTES else b""
        last = updates[-1]
        writers = {**self.writers, last.writer_id: Writer(last.sequence, last.update_id, kept)}
        return Record(self.identity, state, self.updates + len(updates), writers)


def encode(record: Record) -> bytes:
    """Encodes a record as its message."""
    header = v1.SessionRecord(
        model=record.identity.message(),
        updates=record.updates,
        writers=[
            v1.SessionWriter(
                writer_id=writer_id, sequence=writer.sequence, update_id=writer.update_id, outcome=writer.outcome
            )
            for writer_id, writer in record.writers.items()
        ],
    )
    return messages.encode(header, {"state": record.state})


def decode(data: bytes) -> Record:
    """Decodes a record from its message."""
    header, parts = messages.decode(v1.SessionRecord, data)
    writers = {one.writer_id: Writer(one.sequence, one.update_id, one.outcome) for one in header.writers}
    identity = ModelIdentity(header.model.name, header.model.version, header.model.content_hash)
    return Record(identity, parts["state"], header.updates, writers)


def encode_outcome(results: Mapping[str, Structure]) -> bytes:
    """Encodes a batch output, or some of its fields, for a record; b"" if it is too long to be kept."""
    fields = {place.removeprefix("batch_output."): part for place, part in results.items()}
    pieces = messages.encode_pieces(v1.BatchOutput(), fields)
    return pieces.join() if len(pieces) <= _MAX_OUTCOME_BYTES else b""


def decode_outcome(outcome: bytes) -> dict[str, Structure]:
    """Decodes the fields of a batch output, named as in the response to a forward pass."""
    _, parts = messages.decode(v1.BatchOutput, outcome)
    return {f"batch_output.{name}": part for name, part in parts.items()}
