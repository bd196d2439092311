"""Metrics of the weights that clients put, on the device and on disk."""

from __future__ import annotations

from collections.abc import Callable

from forwardpass_server.telemetry.families import Families

_DISK_FAILURES = {"write": ("limit", "full", "denied", "error"), "read": ("corrupt", "denied", "error")}
_TIER_OPERATIONS = ("read", "write", "delete", "follow")
_TIER_REASONS = ("unreachable", "denied", "full", "error")


class WeightMetrics:
    """The metrics of one weight store."""

    def __init__(self, families: Families) -> None:
        self._bytes = families.gauge(
            "forwardpass_weights_bytes", "Bytes of weights on the device, including unfinished uploads."
        )
        self._budget = families.gauge("forwardpass_weights_budget_bytes", "Limit of these bytes (--weights-mib).")
        self._sets = families.gauge("forwardpass_weights_sets", "Sets of weights on the device.")
        self._stacks_bytes = families.gauge(
            "forwardpass_weights_stacks_bytes",
            "Bytes of copies of weights that serve several sets at once, in the room that the weights leave.",
        )
        self._tensors = families.gauge("forwardpass_weights_tensors", "Different tensors of these sets.")
        lookups = families.counter(
            "forwardpass_weights_lookups_total",
            'Uses of weights by id, by outcome: "hit" if they are on the device, else "miss".',
            ("outcome",),
        )
        self.weights_hit = lookups.labels("hit").inc
        self.weights_missed = lookups.labels("miss").inc
        self.weights_evicted = families.counter(
            "forwardpass_weights_evictions_total", "Sets evicted from the device to make room for others."
        ).inc
        self._disk_failures = families.counter(
            "forwardpass_weights_disk_failures_total",
            "Sets that could not be written to the folder or read from it. They stay in memory, or must be put again.",
            ("operation", "reason"),
        )
        # Create the series at 0: Prometheus cannot see the growth of a series that appears with its first count.
        for operation, reasons in _DISK_FAILURES.items():
            for reason in reasons:
                self._disk_failures.labels(operation, reason)
        self._disk_bytes = families.gauge(
            "forwardpass_weights_disk_bytes", "Bytes of tensors in the folder of weights; 0 without a folder."
        )
        self._disk_budget = families.gauge(
            "forwardpass_weights_disk_budget_bytes", "Limit of these bytes (--weights-disk-mib)."
        )
        self._disk_sets = families.gauge("forwardpass_weights_disk_sets", "Sets of weights in the folder.")
        self._tier_seconds = families.histogram(
            "forwardpass_weights_tier_seconds",
            "Time to read a set from the tier that servers share, or to write it (--weights-folder URL).",
            ("operation",),
        )
        self._tier_bytes = families.counter(
            "forwardpass_weights_tier_bytes_total",
            "Bytes of tensors read from the tier or written to it.",
            ("operation",),
        )
        for operation in ("read", "write"):
            self._tier_seconds.labels(operation)
            self._tier_bytes.labels(operation)
        self._tier_failures = families.counter(
            "forwardpass_weights_tier_failures_total",
            "Failed operations on the tier. While it does not answer, others fail without being counted.",
            ("operation", "reason"),
        )
        for operation in _TIER_OPERATIONS:
            for reason in _TIER_REASONS:
                self._tier_failures.labels(operation, reason)
        self._tier_failures.labels("read", "corrupt")

    def weights_tier_read(self, size_bytes: int, seconds: float) -> None:
        """See `weights.tier.TierObserver`."""
        self._tier_bytes.labels("read").inc(size_bytes)
        self._tier_seconds.labels("read").observe(seconds)

    def weights_tier_written(self, size_bytes: int, seconds: float) -> None:
        """See `weights.tier.TierObserver`."""
        self._tier_bytes.labels("write").inc(size_bytes)
        self._tier_seconds.labels("write").observe(seconds)

    def weights_tier_failed(self, operation: str, reason: str) -> None:
        """See `weights.tier.TierObserver`."""
        self._tier_failures.labels(operation, reason).inc()

    def weights_disk_failed(self, operation: str, reason: str) -> None:
        """See `weights.store.StoreObserver`."""
        self._disk_failures.labels(operation, reason).inc()

    def store(
        self,
        used_bytes: Callable[[], int],
        budget_bytes: int,
        sets: Callable[[], int],
        tensors: Callable[[], int],
        stacks_bytes: Callable[[], int],
    ) -> None:
        """Reports the size of the weight store."""
        self._bytes.set_function(used_bytes)
        self._budget.set(budget_bytes)
        self._sets.set_function(sets)
        self._tensors.set_function(tensors)
        self._stacks_bytes.set_function(stacks_bytes)

    def files(self, used_bytes: Callable[[], int], budget_bytes: int, sets: Callable[[], int]) -> None:
        """Reports the size of the folder of weights."""
        self._disk_bytes.set_function(used_bytes)
        self._disk_budget.set(budget_bytes)
        self._disk_sets.set_function(sets)
