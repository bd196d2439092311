"""The batches of a training, which may be read several times."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator, Mapping
from typing import Any


class BatchSource:
    """Batches over some epochs. Where they can be read again, they are read from any position.

    batches: an iterable, or a function that returns one. An asynchronous iterable too, for asyncio.
    epochs: how often they are read, one time after another.

    Raises TypeError for anything else, and ValueError for an iterator that would have to be read twice.
    """

    def __init__(self, batches: Any, epochs: int, *, is_async: bool = False) -> None:
        kinds = (Iterable, AsyncIterable) if is_async else (Iterable,)
        # An object with indices only, such as a Keras PyDataset, is iterable too.
        is_iterable = isinstance(batches, kinds) or (hasattr(batches, "__getitem__") and hasattr(batches, "__len__"))
        is_iterable = is_iterable and not isinstance(batches, (str, bytes, Mapping))
        if not is_iterable and not callable(batches):
            raise TypeError(
                "batches: expected an iterable of batches, or a function that returns one, got "
                f"{type(batches).__name__}"
            )
        if isinstance(epochs, bool) or not isinstance(epochs, int):
            raise TypeError(f"epochs: expected an int, got {epochs!r}")
        if epochs < 0:
            raise ValueError(f"epochs: expected 0 or more, got {epochs}")
        self.is_repeatable = not isinstance(batches, (Iterator, AsyncIterator))
        if epochs > 1 and not self.is_repeatable:
            raise ValueError(
                f"batches: expected what can be read {epochs} times, got an iterator, which can be read once: pass a "
                "sequence, a dataset, or a function that returns an iterator"
            )
        self._open: Callable[[], Any] = (lambda: batches) if is_iterable else batches
        self._epochs = epochs
        # The number of batches in one epoch, once it is known.
        self._length: int | None = None

    def read(self, skipped: int = 0) -> Iterator[Any]:
        """The batches of all epochs, without the first ones."""
        for _ in range(self._epochs):
            if self._length is not None and skipped >= self._length:
                skipped -= self._length
                continue
            count = 0
            for batch in self._open():
                count += 1
                if skipped:
                    skipped -= 1
                else:
                    yield batch
            self._length = count

    async def read_async(self, skipped: int = 0) -> AsyncIterator[Any]:
        """`read` for asyncio."""
        for _ in range(self._epochs):
            if self._length is not None and skipped >= self._length:
                skipped -= self._length
                continue
            count = 0
            async for batch in each(self._open()):
                count += 1
                if skipped:
                    skipped -= 1
                else:
                    yield batch
            self._length = count


async def each(items: Iterable[Any] | AsyncIterable[Any]) -> AsyncIterator[Any]:
    """The items of an iterable, asynchronous or not."""
    if isinstance(items, AsyncIterable):
        async for item in items:
            yield item
    else:
        for item in items:
            yield item


def split(batch: Any) -> tuple[Any, Any]:
    """(x, y) and the sample weights of a batch; None without sample weights.

    batch: (x, y), (x, y, sample_weight), or a mapping with these keys.
    """
    if isinstance(batch, Mapping) and "sample_weight" in batch:
        return {name: value for name, value in batch.items() if name != "sample_weight"}, batch["sample_weight"]
    if isinstance(batch, (tuple, list)) and len(batch) == 3:
        return tuple(batch[:2]), batch[2]
    return batch, None
