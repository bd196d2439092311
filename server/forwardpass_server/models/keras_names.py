"""Names that Keras counts up (`auc`, `auc_1`, ...), the same in every process and for every load.

Keras counts in a state of the thread. Names that depend on what was loaded before would differ between replicas.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Mapping

# There is no public way to put the counters back, and a library must not change those of its caller.
from forwardpass_server.models.private_keras import global_state

_COUNTERS = "object_name_uids"

# What imported modules count. It changes only in `of_imports`. A load begins with it, so that the layers of a module
# and those of its functions never share a name.
_imported: dict[str, int] = {}


@contextlib.contextmanager
def fresh(counters: Mapping[str, int] | None = None) -> Iterator[dict[str, int]]:
    """Counts names from zero, or from these counters, and puts the caller's counters back."""
    kept = global_state.get_global_attribute(_COUNTERS)
    inside = defaultdict(int, counters or {})
    global_state.set_global_attribute(_COUNTERS, inside)
    try:
        yield inside
    finally:
        global_state.set_global_attribute(_COUNTERS, kept)


@contextlib.contextmanager
def of_imports() -> Iterator[None]:
    """For importing modules that may make Keras objects."""
    with fresh(_imported) as counters:
        yield
    _imported.update(counters)


@contextlib.contextmanager
def of_load() -> Iterator[None]:
    """For making the Keras objects of one model."""
    with fresh(_imported):
        yield
