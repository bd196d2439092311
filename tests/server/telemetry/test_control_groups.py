"""How much memory a process may take: on a machine of its own, in containers, and as a service."""

from __future__ import annotations

import pathlib

import pytest

from forwardpass_server.telemetry import control_groups

MACHINE_BYTES = 256 * 2**30
POD_BYTES = 4 * 2**30

# What stands for no limit in version 1.
NO_LIMIT = str(2**63 - 4096)


def machine(root: pathlib.Path, groups: str, limits: dict[str, str]) -> pathlib.Path:
    """A machine of 256 GiB. groups: of the process, as /proc says. limits: by their files below /sys/fs/cgroup."""
    (root / "proc" / "self").mkdir(parents=True)
    (root / "proc" / "meminfo").write_text(f"MemTotal:       {MACHINE_BYTES // 1024} kB\nMemFree:  1 kB\n")
    (root / "proc" / "self" / "cgroup").write_text(groups)
    for name, text in limits.items():
        file = root / "sys" / "fs" / "cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")
    return root


@pytest.mark.parametrize(
    "groups, limits, expected",
    [
        pytest.param("0::/\n", {}, MACHINE_BYTES, id="no container"),
        pytest.param("0::/\n", {"memory.max": str(POD_BYTES)}, POD_BYTES, id="a pod, version 2"),
        pytest.param("0::/\n", {"memory.max": "max"}, MACHINE_BYTES, id="a pod without a limit"),
        pytest.param("0::/\n", {"memory.max": str(2**50)}, MACHINE_BYTES, id="a limit above the machine's memory"),
        pytest.param(
            "0::/kubepods.slice/pod1.slice/a.scope\n", {"memory.max": str(POD_BYTES)}, POD_BYTES, id="the host's path"
        ),
        pytest.param("0::/../../b.scope\n", {"memory.max": str(POD_BYTES)}, POD_BYTES, id="a path outside the tree"),
        pytest.param(
            "0::/system.slice/forwardpass.service\n",
            {"system.slice/memory.max": "max", "system.slice/forwardpass.service/memory.max": str(POD_BYTES)},
            POD_BYTES,
            id="a service",
        ),
        pytest.param(
            "0::/limited.slice/forwardpass.service\n",
            {"limited.slice/memory.max": str(POD_BYTES), "limited.slice/forwardpass.service/memory.max": "max"},
            POD_BYTES,
            id="a service in a slice with a limit",
        ),
        pytest.param(
            "5:cpu,cpuacct:/docker/a\n4:memory:/docker/a\n0::/\n",
            {"memory/memory.limit_in_bytes": str(POD_BYTES), "cpu,cpuacct/cpu.shares": "1024"},
            POD_BYTES,
            id="a container, version 1",
        ),
        pytest.param(
            "4:memory:/a/b\n0::/\n",
            {"memory/memory.limit_in_bytes": NO_LIMIT, "memory/a/b/memory.limit_in_bytes": str(POD_BYTES)},
            POD_BYTES,
            id="a group below others, version 1",
        ),
        pytest.param("4:memory:/\n", {"memory/memory.limit_in_bytes": NO_LIMIT}, MACHINE_BYTES, id="none, version 1"),
    ],
)
def test_a_process_may_take_what_the_least_of_its_groups_leaves_it(tmp_path, groups, limits, expected):
    assert control_groups.memory_bytes(machine(tmp_path, groups, limits)) == expected


def test_without_control_groups_it_is_the_machines_memory(tmp_path):
    root = machine(tmp_path, "", {})
    (root / "proc" / "self" / "cgroup").unlink()
    assert control_groups.memory_bytes(root) == MACHINE_BYTES


def test_this_process_has_some_and_no_more_than_the_machine():
    total = next(line for line in pathlib.Path("/proc/meminfo").read_text().splitlines() if "MemTotal" in line)
    assert 0 < control_groups.memory_bytes() <= int(total.split()[1]) * 1024
