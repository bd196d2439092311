"""Clients that count batches in metric sessions while servers are killed: what was acknowledged, what has counted."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import random
import threading
import time
from typing import Any

import numpy as np

import forwardpass_client
from forwardpass_client import BatchOutput, MetricsSession, RemoteFunctionalModel, errors
from support.servers import ServerProcess

SERVER = ("--factory", "counting=support.zoo:counting")
CLIENTS = 8

# Every so often an update has so little time that nobody knows what becomes of it, as where a server is killed.
_HASTE = 0.2
_HASTE_S = (0.0005, 0.01)

# What a caller meets that is in doubt: the same update is made again.
_DOUBTFUL = (errors.DeadlineExceeded, errors.ServerUnavailable, errors.CallCancelled, errors.SessionStoreUnavailable)

_GIVE_UP_S = 180.0


@dataclasses.dataclass
class Counts:
    """Of one session, or of all: what has counted, or should have."""

    updates: int = 0
    examples: int = 0
    labels: int = 0

    def add(self, labels: np.ndarray[Any, Any]) -> None:
        self.updates += 1
        self.examples += len(labels)
        self.labels += int(labels.sum())

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.updates + other.updates, self.examples + other.examples, self.labels + other.labels)


@dataclasses.dataclass
class Report:
    """What came of it all. doubts: updates of which a caller did not know, and which it made again."""

    kills: int
    doubts: int
    acknowledged: Counts
    applied: Counts

    def __str__(self) -> str:
        return (
            f"{self.kills} kills, {self.doubts} updates in doubt, {self.acknowledged.updates} updates of "
            f"{self.acknowledged.examples} examples acknowledged, {self.applied.updates} of {self.applied.examples} "
            "applied"
        )


class _Client:
    """Counts batches until it is told to stop: in a session of its own, and in one that all share."""

    def __init__(self, target: str, shared_id: str, seed: int) -> None:
        self._target = target
        self._shared_id = shared_id
        self._rng = random.Random(seed)
        self.own_id = ""
        self.own = Counts()
        self.shared = Counts()
        self.doubts = 0

    def run(self, stop: threading.Event) -> None:
        with forwardpass_client.connect(self._target) as client:
            model = client.model("counting")
            own, shared = model.metrics_session(), model.metrics_session(self._shared_id)
            self.own_id = own.id
            while not stop.is_set():
                if self._rng.random() < 0.3:
                    self._evaluate(model, own)
                elif self._rng.random() < 0.5:
                    self._count(model, own, self.own)
                else:
                    self._count(model, shared, self.shared)

    def _batch(self) -> tuple[Any, Any]:
        examples = self._rng.randint(1, 50)
        return np.zeros(examples, np.int32), np.full(examples, self._rng.randrange(2**30), np.int64)

    def _evaluate(self, model: RemoteFunctionalModel, session: MetricsSession) -> None:
        batches = [self._batch() for _ in range(self._rng.randint(1, 40))]
        model.evaluate(model.initial_weights, batches, session=session)
        for _, labels in batches:
            self.own.add(labels)

    def _count(self, model: RemoteFunctionalModel, session: MetricsSession, counts: Counts) -> None:
        x, labels = self._batch()
        kind = self._rng.choice(["update", "forward pass", "merge"])
        weights = model.initial_weights
        state = {"examples": len(labels), "labels": int(labels.sum()), "weights": 0.0}
        deadline = time.monotonic() + _GIVE_UP_S
        while True:
            timeout_s = self._rng.uniform(*_HASTE_S) if self._rng.random() < _HASTE else None
            try:
                if kind == "update":
                    session.update(labels, BatchOutput(), timeout_s=timeout_s)
                elif kind == "forward pass":
                    session.forward_pass(weights, (x, labels), with_predictions=False, timeout_s=timeout_s)
                else:
                    session.merge(state, timeout_s=timeout_s)
            except _DOUBTFUL:
                self.doubts += 1
                if time.monotonic() > deadline:
                    raise
            else:
                counts.add(labels)
                return


class _Server:
    """A server that comes back on its port when it is killed."""

    def __init__(self, *arguments: str) -> None:
        self._arguments = (*SERVER, *arguments)
        self._process = ServerProcess(*self._arguments)
        self.address = self._process.address

    def kill(self) -> None:
        """kill -9, and a new one in its place, which is waited for."""
        self.close()
        self._process = ServerProcess(*self._arguments, port=self._process.port)

    def close(self) -> None:
        self._process.__exit__()


def run(stores: list[str], kills: int, seconds: float, seed: int = 0) -> Report:
    """Counts by eight clients over one server for each URL of a session store, while these are killed at random.

    It ends after so many kills and so many seconds, whichever comes later. A server that is back serves for a moment
    before any is killed again: else nothing would come between two faults.
    """
    rng = random.Random(seed)
    stop = threading.Event()
    with contextlib.ExitStack() as stack:
        servers = []
        for store in stores:
            servers.append(_Server("--session-store", store))
            stack.callback(servers[-1].close)
        addresses = [server.address for server in servers]
        shared = _open_shared(addresses[0])
        clients = []
        for index in range(CLIENTS):
            # Each prefers another server, and goes to the next where that is gone.
            turned = addresses[index % len(addresses) :] + addresses[: index % len(addresses)]
            clients.append(_Client(f"ipv4:{','.join(turned)}", shared, seed * CLIENTS + index))
        pool = stack.enter_context(concurrent.futures.ThreadPoolExecutor(CLIENTS))
        stack.callback(stop.set)
        running = [pool.submit(client.run, stop) for client in clients]
        end = time.monotonic() + seconds
        done = 0
        while (done < kills or time.monotonic() < end) and not any(one.done() for one in running):
            _wait_for_updates(clients, running, 40)
            stop.wait(rng.uniform(0, 0.5))
            rng.choice(servers).kill()
            done += 1
        if not any(one.done() for one in running):
            _wait_for_updates(clients, running, 40)
        stop.set()
        for one in running:
            one.result(_GIVE_UP_S)
        acknowledged = {client.own_id: client.own for client in clients}
        acknowledged[shared] = sum((client.shared for client in clients), Counts())
        applied = _applied(addresses[-1], list(acknowledged))
        for session_id, counts in acknowledged.items():
            assert applied[session_id] == counts, (session_id, counts, applied[session_id])
        return Report(
            done,
            sum(client.doubts for client in clients),
            sum(acknowledged.values(), Counts()),
            sum(applied.values(), Counts()),
        )


def _open_shared(address: str) -> str:
    with forwardpass_client.connect(address) as client:
        return client.model("counting").metrics_session().id


def _wait_for_updates(clients: list[_Client], running: list[Any], count: int) -> None:
    """Waits until so many updates more are acknowledged, and some of each client's, unless one of them has failed."""
    before = [client.own.updates + client.shared.updates for client in clients]
    deadline = time.monotonic() + _GIVE_UP_S
    while not any(one.done() for one in running):
        assert time.monotonic() < deadline, "the clients have come to a halt"
        grown = [
            client.own.updates + client.shared.updates - then for client, then in zip(clients, before, strict=True)
        ]
        if min(grown) > 0 and sum(grown) >= count:
            return
        time.sleep(0.01)


def _applied(address: str, session_ids: list[str]) -> dict[str, Counts]:
    """What the sessions have counted, as a server tells."""
    found = {}
    with forwardpass_client.connect(address) as client:
        model = client.model("counting")
        for session_id in session_ids:
            session = model.metrics_session(session_id)
            metrics = session.result()
            found[session_id] = Counts(session.updates, int(metrics["examples"]), int(metrics["labels"]))
    return found
