"""Loads on a real server that serves: who gives way to whom."""

from __future__ import annotations

import concurrent.futures
import contextlib
import pathlib
import sys

import grpc
import pytest

from forwardpass import v1
from support import zoo
from support.servers import ServerProcess, wait_until


def low_priorities(server: ServerProcess) -> set[str]:
    """The numbers of the server's threads that give way to its first; but for one of TensorFlow's.

    That one starts with the first graph, and works at nothing but graphs that are built.
    """
    found = {}
    for task in pathlib.Path(f"/proc/{server.process.pid}/task").iterdir():
        # A thread may end meanwhile.
        with contextlib.suppress(OSError):
            name, _, fields = (task / "stat").read_text().partition("(")[2].rpartition(")")
            if name != "tf_graph_runner":
                found[task.name] = int(fields.split()[16])
    return {task for task, nice in found.items() if nice > found[str(server.process.pid)]}


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere threads have no priority of their own")
def test_a_load_has_low_priority_and_serving_threads_keep_theirs(tmp_path):
    zoo.write_repository(tmp_path)
    request = v1.ReloadModelRequest(model=v1.ModelSelector(name="keras_cnn", version=1)).SerializeToString()
    with ServerProcess(
        "--required-models", "none", "--model-repository", str(tmp_path), "--management-port", "0"
    ) as server:
        wait_until(lambda: not low_priorities(server))
        with (
            grpc.insecure_channel(server.management_address) as channel,
            concurrent.futures.ThreadPoolExecutor(1) as pool,
        ):
            reload = channel.unary_unary("/forwardpass.v1.ManagementService/ReloadModel")
            loading = pool.submit(reload, request, timeout=60)
            wait_until(lambda: bool(low_priorities(server)))
            loading.result()
        wait_until(lambda: not low_priorities(server))
