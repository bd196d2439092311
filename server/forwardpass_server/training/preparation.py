"""Finds trainers, and prepares them on a thread of low priority, once for all callers of the same trainer."""

from __future__ import annotations

import asyncio
import time
from typing import Protocol

from forwardpass.wire import errors
from forwardpass_server.calls.model import Trainer, TrainingOptions
from forwardpass_server.calls.plans import Servable
from forwardpass_server.process import background

ANY, PREPARED = "any", "prepared"
"""Which optimizers may train: any that is sound, or only those that were prepared when the model was loaded."""

# Preparations that wait. Each takes from tenths of a second to seconds.
_MAX_WAITING = 32

_RETRY_AFTER_S = 1.0

_QUOTED_CHARS = 200

_Key = tuple[bytes, TrainingOptions]
"""The content hash of a model, and the options."""


class PreparationObserver(Protocol):
    """Receives measurements of preparations."""

    def optimizer_prepared(self, is_sound: bool, seconds: float) -> None:
        """A preparation has ended. is_sound: whether the optimizer can train."""


class Preparations:
    """Finds the trainer of a model, and prepares it at its first use. Used on one event loop only.

    allowed: ANY or PREPARED.
    """

    def __init__(self, allowed: str, observer: PreparationObserver) -> None:
        self._allowed = allowed
        self._observer = observer
        self._preparing: dict[_Key, asyncio.Task[Trainer]] = {}
        self._turn = asyncio.Lock()

    async def trainer(self, servable: Servable, options: TrainingOptions) -> Trainer:
        """The trainer of a model for these options.

        Raises OptimizerNotSupported, FunctionNotAvailable for a model without gradients, and ServerOverloaded where too
        many preparations wait.
        """
        found = servable.model.trainer(options)
        if found is not None:
            return found
        key = servable.identity.content_hash, options
        preparing = self._preparing.get(key)
        if preparing is None:
            self._check_room()
            preparing = self._preparing[key] = asyncio.ensure_future(self._prepare(servable, options))
            preparing.add_done_callback(lambda done: self._forget(key, done))
        # A caller that leaves must not end the preparation for the others.
        return await asyncio.shield(preparing)

    def _check_room(self) -> None:
        if len(self._preparing) >= _MAX_WAITING:
            raise errors.ServerOverloaded(
                place="preparations of optimizers",
                expected=f"at most {_MAX_WAITING} at once",
                found="more",
                retry_after_s=_RETRY_AFTER_S,
            )

    async def _prepare(self, servable: Servable, options: TrainingOptions) -> Trainer:
        async with self._turn:
            if self._allowed == PREPARED:
                found = await background.run(lambda: servable.model.find_trainer(options), "find")
                if found is None:
                    raise _not_prepared(servable, options)
                return found
            began, is_sound = time.perf_counter(), False
            try:
                trainer = await background.run(lambda: servable.model.prepare_trainer(options), "prepare")
                is_sound = True
                return trainer
            finally:
                self._observer.optimizer_prepared(is_sound, time.perf_counter() - began)

    def _forget(self, key: _Key, done: asyncio.Task[Trainer]) -> None:
        del self._preparing[key]
        if not done.cancelled():
            # Marks the error as read. Otherwise asyncio logs it if all callers were cancelled.
            done.exception()


def _not_prepared(servable: Servable, options: TrainingOptions) -> errors.OptimizerNotSupported:
    prepared = ", ".join(servable.model.description.optimizers)
    return errors.OptimizerNotSupported(
        place="start.optimizer",
        expected=f"one of {prepared or 'none'}, because this server prepares optimizers only with their model",
        found=_quoted(options),
    )


def _quoted(options: TrainingOptions) -> str:
    text = options.optimizer
    found = text if len(text) <= _QUOTED_CHARS else text[:_QUOTED_CHARS] + "..."
    variants = [
        *(["sample weights"] if options.weighted else []),
        *(["a proximal term"] if options.proximal else []),
        *(["leaves that do not change"] if options.trainable else []),
    ]
    return f"{found} with {' and '.join(variants)}" if variants else found
