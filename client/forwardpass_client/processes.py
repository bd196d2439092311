"""Where a client may be used: the process and the event loop that made it, and what gevent needs."""

from __future__ import annotations

import asyncio
import sys
from typing import Any, NoReturn

from grpc._cython import cygrpc

_PAGE = "see docs/processes.md"


class OfOneProcess:
    """Base of what holds a connection: it cannot be copied or pickled, and the error says so."""

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"a {type(self).__name__} cannot be pickled or copied, because it holds a connection: call connect() in "
            f"each process, and send numbers and ids of weights and sessions between them ({_PAGE})"
        )


class OneLoop:
    """Remembers the event loop of gRPC's channels: used on another loop, they fail or wait forever."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None

    def check(self) -> None:
        """Remembers the loop of the first call. Raises RuntimeError on another loop, and where no loop runs."""
        try:
            running = asyncio.get_running_loop()
        except RuntimeError:
            raise RuntimeError(
                "an AsyncClient needs a running event loop: await its methods within asyncio.run(), or use connect() "
                f"where there is no asyncio ({_PAGE})"
            ) from None
        if self._loop is None:
            self._loop = running
        elif self._loop is not running:
            raise RuntimeError(
                "this AsyncClient belongs to another event loop: each asyncio.run() has a loop of its own, so call "
                f"connect_async() within each, or put all the work into one ({_PAGE})"
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
            "gevent has patched Python's threads, and gRPC does not know: call grpc.experimental.gevent.init_gevent() "
            f"after monkey.patch_all() and before connect() ({_PAGE})"
        )
