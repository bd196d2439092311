"""Replicas behind one name that come and go as Kubernetes makes them, under callers."""

from __future__ import annotations

import concurrent.futures
import contextlib
import pathlib
import signal
import socket
from collections.abc import Sequence
from typing import Any

from support.dns_servers import DnsServer
from support.redis_servers import RedisProcess
from support.servers import ServerProcess


def free_port(hosts: Sequence[str]) -> int:
    """A port that is free at each of several addresses."""
    while True:
        with contextlib.ExitStack() as stack:
            port = stack.enter_context(socket.create_server((hosts[0], 0))).getsockname()[1]
            try:
                for host in hosts[1:]:
                    stack.enter_context(socket.create_server((host, port)))
            except OSError:
                continue
            return int(port)


class Rollout:
    """Servers over one Redis, at addresses of their own and one port, behind one name. A context manager.

    hosts: of every server that there will be. target: the name, for `connect`.
    """

    def __init__(self, folder: pathlib.Path, servers: int, *arguments: str) -> None:
        self._stack = contextlib.ExitStack()
        redis = self._stack.enter_context(RedisProcess(folder))
        self._arguments = ("--factory", "counting=support.zoo:counting", "--session-store", redis.url, *arguments)
        self.hosts = [f"127.0.0.{number}" for number in range(11, 11 + servers)]
        self._port = free_port(self.hosts)
        self._dns = self._stack.enter_context(DnsServer())
        self.target = self._dns.target(self._port)
        self._running: dict[str, ServerProcess] = {}

    def start(self, *hosts: str) -> None:
        """Starts servers one after another: each has a limited time, and at once they would share the processor."""
        for host in hosts:
            server = ServerProcess(*self._arguments, "--host", host, port=self._port)
            self._running[host] = self._stack.enter_context(server)

    def publish(self, *hosts: str) -> None:
        """What the name stands for from now on."""
        self._dns.addresses = hosts

    def begin_stop(self, host: str) -> None:
        """SIGTERM. `stop` waits for the end too."""
        self._running[host].process.send_signal(signal.SIGTERM)

    def stop(self, *hosts: str) -> list[int]:
        """SIGTERM to servers at once, as when a node is drained. Their exit codes."""
        with concurrent.futures.ThreadPoolExecutor(len(hosts)) as pool:
            return list(pool.map(lambda host: self._running[host].terminate(), hosts))

    def __enter__(self) -> Rollout:
        return self

    def __exit__(self, *_: Any) -> None:
        self._stack.close()
