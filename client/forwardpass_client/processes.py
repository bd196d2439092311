"""Where a client may be used: in the process that made it, on one event loop, with gevent only as gRPC knows it."""

from __future__ import annotations

import asyncio
import os
import sys
from typing import Any, NoReturn

from grpc._cython import cygrpc

from forwardpass_client.deadlines import Deadline, check_timeout

_PAGE = "see docs/processes.md"


class _Process:
    """How often this process and its parents have forked on the way here: a child has another count than its parent.

    Counted by a hook, because a call of os.getpid() before each call would cost a small one 0.1 to 0.8 us.
    """

    def __init__(self) -> None:
        self.forks = 0
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._count)

    def _count(self) -> None:
        self.forks += 1


# One for the process.
process = _Process()


class Connected:
    """Base of what holds a connection: it works in one process, and each of its calls gets a deadline.

    timeout_s: of calls without a timeout of their own; None for no limit.
    """

    def __init__(self, timeout_s: float | None) -> None:
        self._timeout_s = timeout_s
        self._forks = process.forks

    def _deadline(self, timeout_s: float | None = None, *, is_renewable: bool = False) -> Deadline:
        """The deadline of a public call, which begins now. is_renewable: where the call has no timeout of its own.

        Raises RuntimeError in a forked child, and TypeError or ValueError for an invalid timeout.
        """
        if process.forks != self._forks:
            self._refuse_process()
        if timeout_s is None:
            return Deadline(self._timeout_s, is_renewable=is_renewable)
        return Deadline(check_timeout(timeout_s))

    @property
    def _is_in_forked_child(self) -> bool:
        """Whether the process that made this has forked, and this is the child."""
        return process.forks != self._forks

    def _refuse_process(self) -> NoReturn:
        raise RuntimeError(forked(type(self).__name__))

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"a {type(self).__name__} cannot be pickled or copied, because it holds a connection: call connect() in "
            f"each process, and send only arrays and the ids of weights and sessions between processes ({_PAGE})"
        )


class _AsyncioUse:
    """The process that uses grpc.aio. In its forked children gRPC hangs or crashes, even with new channels."""

    def __init__(self) -> None:
        self._forks: int | None = None

    @property
    def is_before_fork(self) -> bool:
        """Whether this process was forked from one that had used grpc.aio through this package."""
        return self._forks not in (None, process.forks)

    def note(self) -> None:
        """Notes that this process uses grpc.aio."""
        self._forks = process.forks


# One for the process, as grpc.aio's own state is.
asyncio_use = _AsyncioUse()

_SPAWN = "start the process by spawn or forkserver, or fork before the first call of an AsyncClient"


def check_fork() -> None:
    """Raises RuntimeError in a forked child in which gRPC does not work."""
    if asyncio_use.is_before_fork:
        raise RuntimeError(
            f"this process was forked from one that had used an AsyncClient, so gRPC does not work here: {_SPAWN} "
            f"({_PAGE})"
        )


def forked(name: str) -> str:
    """The message of an error in a forked child. name: of the class that was made before the fork."""
    advice = _SPAWN if asyncio_use.is_before_fork else "call connect() in the child"
    return (
        f"this {name} was made before the process forked, and its connection works only in the parent process: "
        f"{advice} ({_PAGE})"
    )


class OneLoop:
    """Remembers the event loop of gRPC's channels: on another loop they fail or wait forever."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None

    def check(self) -> None:
        """Remembers the loop of the first call. Raises RuntimeError on another loop, and where no loop runs."""
        try:
            running = asyncio.get_running_loop()
        except RuntimeError:
            raise RuntimeError(
                "an AsyncClient needs a running event loop: await its methods within asyncio.run(), or use connect() "
                f"in a program without asyncio ({_PAGE})"
            ) from None
        if self._loop is None:
            self._loop = running
        elif self._loop is not running:
            raise RuntimeError(
                "this AsyncClient belongs to another event loop: each asyncio.run() has a loop of its own, so call "
                f"connect_async() within each, or use one asyncio.run() for the whole program ({_PAGE})"
            )


def check_gevent(*, is_async: bool) -> None:
    """Raises RuntimeError where gevent has replaced Python's threads and gRPC would wait forever."""
    monkey: Any = sys.modules.get("gevent.monkey")
    if monkey is None or not monkey.is_module_patched("threading"):
        return
    if is_async:
        raise RuntimeError(
            "connect_async() does not work where gevent has patched Python's threads, because grpc.aio would wait "
            f"forever: use connect() in greenlets, or asyncio in a process without gevent ({_PAGE})"
        )
    # Private: gRPC has no public way to ask. Where a version lacks the name, nothing is refused.
    if not getattr(cygrpc, "g_gevent_activated", True):
        raise RuntimeError(
            "gevent has patched Python's threads, and gRPC is not set up for gevent: call "
            "grpc.experimental.gevent.init_gevent() "
            f"after monkey.patch_all() and before connect() ({_PAGE})"
        )
