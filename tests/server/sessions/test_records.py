"""What a session is made of: which update follows which, and the bytes that a store keeps."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from forwardpass import v1
from forwardpass.wire import errors
from forwardpass.wire.description import ModelIdentity
from forwardpass.wire.structures import Structure
from forwardpass_server.sessions import records as session_records
from forwardpass_server.sessions.records import Record, UpdateIdentity, UpdateStatus, Writer
from support.arrays import same_bits

SESSION, WRITER = b"s" * 16, b"w" * 16
STATE = Structure.of({"total": np.float32(1.5), "counts": [np.arange(3), np.array([b"a"], object)], "nothing": None})
RECORD = Record(ModelIdentity("digits", 3, b"h" * 32), STATE)


def identity(sequence: int, name: bytes = b"u", writer: bytes = WRITER) -> UpdateIdentity:
    return UpdateIdentity(SESSION, writer, sequence, name.ljust(16, b"."))


def after(*sequences: int, outcome: bytes = b"") -> Record:
    record = RECORD
    for sequence in sequences:
        record = record.after([identity(sequence)], STATE, outcome)
    return record


def test_a_record_is_decoded_unchanged():
    record = after(1, 2, outcome=b"outcome").after([identity(1, writer=b"o" * 16)], STATE, b"")
    found = session_records.decode(session_records.encode(record))
    assert (found.identity, found.updates, found.writers) == (record.identity, 3, record.writers)
    assert found.state.tree == STATE.tree
    assert all(same_bits(one, other) for one, other in zip(found.state.leaves, STATE.leaves, strict=True))


def test_updates_of_one_writer_follow_each_other():
    assert RECORD.status_of(identity(1)) is UpdateStatus.NEW
    assert after(1, 2).status_of(identity(3)) is UpdateStatus.NEW
    assert after(1, 2).status_of(identity(2)) is UpdateStatus.DUPLICATE
    assert after(1, 2).status_of(identity(1, writer=b"o" * 16)) is UpdateStatus.NEW
    assert (after(1, 2).sequence(WRITER), after(1, 2).sequence(b"o" * 16)) == (2, 0)


@pytest.mark.parametrize(
    "record, update, message",
    [
        (RECORD, identity(2), "update.sequence: expected 1, got 2"),
        (after(1, 2), identity(4), "update.sequence: expected 3, got 4"),
        (after(1, 2), identity(1), "update.sequence: expected 3, got 1"),
        (after(1, 2), identity(2, b"v"), "update.update_id: expected 752e2e2e"),
    ],
    ids=["a gap at the start", "a gap", "one that was passed", "another of the same number"],
)
def test_other_updates_are_refused_with_the_expected_number_or_id(record, update, message):
    with pytest.raises(errors.SequenceMismatch) as caught:
        record.status_of(update)
    assert str(caught.value).startswith(message)


def test_the_writers_of_a_session_are_limited():
    writers = {index.to_bytes(16, "big"): Writer(1, b"u" * 16, b"") for index in range(1024)}
    full = dataclasses.replace(RECORD, writers=writers)
    with pytest.raises(errors.SessionLimitExceeded, match="writers of this session: expected at most 1024"):
        full.status_of(identity(1))
    assert full.status_of(UpdateIdentity(SESSION, bytes(16), 2, b"v" * 16)) is UpdateStatus.NEW


def test_a_short_outcome_is_recorded_and_a_long_one_is_not():
    results = {
        "batch_output.loss": Structure.of(np.float32(2)),
        "batch_output.predictions": Structure.of({"logits": np.zeros((2, 3), np.float32)}),
        "batch_output.prediction_mask": Structure.of({"logits": np.array([True, False])}),
    }
    outcome = session_records.encode_outcome(results)
    found = session_records.decode_outcome(after(1, outcome=outcome).writers[WRITER].outcome)
    assert list(found) == list(results)
    assert found["batch_output.predictions"].leaves[0].shape == (2, 3)
    assert after(1, outcome=bytes(1025)).writers[WRITER].outcome == b""


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"session_id": b"short"}, "update.session_id: expected 16 bytes, got 5"),
        ({"writer_id": b""}, "update.writer_id: expected 16 bytes, got 0"),
        ({"update_id": bytes(17)}, "update.update_id: expected 16 bytes, got 17"),
        ({"sequence": 0}, "update.sequence: expected 1 or more, got 0"),
        ({"sequence": -1}, "update.sequence: expected 1 or more, got -1"),
    ],
)
def test_an_invalid_identity_is_refused(changes, message):
    fields = {"session_id": SESSION, "writer_id": WRITER, "sequence": 1, "update_id": b"u" * 16, **changes}
    with pytest.raises(errors.InvalidRequest, match=message):
        UpdateIdentity.of(v1.UpdateIdentity(**fields))


def test_of_several_updates_those_after_the_last_applied_one_are_new():
    several = [identity(2), identity(3), identity(4)]
    assert after(1).applied(several) == 0
    assert after(1, 2).applied(several) == 1
    assert after(1, 2, 3, 4).applied(several) == 3
    record = after(1, 2).after(several[1:], STATE, b"")
    assert (record.updates, record.sequence(WRITER)) == (4, 4)


@pytest.mark.parametrize(
    "record, expected",
    [
        (after(), "update.sequence: expected 1, got 2"),
        (after(1, 2, 3, 4, 5), "update.sequence: expected 6, got 2"),
        (after(1).after([identity(2, b"other")], STATE, b""), "update.update_id"),
    ],
)
def test_several_updates_that_do_not_follow_are_refused(record, expected):
    with pytest.raises(errors.SequenceMismatch, match=expected):
        record.applied([identity(2), identity(3), identity(4)])
