"""Limits of memory and cores: without control groups, in containers, and in a service."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest

from forwardpass_server.process import control_groups

MACHINE_BYTES = 256 * 2**30
POD_BYTES = 4 * 2**30

CORES = len(os.sched_getaffinity(0))

# The value for no limit in version 1.
NO_LIMIT = str(2**63 - 4096)


def machine(root: pathlib.Path, groups: str, limits: dict[str, str]) -> pathlib.Path:
    """A machine with 256 GiB. groups: the contents of /proc/self/cgroup. limits: by files below /sys/fs/cgroup."""
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
def test_the_lowest_limit_of_the_control_groups_counts(tmp_path, groups, limits, expected):
    assert control_groups.memory_bytes(machine(tmp_path, groups, limits)) == expected


def test_without_control_groups_the_memory_of_the_machine_counts(tmp_path):
    root = machine(tmp_path, "", {})
    (root / "proc" / "self" / "cgroup").unlink()
    assert control_groups.memory_bytes(root) == MACHINE_BYTES


def test_the_limits_of_this_process_are_at_most_those_of_the_machine():
    total = next(line for line in pathlib.Path("/proc/meminfo").read_text().splitlines() if "MemTotal" in line)
    assert 0 < control_groups.memory_bytes() <= int(total.split()[1]) * 1024


@pytest.mark.parametrize(
    "groups, limits, quota",
    [
        pytest.param("0::/\n", {}, None, id="no container"),
        pytest.param("0::/\n", {"cpu.max": "max 100000"}, None, id="a pod without a quota"),
        pytest.param("0::/\n", {"cpu.max": "100000 100000"}, 1, id="a pod, version 2"),
        pytest.param("0::/\n", {"cpu.max": "50000 100000"}, 1, id="half a core"),
        pytest.param("0::/\n", {"cpu.max": "150000 100000"}, 2, id="one and a half"),
        pytest.param("0::/\n", {"cpu.max": "1600000 50000"}, 32, id="another period"),
        pytest.param("0::/\n", {"cpu.max": "102400000 100000"}, 1024, id="a quota above the machine's cores"),
        pytest.param("0::/kubepods.slice/a.scope\n", {"cpu.max": "100000 100000"}, 1, id="the host's path"),
        pytest.param(
            "0::/limited.slice/forwardpass.service\n",
            {
                "limited.slice/cpu.max": "100000 100000",
                "limited.slice/forwardpass.service/cpu.max": "400000 100000",
            },
            1,
            id="a service in a slice with less",
        ),
        pytest.param(
            "5:cpu,cpuacct:/docker/a\n4:memory:/docker/a\n0::/\n",
            {"cpu,cpuacct/cpu.cfs_quota_us": "70000", "cpu,cpuacct/cpu.cfs_period_us": "100000"},
            1,
            id="a container, version 1",
        ),
        pytest.param(
            "1:cpu:/a/b\n0::/\n",
            {
                "cpu/cpu.cfs_quota_us": "-1",
                "cpu/cpu.cfs_period_us": "100000",
                "cpu/a/b/cpu.cfs_quota_us": "100000",
                "cpu/a/b/cpu.cfs_period_us": "100000",
            },
            1,
            id="a group below others, version 1",
        ),
        pytest.param(
            "1:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None, id="none, version 1"
        ),
        pytest.param("2:cpuset:/\n", {"cpuset/cpu.max": "100000 100000"}, None, id="a controller without quotas"),
    ],
)
def test_a_quota_is_counted_in_cores_rounded_up(tmp_path, groups, limits, quota):
    assert control_groups.cores(machine(tmp_path, groups, limits)) == min(CORES, quota or CORES)


def test_a_process_that_is_bound_to_one_core_counts_one_and_runs_two_computations():
    code = (
        "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]);"
        "from forwardpass_server.app.settings import Settings;"
        "from forwardpass_server.process import control_groups;"
        "print(control_groups.cores(), Settings(factories={'slow': 'support.zoo:slow'}).execution_threads)"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "1 2\n"
