"""Awaitables of something that is to be closed, which are asynchronous context managers too."""

from __future__ import annotations

from collections.abc import Coroutine, Generator
from types import TracebackType
from typing import Any, Protocol, TypeVar


class _Closing(Protocol):
    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None: ...


OpenedT = TypeVar("OpenedT", bound=_Closing)


class Opening(Coroutine[Any, Any, OpenedT]):
    """What opens a session or a pipeline: `async with model.metrics_session() as session`, or `await` it.

    A coroutine, so that `asyncio.create_task` takes it.
    """

    def __init__(self, coroutine: Coroutine[Any, Any, OpenedT]) -> None:
        self._coroutine = coroutine
        self._opened: OpenedT | None = None

    def __await__(self) -> Generator[Any, Any, OpenedT]:
        return self._coroutine.__await__()

    def send(self, value: Any) -> Any:
        """See `collections.abc.Coroutine`."""
        return self._coroutine.send(value)

    def throw(self, *error: Any) -> Any:
        """See `collections.abc.Coroutine`."""
        return self._coroutine.throw(*error)

    def close(self) -> None:
        """See `collections.abc.Coroutine`."""
        self._coroutine.close()

    async def __aenter__(self) -> OpenedT:
        self._opened = await self._coroutine
        return self._opened

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._opened is not None
        await self._opened.__aexit__(kind, error, trace)
