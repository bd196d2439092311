"""Invalid bytes raise only our own errors and leak no memory."""

from __future__ import annotations

import gc
import random
import resource

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forwardpass import v1
from forwardpass.wire import errors, fields, messages
from forwardpass.wire.methods import METHODS
from forwardpass.wire.structures import Structure
from support.arrays import structures

REQUESTS = [method.request for method in METHODS.values()]


def decode_all(data: bytes) -> None:
    """Decodes bytes as every request: each gives a complete message, or our own error."""
    for kind in REQUESTS:
        try:
            header, parts = messages.decode(kind, data)
        except errors.InvalidRequest:
            continue
        assert type(header) is kind
        assert parts.keys() <= set(messages.places(kind))
        assert all(len(part.leaves) == part.tree.num_leaves for part in parts.values())


@settings(max_examples=300)
@given(st.binary(max_size=200))
def test_any_bytes_are_decoded_or_refused(data):
    decode_all(data)


@settings(max_examples=300)
@given(structures(), st.randoms(use_true_random=False))
def test_changed_messages_are_decoded_or_refused(value, rng):
    data = bytearray(messages.encode(v1.PredictOnBatchRequest(), {"x": Structure.of(value)}))
    for _ in range(rng.randint(1, 4)):
        data[rng.randrange(len(data))] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)])
    decode_all(bytes(data))


@settings(max_examples=100)
@given(structures(), st.integers(0, 10**6))
def test_truncated_messages_are_decoded_or_refused(value, at):
    data = messages.encode(v1.PredictOnBatchRequest(), {"x": Structure.of(value)})
    decode_all(data[: at % (len(data) + 1)])


def test_hostile_shapes_and_endless_new_trees_leave_no_memory_behind():
    rng = random.Random(0)
    sides = [0, 1, 2, 2**31, 2**32, 2**62, 2**63 - 1, -1]

    def one_round(count: int) -> None:
        for index in range(count):
            leaf = v1.Tensor(data_type=rng.randrange(18), shape=rng.choices(sides, k=rng.randrange(8)), data=b"1234")
            tree = v1.TreeDef(
                dict=v1.TreeDef.Mapping(
                    keys=[f"{rng.random()}{index}" * 8], values=[v1.TreeDef(leaf=v1.TreeDef.Leaf())]
                )
            )
            structure = v1.Structure(tree=tree, leaves=[leaf])
            decode_all(v1.PredictOnBatchRequest(x=structure).SerializeToString())

    one_round(3000)  # Fills the caches, which are bounded.
    gc.collect()
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    one_round(6000)
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib
    # If all were cached, 6000 trees would take about 10 MiB; one array of 2**31 bytes takes 2 GiB.
    assert grown_kib < 4096


@pytest.mark.parametrize(
    "data",
    [
        b"\xa0\x06\x01" * 10**6,
        fields.prefix(5, 3 * 10**6) + b"\xa0\x06\x01" * 10**6,
    ],
    ids=["unknown fields", "unknown fields in a structure"],
)
def test_endless_small_fields_are_refused_before_they_take_memory(data):
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(errors.InvalidRequest, match="more than 131072 fields"):
        messages.decode(v1.PredictOnBatchRequest, data)
    # 131072 bytes objects take 5 MiB; a million would take 40 MiB.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < 20 * 1024


def test_endless_strings_are_refused():
    data = bytes(4 * (2**20 + 1))
    tensor = v1.Tensor(data_type=v1.DataType.DATA_TYPE_STRING, shape=[2**20 + 1], data=data)
    structure = v1.Structure(tree=v1.TreeDef(leaf=v1.TreeDef.Leaf()), leaves=[tensor])
    with pytest.raises(errors.ShapeMismatch, match="at most 1048576 strings"):
        messages.decode(v1.PredictOnBatchRequest, v1.PredictOnBatchRequest(x=structure).SerializeToString())


def test_a_large_message_costs_no_second_copy():
    data = messages.encode(v1.PredictOnBatchRequest(), {"x": Structure.of(np.zeros(2**25, np.uint8))})
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _, parts = messages.decode(v1.PredictOnBatchRequest, data)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < 2**14
    assert parts["x"].leaves[0].nbytes == 2**25
