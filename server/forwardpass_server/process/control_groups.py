"""What the control groups of this process leave it of the machine: those of its container, pod or service."""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Iterator

_ROOT = pathlib.Path("/")


def memory_bytes(root: pathlib.Path = _ROOT) -> int:
    """The memory that this process may take: the machine's, or less where one of its control groups says so.

    root: where /proc and /sys are.
    """
    meminfo = (root / "proc/meminfo").read_text()
    machine_bytes = next(int(line.split()[1]) * 1024 for line in meminfo.splitlines() if line.startswith("MemTotal:"))
    # "max" is no limit, nor is a number beyond what a machine has, which stands for it in version 1.
    limits = (int(text) for text in _limits("memory", "memory.limit_in_bytes", "memory.max", root) if text.isdigit())
    return min([machine_bytes, *limits])


def cores(root: pathlib.Path = _ROOT) -> int:
    """The cores that this process may run on, or fewer where a quota of its control groups gives it less time.

    A part of a core counts as one: 1.5 are 2. root: where /proc and /sys are.
    """
    # Other systems than Linux know no affinity.
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # Version 1 has two files, version 2 both numbers in one.
    quotas = _limits("cpu", "cpu.cfs_quota_us", "cpu.max", root)
    periods = _limits("cpu", "cpu.cfs_period_us", "cpu.max", root)
    numbers = ((quota.split()[0], int(period.split()[-1])) for quota, period in zip(quotas, periods, strict=True))
    # Without a quota it is "max", or -1.
    return min([allowed, *(-(-int(quota) // period) for quota, period in numbers if quota.isdigit())])


def _limits(controller: str, name: str, unified_name: str, root: pathlib.Path) -> Iterator[str]:
    """What a limit is in each control group of this process, from its own to the one above all.

    controller, name: of version 1, which has a tree for each controller. unified_name: of version 2, which has one.
    """
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                yield from _upwards(root / "sys/fs/cgroup", path, unified_name)
            elif controller in controllers.split(","):
                yield from _upwards(root / "sys/fs/cgroup" / controllers, path, name)


def _upwards(tree: pathlib.Path, path: str, name: str) -> Iterator[str]:
    """The texts of a file in a group of a tree, and in each above it.

    A container may see only its own group, as the root of the tree, and be told a path of the machine's: what is not
    there is left out.
    """
    group = tree / path.lstrip("/")
    while True:
        with contextlib.suppress(OSError):
            yield (group / name).read_text().strip()
        if group == tree:
            return
        group = group.parent
