"""The cores that a process may use: by its affinity, and by the quotas of its control groups."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest

from forwardpass_server.app import cores

MACHINE = len(os.sched_getaffinity(0))


def groups(folder: pathlib.Path, membership: str, files: dict[str, str]) -> tuple[pathlib.Path, pathlib.Path]:
    """Control groups as the kernel shows them. files: what stands in them, by path. Returns what `count` takes."""
    for path, text in files.items():
        file = folder / "cgroup" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    (folder / "self").write_text(membership)
    return folder / "cgroup", folder / "self"


VERSION_2 = "0::/\n"
VERSION_1 = "9:name=systemd:/\n8:cpuset:/\n4:memory:/a\n2:cpu,cpuacct:/docker/abc\n0::/\n"


@pytest.mark.parametrize(
    "membership, files, quota",
    [
        pytest.param(VERSION_2, {"cpu.max": "100000 100000\n"}, 1, id="a container's quota"),
        pytest.param(VERSION_2, {"cpu.max": "50000 100000\n"}, 1, id="half a core"),
        pytest.param(VERSION_2, {"cpu.max": "150000 100000\n"}, 2, id="one and a half"),
        pytest.param(VERSION_2, {"cpu.max": "1600000 50000\n"}, 32, id="another period"),
        pytest.param(VERSION_2, {"cpu.max": "max 100000\n"}, None, id="no quota"),
        pytest.param(VERSION_2, {}, None, id="no file, as in the root"),
        pytest.param(
            "0::/kubepods.slice/pod1/abc\n",
            {
                "kubepods.slice/cpu.max": "max 100000\n",
                "kubepods.slice/pod1/cpu.max": "100000 100000\n",
                "kubepods.slice/pod1/abc/cpu.max": "400000 100000\n",
            },
            1,
            id="a group above has less",
        ),
        pytest.param("0::/../../elsewhere\n", {"cpu.max": "100000 100000\n"}, 1, id="a group outside of what is seen"),
        pytest.param(
            VERSION_1,
            {"cpu/docker/abc/cpu.cfs_quota_us": "100000\n", "cpu/docker/abc/cpu.cfs_period_us": "100000\n"},
            1,
            id="version 1",
        ),
        pytest.param(
            VERSION_1,
            {"cpu/cpu.cfs_quota_us": "70000\n", "cpu/cpu.cfs_period_us": "100000\n"},
            1,
            id="version 1, the host's path in a container",
        ),
        pytest.param(
            VERSION_1,
            {"cpu/docker/abc/cpu.cfs_quota_us": "-1\n", "cpu/docker/abc/cpu.cfs_period_us": "100000\n"},
            None,
            id="version 1, no quota",
        ),
        pytest.param(
            "1:cpuset:/\n",
            {"cpuset/cpu.max": "100000 100000\n", "cpu/cpu.cfs_quota_us": "1\n", "cpu/cpu.cfs_period_us": "1\n"},
            None,
            id="no group with quotas",
        ),
        pytest.param("", {}, None, id="a system without control groups"),
    ],
)
def test_a_quota_is_counted_in_cores_rounded_up(tmp_path, membership, files, quota):
    assert cores.count(*groups(tmp_path, membership, files)) == min(MACHINE, quota or MACHINE)


def test_a_large_quota_gives_no_cores_that_there_are_not(tmp_path):
    assert cores.count(*groups(tmp_path, VERSION_2, {"cpu.max": "102400000 100000\n"})) == MACHINE


def test_files_that_are_not_there_are_no_quota(tmp_path):
    assert cores.count(tmp_path / "none", tmp_path / "none") == MACHINE


def test_a_process_that_is_bound_to_one_core_counts_one_and_runs_two_computations():
    code = (
        "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]);"
        "from forwardpass_server.app import cores; from forwardpass_server.app.settings import Settings;"
        "print(cores.count(), Settings(factories={'slow': 'support.zoo:slow'}).execution_threads)"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "1 2\n"
