"""Replicas that share weights: calls/s of one client with one and with more of them. Prints Markdown.

    python benchmarks/scaling.py [--replicas 2] [--cpu 0.15] [--seconds 8] [--rounds 3] [--sets 1000]

Each replica is a process in a control group with a quota of the processor, which needs root. All have one folder as
their tier. One client with a handle of each set calls a model that takes some milliseconds, and checks each answer.
Then replicas are killed with kill -9 and restarted one after another under these calls. The exit status is 1 where a
call failed or was answered wrongly, or the client has sent weights twice.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import itertools
import os
import pathlib
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

TESTS = str(pathlib.Path(__file__).parent.parent / "tests")
sys.path.append(TESTS)
FOLDERS = [str(pathlib.Path(__file__).parent), TESTS]
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [*FOLDERS, os.environ.get("PYTHONPATH")]))

import forwardpass_client  # noqa: E402
from support.servers import ServerProcess  # noqa: E402

WIDTH = 128
# Calls in training mode are computed alone. Otherwise servers compute calls of different weights together, and one
# that has more calls to choose from gains more: this would hide what another replica adds.
TRAINING = True
# Short, so that a call waits for the quota for some milliseconds only.
PERIOD_US = 20_000
GROUPS = pathlib.Path("/sys/fs/cgroup/cpu")


class ProcessorGroup:
    """A control group with a quota of the processor. entering: a command that runs another one in it."""

    def __init__(self, folder: pathlib.Path) -> None:
        self._quota = folder / "cpu.cfs_quota_us"
        (folder / "cpu.cfs_period_us").write_text(str(PERIOD_US))
        self.entering = ["sh", "-c", 'echo $$ > "$0/cgroup.procs" && exec "$@"', str(folder)]

    def limit(self, cores: float | None) -> None:
        """Leaves so much of the processor to the group; None for no limit."""
        self._quota.write_text("-1" if cores is None else str(int(PERIOD_US * cores)))


@contextlib.contextmanager
def processor_group() -> Iterator[ProcessorGroup]:
    """A new control group."""
    folder = GROUPS / f"forwardpass-{uuid.uuid4().hex[:8]}"
    folder.mkdir()
    try:
        yield ProcessorGroup(folder)
    finally:
        folder.rmdir()


class Fleet:
    """Replicas with one tier, each with a quota of its own. A context manager: leaving it kills them."""

    def __init__(self, number: int, cores: float, tier: str) -> None:
        self._stack = contextlib.ExitStack()
        self._groups = [self._stack.enter_context(processor_group()) for _ in range(number)]
        self._cores = cores
        self._tier = tier
        self.servers = [self._start(index, 0) for index in range(number)]
        # Bytes that replicas had received of uploads when they ended.
        self._former: collections.Counter[str] = collections.Counter()

    def _start(self, index: int, port: int) -> ServerProcess:
        # A start takes seconds of the processor: it is not limited.
        self._groups[index].limit(None)
        server = ServerProcess(
            "--factory=turns=models:turns",
            f"--weights-folder=file://{self._tier}",
            prefix=self._groups[index].entering,
            port=port,
            environment={"TF_CPP_MIN_LOG_LEVEL": "3"},
        )
        self._groups[index].limit(self._cores)
        return server

    @property
    def addresses(self) -> list[str]:
        return [server.address for server in self.servers]

    def restart(self, index: int, *, kill: bool) -> None:
        """Ends a replica, with kill -9 or by a drain, and starts it where it was."""
        server = self.servers[index]
        self._former.update(received(server))
        if kill:
            server.process.kill()
            server.process.wait()
        else:
            assert server.terminate() == 0
        server.__exit__()
        self.servers[index] = self._start(index, server.port)

    def received(self) -> collections.Counter[str]:
        """Bytes that were received, by method."""
        return sum(map(received, self.servers), self._former.copy())

    def calls(self) -> list[int]:
        """How many calls each replica has answered."""
        return [
            int(sum(value for name, value in server.metrics().items() if is_calls(name))) for server in self.servers
        ]

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *_: Any) -> None:
        for server in self.servers:
            server.__exit__()
        self._stack.close()


def is_calls(name: str) -> bool:
    return name.startswith("forwardpass_pipeline_calls_total") or (
        name.startswith("grpc_server_started_total") and 'grpc_method="PredictOnBatch"' in name
    )


def received(server: ServerProcess) -> collections.Counter[str]:
    found: collections.Counter[str] = collections.Counter()
    for name, value in server.metrics().items():
        if name.startswith("forwardpass_received_bytes_total"):
            found[name.partition('grpc_method="')[2].partition('"')[0]] += int(value)
    return found


class Caller:
    """Calls that check their answers. wrong: how many were wrong; failed: errors; calls: how many were answered."""

    def __init__(self, model: forwardpass_client.RemoteFunctionalModel, handles: list[Any]) -> None:
        self._model = model
        self._handles = handles
        self._lock = threading.Lock()
        self._x = np.arange(WIDTH, dtype=np.float32)[None]
        self.calls = self.wrong = 0
        self.failed: list[Exception] = []

    def _note(self, index: int, predictions: Any) -> None:
        is_wrong = not np.array_equal(predictions, self._x * np.float32(1 + index % len(self._handles)))
        with self._lock:
            self.calls += 1
            self.wrong += is_wrong

    def each(self, go_on: Callable[[], bool]) -> None:
        """Calls over pipelines."""
        pairs = (
            (self._handles[index % len(self._handles)], self._x)
            for index in itertools.takewhile(lambda _: go_on(), itertools.count())
        )
        try:
            for index, predictions in enumerate(self._model.predict_each(pairs, TRAINING, timeout_s=60)):
                self._note(index, predictions)
        except Exception as error:
            self.failed.append(error)

    def unary(self, go_on: Callable[[], bool], first: int) -> None:
        """Unary calls, one after another."""
        try:
            for index in itertools.takewhile(lambda _: go_on(), itertools.count(first)):
                handle = self._handles[index % len(self._handles)]
                self._note(index, self._model.predict_on_batch(handle, self._x, TRAINING))
        except Exception as error:
            self.failed.append(error)


def rate(caller: Caller, seconds: float) -> float:
    """Calls/s over pipelines."""
    end = time.monotonic() + seconds
    started, before = time.monotonic(), caller.calls
    caller.each(lambda: time.monotonic() < end)
    return (caller.calls - before) / (time.monotonic() - started)


def connected(addresses: list[str], sets: int) -> tuple[forwardpass_client.Client, Caller]:
    """A client with a handle of each set. Weights that the tier has are not sent again."""
    client = forwardpass_client.connect(addresses)
    model = client.model("turns")
    handles = [model.put_weights(((np.float32([1 + index]),), ())) for index in range(sets)]
    return client, Caller(model, handles)


def faults(fleet: Fleet, caller: Caller, seconds: float) -> int:
    """Kills and restarts replicas under calls: how many calls were answered meanwhile."""
    stop = threading.Event()
    go_on = lambda: not stop.is_set()  # noqa: E731
    threads = [threading.Thread(target=caller.each, args=(go_on,))]
    threads += [threading.Thread(target=caller.unary, args=(go_on, 100 * index)) for index in range(4)]
    before = caller.calls
    for thread in threads:
        thread.start()
    time.sleep(seconds)
    for index in range(len(fleet.servers)):
        fleet.restart(index, kill=index == 0)
        time.sleep(seconds)
    fleet.restart(0, kill=False)
    time.sleep(seconds)
    stop.set()
    for thread in threads:
        thread.join()
    return caller.calls - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--cpu", type=float, default=0.15, help="cores of each replica")
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sets", type=int, default=1000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as tier, Fleet(options.replicas, options.cpu, tier) as fleet:
        client, all_of_them = connected(fleet.addresses, options.sets)
        uploads = fleet.received()["UploadTensors"]
        numbers = range(1, options.replicas + 1)
        clients = {number: connected(fleet.addresses[:number], options.sets) for number in numbers}
        rates = collections.defaultdict(list)
        for one in numbers:
            rate(clients[one][1], 2.0)
        for _ in range(options.rounds):
            for number in numbers:
                rates[number].append(rate(clients[number][1], options.seconds))
        print(
            f"| replicas of {options.cpu:g} core | calls/s, each round | median | to one replica |\n|---|---|---|---|"
        )
        medians = {number: float(np.median(rates[number])) for number in numbers}
        for number in numbers:
            rounds = ", ".join(f"{one:.1f}" for one in rates[number])
            print(f"| {number} | {rounds} | {medians[number]:.1f} | {medians[number] / medians[1]:.2f} |")
        print(f"\ncalls that each replica has answered: {fleet.calls()}")
        answered = faults(fleet, all_of_them, options.seconds)
        callers = [all_of_them, *(caller for _, caller in clients.values())]
        failed = [error for caller in callers for error in caller.failed]
        wrong = sum(caller.wrong for caller in callers)
        again = fleet.received()["UploadTensors"] - uploads
        print(
            f"kill -9 of one replica and restarts of all: {answered} calls answered meanwhile\n"
            f"all calls: {sum(caller.calls for caller in callers)}, {len(failed)} failed, {wrong} wrong {failed[:2]}\n"
            f"uploads of {options.sets} sets: {uploads} bytes; sent again by any client: {again} bytes"
        )
        client.close()
        for other, _ in clients.values():
            other.close()
    raise SystemExit(int(bool(failed or wrong or again)))


if __name__ == "__main__":
    main()
