"""What a session is made of, and the bytes that a store keeps of it."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping

from forwardpass import v1
from forwardpass.wire import errors, messages
from forwardpass.wire.description import ModelIdentity
from forwardpass.wire.structures import Structure

ID_BYTES = 16

# Of a session. Each that resumes it is one more.
_MAX_WRITERS = 1024

# Kept with the state, and written with every update: the outputs of a small batch, or the loss alone of any.
_MAX_OUTCOME_BYTES = 1024


@dataclasses.dataclass(frozen=True, slots=True)
class UpdateIdentity:
    """Which update of a session this is: see `forwardpass.v1.UpdateIdentity`."""

    session_id: bytes
    writer_id: bytes
    sequence: int
    update_id: bytes

    @classmethod
    def of(cls, message: v1.UpdateIdentity) -> UpdateIdentity:
        """Raises InvalidRequest for one that cannot be."""
        for name in ("session_id", "writer_id", "update_id"):
            check_id(getattr(message, name), f"update.{name}")
        if message.sequence < 1:
            raise errors.InvalidRequest(place="update.sequence", expected="1 or more", found=f"{message.sequence}")
        return cls(message.session_id, message.writer_id, message.sequence, message.update_id)


def check_id(value: bytes, place: str) -> None:
    """Raises InvalidRequest for what is no id."""
    if len(value) != ID_BYTES:
        raise errors.InvalidRequest(place=place, expected=f"{ID_BYTES} bytes", found=f"{len(value)}")


@dataclasses.dataclass(frozen=True, slots=True)
class Writer:
    """The last update that a writer had applied. outcome: the batch output it was answered with; b"" for none."""

    sequence: int
    update_id: bytes
    outcome: bytes


class Standing(enum.Enum):
    """How an update stands to a session."""

    NEXT = "is to be applied"
    APPLIED = "is the last that its writer had applied"


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """A session at one moment.

    updates: how many have been applied. writers: by their ids. state: as `spec.metrics_state` of the model.
    """

    identity: ModelIdentity
    state: Structure
    updates: int = 0
    writers: Mapping[bytes, Writer] = dataclasses.field(default_factory=dict)

    def sequence(self, writer_id: bytes) -> int:
        """That of a writer's last update; 0 for a new one."""
        writer = self.writers.get(writer_id)
        return writer.sequence if writer else 0

    def standing(self, update: UpdateIdentity) -> Standing:
        """Raises SequenceMismatch for an update that neither follows the last nor is it, and SessionLimitExceeded."""
        writer = self.writers.get(update.writer_id)
        if writer is not None and update.sequence == writer.sequence:
            if update.update_id == writer.update_id:
                return Standing.APPLIED
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
                place="writers of this session", expected=f"at most {_MAX_WRITERS}", found="one more"
            )
        return Standing.NEXT

    def after(self, update: UpdateIdentity, state: Structure, outcome: bytes) -> Record:
        """The session after one more update. outcome: is recorded where it is short."""
        kept = outcome if len(outcome) <= _MAX_OUTCOME_BYTES else b""
        writers = {**self.writers, update.writer_id: Writer(update.sequence, update.update_id, kept)}
        return Record(self.identity, state, self.updates + 1, writers)


def encode(record: Record) -> bytes:
    """A record as its message."""
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
    """The record that a message holds."""
    header, parts = messages.decode(v1.SessionRecord, data)
    writers = {one.writer_id: Writer(one.sequence, one.update_id, one.outcome) for one in header.writers}
    identity = ModelIdentity(header.model.name, header.model.version, header.model.content_hash)
    return Record(identity, parts["state"], header.updates, writers)


def encode_outcome(results: Mapping[str, Structure]) -> bytes:
    """A batch output, or some of its fields, to be recorded; b"" for one that is too long for that."""
    fields = {place.removeprefix("batch_output."): part for place, part in results.items()}
    pieces = messages.encode_pieces(v1.BatchOutput(), fields)
    return pieces.join() if len(pieces) <= _MAX_OUTCOME_BYTES else b""


def decode_outcome(outcome: bytes) -> dict[str, Structure]:
    """The fields of a batch output that was recorded, named as in the response to a forward pass."""
    _, parts = messages.decode(v1.BatchOutput, outcome)
    return {f"batch_output.{name}": part for name, part in parts.items()}
