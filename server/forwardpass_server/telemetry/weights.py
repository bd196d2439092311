"""What is counted of the weights that callers put, on the device and on disk."""

from __future__ import annotations

from collections.abc import Callable

from forwardpass_server.telemetry.families import Families

_DISK_FAILURES = {"write": ("limit", "full", "denied", "error"), "read": ("corrupt", "denied", "error")}


class WeightMetrics:
    """Of one weight store."""

    def __init__(self, families: Families) -> None:
        self._bytes = families.gauge(
            "forwardpass_weights_bytes", "Weights that callers put, uploads under way included, on the device."
        )
        self._budget = families.gauge("forwardpass_weights_budget_bytes", "What they may take.")
        self._sets = families.gauge("forwardpass_weights_sets", "Sets of weights on the device.")
        self._tensors = families.gauge("forwardpass_weights_tensors", "Tensors that they share.")
        lookups = families.counter(
            "forwardpass_weights_lookups_total",
            "Uses of weights by their id: a hit finds them on the device.",
            ("outcome",),
        )
        self.weights_hit = lookups.labels("hit").inc
        self.weights_missed = lookups.labels("miss").inc
        self.weights_evicted = families.counter(
            "forwardpass_weights_evictions_total", "Sets dropped to make room for others."
        ).inc
        self._disk_failures = families.counter(
            "forwardpass_weights_disk_failures_total",
            "Sets that could not be kept in the folder, or read from it: each is served on from memory, or put again.",
            ("operation", "reason"),
        )
        # Prometheus sees no growth in a series that begins with it.
        for operation, reasons in _DISK_FAILURES.items():
            for reason in reasons:
                self._disk_failures.labels(operation, reason)
        self._disk_bytes = families.gauge(
            "forwardpass_weights_disk_bytes", "Tensors in the folder of weights; 0 where there is no folder."
        )
        self._disk_budget = families.gauge("forwardpass_weights_disk_budget_bytes", "What they may take.")
        self._disk_sets = families.gauge("forwardpass_weights_disk_sets", "Sets of weights in the folder.")

    def weights_disk_failed(self, operation: str, reason: str) -> None:
        """See `weights.store.StoreObserver`."""
        self._disk_failures.labels(operation, reason).inc()

    def store(
        self, used_bytes: Callable[[], int], budget_bytes: int, sets: Callable[[], int], tensors: Callable[[], int]
    ) -> None:
        """Shows what the weight store holds."""
        self._bytes.set_function(used_bytes)
        self._budget.set(budget_bytes)
        self._sets.set_function(sets)
        self._tensors.set_function(tensors)

    def files(self, used_bytes: Callable[[], int], budget_bytes: int, sets: Callable[[], int]) -> None:
        """Shows what the folder of weights holds."""
        self._disk_bytes.set_function(used_bytes)
        self._disk_budget.set(budget_bytes)
        self._disk_sets.set_function(sets)
