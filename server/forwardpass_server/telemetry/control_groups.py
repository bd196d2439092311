"""What the control groups of this process leave it of the machine: those of its container, pod or service."""

from __future__ import annotations

import contextlib
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
