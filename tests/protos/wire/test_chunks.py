"""Large data in chunks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forwardpass import v1
from forwardpass.wire import chunks, errors


@given(st.lists(st.binary(max_size=20), max_size=6), st.integers(1, 15))
def test_pieces_are_split_into_chunks_of_limited_size(pieces, chunk_bytes):
    found = [b"".join(chunk) for chunk in chunks.split(map(memoryview, pieces), chunk_bytes)]
    assert b"".join(found) == b"".join(pieces)
    assert all(len(chunk) == chunk_bytes for chunk in found[:-1])
    assert all(0 < len(chunk) <= chunk_bytes for chunk in found)


def test_splitting_copies_nothing():
    data = memoryview(bytearray(b"abcdef"))
    ((first,), (second,)) = chunks.split([data], 3)
    data[0:1] = b"x"
    assert bytes(first) == b"xbc"
    assert bytes(second) == b"def"


def test_a_chunk_is_a_valid_protobuf_message():
    header = v1.UploadTensorsRequest(digest=b"d", offset=3)
    encoded = chunks.encode(header, [memoryview(b"ab"), memoryview(b"c")])
    assert v1.UploadTensorsRequest.FromString(encoded) == v1.UploadTensorsRequest(digest=b"d", offset=3, data=b"abc")
    found, data = chunks.decode(v1.UploadTensorsRequest, encoded)
    assert found == header
    assert bytes(data) == b"abc"


@pytest.mark.parametrize("data", [b"\xff", b"\x1a\x05ab", b"\x1a\x01a\x1a\x01b", b"\x18\x01"])
def test_invalid_chunks_are_refused(data):
    with pytest.raises(errors.InvalidRequest):
        chunks.decode(v1.UploadTensorsRequest, data)
