"""The sweep of a tier of weights, beside servers that use it."""

from __future__ import annotations

import os
import pathlib

import numpy as np
import pytest

from forwardpass.wire import manifests
from forwardpass.wire.manifests import WeightsManifest
from forwardpass.wire.structures import Structure
from forwardpass_server.storage.folder import FolderObjects
from forwardpass_server.weights import sweep as weight_sweep
from forwardpass_server.weights.sweep import Swept
from forwardpass_server.weights.tier import GRACE_S, WeightTier


class Silent:
    def weights_tier_read(self, size_bytes, seconds):
        pass

    def weights_tier_written(self, size_bytes, seconds):
        pass

    def weights_tier_failed(self, operation, reason):
        raise AssertionError(reason)


@pytest.fixture
def store(tmp_path):
    # A folder, because a test cannot choose the times of objects in S3.
    store = FolderObjects(tmp_path, is_written=True)
    store.open()
    return store


def put(store: FolderObjects, seed: int, principal: str = "") -> WeightsManifest:
    """Writes a set of 100 bytes of its own, and of 400 bytes that all sets share."""
    shared = np.ones(100, np.float32)
    structure = Structure.of(((np.full(25, seed, np.float32),), (shared,)))
    manifest = manifests.of_structure(structure, "w")
    WeightTier(store, Silent()).save(principal, manifest, zip(manifest.tensors, structure.leaves, strict=True))
    return manifest


def has(store: FolderObjects, manifest: WeightsManifest, principal: str = "") -> bool:
    """Whether a set can be read as a whole."""
    tier = WeightTier(store, Silent())
    if not tier.has(principal, manifest.weights_id):
        return False
    read = tier.manifest(principal, manifest.weights_id)
    return len(list(tier.tensors(principal, manifest.weights_id, list(read.distinct.values())))) == 2


def make_old(folder: pathlib.Path, seconds: float) -> None:
    """Makes all files of the folder older."""
    for path in folder.rglob("*"):
        if path.is_file():
            state = path.stat()
            os.utime(path, (state.st_mtime - seconds, state.st_mtime - seconds))


def test_tensors_without_a_set_are_deleted_after_a_day(store, tmp_path):
    kept, deleted = put(store, 1), put(store, 2)
    others = put(store, 2, "alice")
    WeightTier(store, Silent()).delete("", deleted.weights_id)
    assert weight_sweep.sweep(store) == Swept()
    make_old(tmp_path, GRACE_S + 60)
    assert weight_sweep.sweep(store) == Swept(tensors=1, size_bytes=100)
    assert weight_sweep.sweep(store) == Swept()
    assert has(store, kept)
    # The same tensor of another principal is another object.
    assert has(store, others, "alice")


def test_a_set_that_uses_an_old_tensor_makes_it_young(store, tmp_path):
    before = put(store, 1)
    WeightTier(store, Silent()).delete("", before.weights_id)
    make_old(tmp_path, GRACE_S + 60)
    # It shares a tensor that no set uses now, and that a sweep would delete.
    after = put(store, 2)
    listed = store.list

    class Between:
        """A store in which a set is written after the sweep has listed the sets."""

        def __getattr__(self, name):
            return getattr(store, name)

        def list(self, prefix=""):
            return iter([one for one in listed(prefix) if prefix != "sets/"])

    assert weight_sweep.sweep(Between()) == Swept(tensors=1, size_bytes=100)
    assert has(store, after)


def test_old_sets_are_deleted_on_request(store, tmp_path):
    old = put(store, 1)
    make_old(tmp_path, 3600)
    young = put(store, 2)
    assert weight_sweep.sweep(store, 7200) == Swept()
    assert weight_sweep.sweep(store, 1800) == Swept(sets=1)
    assert not has(store, old)
    assert has(store, young)
    # Servers that hold it on their device see its notice.
    tier = WeightTier(store, Silent())
    assert [weights_id for _, weights_id in tier.follow()] == [old.weights_id.hex()]


def test_unfinished_files_are_deleted_after_a_day(store, tmp_path):
    left = tmp_path / ".new" / "half"
    left.write_bytes(b"1")
    weight_sweep.sweep(store)
    assert left.exists()
    make_old(tmp_path, GRACE_S + 60)
    weight_sweep.sweep(store)
    assert not left.exists()


def test_a_damaged_set_does_not_stop_the_sweep(store, tmp_path):
    manifest = put(store, 1)
    (path,) = (tmp_path / "sets").glob("*/*")
    path.write_bytes(b"\xff")
    make_old(tmp_path, GRACE_S + 60)
    assert weight_sweep.sweep(store) == Swept(tensors=2, size_bytes=500)
    assert path.name == manifest.weights_id.hex()
