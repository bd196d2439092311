"""Callers of two servers that share their sessions, and what they notice while the servers are restarted."""

from __future__ import annotations

import collections
import contextlib
import pathlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

import forwardpass_client
from forwardpass_client import RemoteFunctionalModel
from support import zoo
from support.redis_servers import RedisProcess
from support.servers import ServerProcess, wait_until

CALLERS = 16
EXAMPLES = 3
_BATCHES = 20


class Replicas:
    """Two servers over one Redis, on ports that they keep. A context manager: leaving it kills them."""

    def __init__(self, folder: pathlib.Path, *arguments: str) -> None:
        self._stack = contextlib.ExitStack()
        redis = self._stack.enter_context(RedisProcess(folder))
        self._arguments = ("--factory", "counting=support.zoo:counting", "--session-store", redis.url, *arguments)
        self.servers = [ServerProcess(*self._arguments) for _ in range(2)]

    @property
    def addresses(self) -> list[str]:
        return [server.address for server in self.servers]

    def stop(self, index: int) -> int:
        """SIGTERM, and the exit code."""
        return self.servers[index].terminate()

    def kill(self, index: int) -> None:
        """kill -9."""
        self.servers[index].process.kill()
        self.servers[index].process.wait()

    def start(self, index: int) -> None:
        """Starts a server that has ended, where it was."""
        former = self.servers[index]
        former.__exit__()
        self.servers[index] = ServerProcess(*self._arguments, port=former.port)

    def __enter__(self) -> Replicas:
        return self

    def __exit__(self, *_: Any) -> None:
        for server in self.servers:
            server.__exit__()
        self._stack.close()


class Callers:
    """Sixteen threads of one client, as `connect` makes it, that call without a pause in every way there is.

    seconds: what each call took, by kind. failed: their errors. updates: (acknowledged, counted), once they have ended.
    options: of `connect`.
    """

    def __init__(self, target: str | list[str], **options: Any) -> None:
        self._client = forwardpass_client.connect(target, **options)
        self._model: RemoteFunctionalModel = self._client.model("counting")
        self._weights = self._model.initial_weights
        self._handle = self._model.put_weights(self._weights)
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self.seconds: collections.defaultdict[str, list[float]] = collections.defaultdict(list)
        self.failed: list[Exception] = []
        self.updates: list[tuple[int, int]] = []
        kinds = (self._by_value, self._by_id, self._pipelined, self._evaluating, self._updating)
        self._threads = [
            threading.Thread(target=self._run, args=(kinds[index % len(kinds)],), daemon=True)
            for index in range(CALLERS)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def completed(self) -> int:
        with self._lock:
            return sum(map(len, self.seconds.values()))

    def take_seconds(self) -> dict[str, list[float]]:
        """What calls took since this was last asked, by kind."""
        with self._lock:
            taken, self.seconds = self.seconds, collections.defaultdict(list)
        return taken

    def go_on(self, calls: int) -> None:
        """Waits until so many more calls have ended, or one has failed."""
        before = self.completed
        wait_until(lambda: bool(self.failed) or self.completed >= before + calls, 120)

    def end(self) -> None:
        """Waits for the calls that run."""
        self._stop.set()
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive()
        self._client.close()

    def _run(self, kind: Callable[[], None]) -> None:
        try:
            kind()
        except Exception as error:
            self.failed.append(error)

    @contextlib.contextmanager
    def _timed(self, kind: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        with self._lock:
            self.seconds[kind].append(time.perf_counter() - started)

    def _by_value(self) -> None:
        self._predicting("by value", self._weights)

    def _by_id(self) -> None:
        self._predicting("by id", self._handle)

    def _predicting(self, kind: str, weights: Any) -> None:
        x, _ = zoo.counting_batch(1, EXAMPLES)
        while not self._stop.is_set():
            with self._timed(kind):
                assert np.array_equal(self._model.predict_on_batch(weights, x), x)

    def _pipelined(self) -> None:
        x, _ = zoo.counting_batch(1, EXAMPLES)
        with self._model.pipeline(self._handle) as pipeline:
            while not self._stop.is_set():
                with self._timed("pipelined"):
                    assert np.array_equal(pipeline.predict_on_batch(x).result(60), x)

    def _evaluating(self) -> None:
        batches = [zoo.counting_batch(number, EXAMPLES) for number in range(_BATCHES)]
        while not self._stop.is_set():
            with self._timed("evaluation"):
                metrics = self._model.evaluate(self._handle, batches)
            assert metrics["examples"] == _BATCHES * EXAMPLES

    def _updating(self) -> None:
        batch = zoo.counting_batch(1, EXAMPLES)
        with self._model.metrics_session() as session:
            acknowledged = 0
            while not self._stop.is_set():
                with self._timed("session"):
                    session.forward_pass(self._handle, batch)
                acknowledged += 1
            self.updates.append((acknowledged, int(session.result()["examples"]) // EXAMPLES))
