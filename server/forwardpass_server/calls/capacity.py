"""How much may be done at once, as the settings say or as the memory allows."""

from __future__ import annotations

import logging

from forwardpass_server.app.settings import Settings
from forwardpass_server.calls import memory_budget
from forwardpass_server.calls.admission import Admission, Limits
from forwardpass_server.calls.memory_budget import MemoryBudget
from forwardpass_server.catalog.registry import Registry

_LOGGER = logging.getLogger(__name__)

_MIB = 2**20


class Capacity:
    """The limits of a server's calls. Without --max-concurrent-mib they follow the models that are loaded.

    `admission`: what refuses calls beyond them. Used on one event loop.
    """

    def __init__(self, settings: Settings, budget: MemoryBudget, registry: Registry) -> None:
        self._settings = settings
        self._budget = budget
        self._registry = registry
        self._is_warned = False
        self.admission = Admission(*self._limits())

    @property
    def messages_bytes(self) -> int:
        """Bytes of requests and responses that may be there at once."""
        if self._settings.max_concurrent_bytes is not None:
            return self._settings.max_concurrent_bytes
        servables = [entry.servable for entry in self._registry.entries() if entry.servable is not None]
        models_bytes = sum(memory_budget.model_bytes(one.model.initial_weights) for one in servables)
        return self._budget.messages_bytes(models_bytes)

    def refresh(self) -> None:
        """To be called when a model was loaded or unloaded."""
        self.admission.limit(*self._limits())

    def _limits(self) -> tuple[Limits, Limits]:
        settings, size_bytes = self._settings, self.messages_bytes
        if size_bytes < settings.max_message_bytes and not self._is_warned:
            self._is_warned = True
            _LOGGER.warning(
                "memory of %d MiB holds %d MiB of requests and responses at once, and --max-message-mib lets one have "
                "%d MiB: lower --max-message-mib or --weights-mib, or give the process more memory",
                self._budget.memory_bytes // _MIB,
                size_bytes // _MIB,
                settings.max_message_bytes // _MIB,
            )
        in_all = Limits(calls=settings.max_concurrent_calls, size_bytes=size_bytes)
        each = Limits(
            calls=settings.share(settings.max_concurrent_calls_per_principal, in_all.calls),
            size_bytes=settings.share(settings.max_concurrent_bytes_per_principal, in_all.size_bytes),
        )
        return in_all, each
