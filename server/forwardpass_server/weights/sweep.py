"""The sweep of a tier: deletes the tensors that no set uses."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import time

from forwardpass import v1
from forwardpass.wire import errors, fields
from forwardpass_server.storage.objects import ObjectStore
from forwardpass_server.weights.tier import GRACE_S


@dataclasses.dataclass(slots=True)
class Swept:
    """The numbers of deleted sets and tensors, and the bytes of these tensors."""

    sets: int = 0
    tensors: int = 0
    size_bytes: int = 0


def sweep(store: ObjectStore, sets_older_than_s: float | None = None) -> Swept:
    """Deletes the tensors that no set uses and that were written `GRACE_S` ago, and unfinished objects as old.

    sets_older_than_s: deletes sets that were written longer ago, too; None for no set. Servers may use the store at the
    same time: a set that is written meanwhile uses tensors that are young, or makes them young (`WeightTier.save`). A
    tensor that is made young in the moment of its deletion is lost; its sets must be put again.
    Raises OSError.
    """
    swept = Swept()
    now = time.time()
    # First the tensors, then the sets: see above.
    unused: dict[str, dict[str, int]] = collections.defaultdict(dict)
    for one in store.list("tensors/"):
        if now - one.modified > GRACE_S:
            _, folder, digest = one.name.split("/")
            unused[folder][digest] = one.size_bytes
    for one in store.list("sets/"):
        _, folder, weights_id = one.name.split("/")
        if sets_older_than_s is not None and now - one.modified > sets_older_than_s:
            store.write(f"deleted/{folder}-{weights_id}", b"")
            store.remove(one.name)
            swept.sets += 1
            continue
        # A set may be deleted meanwhile, and a damaged one cannot be used.
        with contextlib.suppress(FileNotFoundError, errors.InvalidRequest):
            for tensor in fields.parse(v1.WeightsManifest, store.read(one.name)).tensors:
                unused[folder].pop(tensor.digest.hex(), None)
    for folder, digests in unused.items():
        for digest, size_bytes in digests.items():
            name = f"tensors/{folder}/{digest}"
            found = store.state(name)
            if found is not None and now - found.modified > GRACE_S:
                store.remove(name)
                swept.tensors += 1
                swept.size_bytes += size_bytes
    for one in store.unfinished():
        if now - one.modified > GRACE_S:
            store.remove(one.name)
    return swept
