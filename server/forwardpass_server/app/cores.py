"""How many of the machine's cores this process may use."""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Iterator

_CGROUPS = pathlib.Path("/sys/fs/cgroup")
_MEMBERSHIP = pathlib.Path("/proc/self/cgroup")


def count(cgroups: pathlib.Path = _CGROUPS, membership: pathlib.Path = _MEMBERSHIP) -> int:
    """How many cores the process may run on, or fewer where a quota, such as a container's, gives it less time.

    A part of a core counts as one: 1.5 are 2, and there is never less than 1.
    cgroups: where control groups are mounted, of version 1 or 2 or both. membership: which of them the process is in.
    Source: cgroups(7), and the kernel's cgroup-v2 and sched-bwc documentation.
    """
    # Other systems than Linux know neither.
    schedulable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = (_quota(folder) for folder in _folders(cgroups, membership))
    return min([schedulable, *(cores for cores in quotas if cores is not None)])


def _folders(cgroups: pathlib.Path, membership: pathlib.Path) -> Iterator[pathlib.Path]:
    """Where quotas of the process may stand: those of its groups, and of all above them, hold together."""
    for line in _read(membership).splitlines():
        _, controllers, path = line.split(":", 2)
        # Version 2 has one tree of groups, version 1 one for each set of controllers, linked under each one's name.
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = cgroups / "cpu" if controllers else cgroups
        # In a container the path may be the host's, of which no more is mounted than what is the container's root here.
        folder = root / path.lstrip("/")
        yield from (one for one in (folder, *folder.parents) if one.is_relative_to(root))


def _quota(folder: pathlib.Path) -> int | None:
    """The quota of a group in cores, rounded up; None where there is none."""
    words = _read(folder / "cpu.max").split()
    words = words or [_read(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
    # Without a quota the first is "max" in version 2, and -1 in version 1.
    if not all(word.isdecimal() and int(word) for word in words):
        return None
    quota, period = map(int, words)
    return -(-quota // period)


def _read(file: pathlib.Path) -> str:
    with contextlib.suppress(OSError):
        return file.read_text()
    return ""
