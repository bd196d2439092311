"""Control groups that limit the memory of the processes in them."""

from __future__ import annotations

import contextlib
import os
import pathlib
import uuid
from collections.abc import Iterator

_ROOT = pathlib.Path("/sys/fs/cgroup")


class MemoryGroup:
    """A control group. entering: a command that enters it, and becomes the command behind it."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.entering = ["sh", "-c", 'echo $$ > "$0/cgroup.procs" && exec "$@"', str(folder)]


@contextlib.contextmanager
def memory_group(size_bytes: int) -> Iterator[MemoryGroup | None]:
    """A new control group of so much memory, of version 1 or 2; None where this user may not make one."""
    name = f"forwardpass-{uuid.uuid4().hex[:8]}"
    for folder, limit in (
        (_ROOT / "memory" / name, "memory.limit_in_bytes"),
        (_ROOT / name, "memory.max"),
    ):
        with contextlib.ExitStack() as stack:
            try:
                folder.mkdir()
                stack.callback(os.rmdir, folder)
                (folder / limit).write_text(str(size_bytes))
                # Without swap a process that takes too much is killed, as it is in a pod.
            except OSError:
                continue
            yield MemoryGroup(folder)
            return
    yield None
