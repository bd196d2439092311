"""The admission limits of a server, which follow its settings and the memory that its models take."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable

from forwardpass_server.calls.admission import Admission, Limits
from forwardpass_server.calls.memory_budget import MemoryBudget

_LOGGER = logging.getLogger(__name__)

_MIB = 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class CapacityOptions:
    """The limits that the operator set.

    max_message_bytes: of one request or response. max_calls, max_bytes: of everybody together; None for as many bytes
    as the memory of the process allows. principal_calls, principal_bytes: of one principal, computed from the limit of
    everybody.
    """

    max_message_bytes: int
    max_calls: int
    max_bytes: int | None
    principal_calls: Callable[[int], int]
    principal_bytes: Callable[[int], int]


class Capacity:
    """Limits the calls of a server through `admission`. Used on one event loop only.

    budget: of the process's memory. models_bytes: the memory that the loaded models take now.
    """

    def __init__(self, options: CapacityOptions, budget: MemoryBudget, models_bytes: Callable[[], int]) -> None:
        self._options = options
        self._budget = budget
        self._models_bytes = models_bytes
        self._is_warned = False
        self.admission = Admission(*self._limits())

    @property
    def messages_bytes(self) -> int:
        """The limit of requests and responses at once, in bytes."""
        if self._options.max_bytes is not None:
            return self._options.max_bytes
        return self._budget.messages_bytes(self._models_bytes())

    def refresh(self) -> None:
        """Computes the limits again. To be called when a model was loaded or unloaded."""
        self.admission.limit(*self._limits())

    def _limits(self) -> tuple[Limits, Limits]:
        options, size_bytes = self._options, self.messages_bytes
        if size_bytes < options.max_message_bytes and not self._is_warned:
            self._is_warned = True
            _LOGGER.warning(
                "memory of %d MiB holds %d MiB of requests and responses at once, and --max-message-mib lets one have "
                "%d MiB: lower --max-message-mib or --weights-mib, or give the process more memory",
                self._budget.memory_bytes // _MIB,
                size_bytes // _MIB,
                options.max_message_bytes // _MIB,
            )
        in_all = Limits(calls=options.max_calls, size_bytes=size_bytes)
        each = Limits(
            calls=options.principal_calls(in_all.calls), size_bytes=options.principal_bytes(in_all.size_bytes)
        )
        return in_all, each
