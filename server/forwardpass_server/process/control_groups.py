"""Limits of memory and processors from the control groups of this process: its container, pod or service."""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Iterator

_ROOT = pathlib.Path("/")


def memory_bytes(root: pathlib.Path = _ROOT) -> int:
    """The memory that this process may use: that of the machine, or the lowest limit of its control groups.

    root: the folder that holds proc/ and sys/.
    """
    meminfo = (root / "proc/meminfo").read_text()
    machine_bytes = next(int(line.split()[1]) * 1024 for line in meminfo.splitlines() if line.startswith("MemTotal:"))
    # Without a limit, version 2 says "max" and version 1 a number larger than any machine's memory.
    limits = (int(text) for text in _limits("memory", "memory.limit_in_bytes", "memory.max", root) if text.isdigit())
    return min([machine_bytes, *limits])


def cores(root: pathlib.Path = _ROOT) -> int:
    """The number of cores that this process may use: by its affinity, or the lowest quota of its control groups.

    Rounded up: a quota of 1.5 cores gives 2. root: the folder that holds proc/ and sys/.
    """
    # Only Linux has sched_getaffinity.
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # Version 1 has two files, version 2 has both numbers in one file.
    quotas = _limits("cpu", "cpu.cfs_quota_us", "cpu.max", root)
    periods = _limits("cpu", "cpu.cfs_period_us", "cpu.max", root)
    numbers = ((quota.split()[0], int(period.split()[-1])) for quota, period in zip(quotas, periods, strict=True))
    # Without a quota the value is "max" or -1.
    return min([allowed, *(-(-int(quota) // period) for quota, period in numbers if quota.isdigit())])


def _limits(controller: str, name: str, unified_name: str, root: pathlib.Path) -> Iterator[str]:
    """The values of a limit in the control groups of this process, from its own group up to the root.

    controller, name: the controller and its file in version 1, which has a tree for each controller.
    unified_name: the file in version 2, which has one tree.
    """
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                yield from _upwards(root / "sys/fs/cgroup", path, unified_name)
            elif controller in controllers.split(","):
                yield from _upwards(root / "sys/fs/cgroup" / controllers, path, name)


def _upwards(tree: pathlib.Path, path: str, name: str) -> Iterator[str]:
    """The contents of a file in a control group and in each of its parents.

    Missing files are skipped: a container may see its own group as the root of the tree, while /proc names a path of
    the host.
    """
    group = tree / path.lstrip("/")
    while True:
        with contextlib.suppress(OSError):
            yield (group / name).read_text().strip()
        if group == tree:
            return
        group = group.parent
