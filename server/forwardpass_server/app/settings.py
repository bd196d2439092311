"""What an operator sets. Everything is checked here, before a port opens."""

from __future__ import annotations

import dataclasses
import ipaddress
import os
import pathlib
import re
from collections.abc import Mapping

from forwardpass.wire.chunks import CHUNK_BYTES
from forwardpass_server.serving.repository import MODEL_NAME

_SESSION_STORE = re.compile(r"sqlite:///.|rediss?://.|memory://$")

_TRACE_ENDPOINT = re.compile(r"https?://[^/]+:\d+/?$")

LOOPBACK = "127.0.0.1"


class SettingsError(Exception):
    """A setting that cannot be; the message names it, what was expected and what was found."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of `forwardpass-server serve`."""

    # The folder NAME/VERSION/; None where only factories are served.
    model_repository: pathlib.Path | None = None
    # Seconds between looks at the repository for what changed; 0 for never. What is in it is run: a file that somebody
    # puts there by accident should not be, unless the operator says so, and replicas would change one before another.
    repository_poll_s: float = 0.0
    # Models that Python functions make: "module:function" by name.
    factories: Mapping[str, str] = dataclasses.field(default_factory=dict)
    # Whoever reaches the port may run the models: loopback until the operator says otherwise.
    host: str = LOOPBACK
    # TensorFlow Serving's port for gRPC.
    port: int = 8500
    # OpenTelemetry's port for Prometheus exporters; None for no metrics.
    metrics_port: int | None = 9464
    # Metrics hold no data, but names of models and how much is called: whoever wants them elsewhere says so, which is
    # why a public one needs no `insecure` beside.
    metrics_host: str = LOOPBACK
    # Where spans of calls go, by OTLP over gRPC; None for nowhere: each costs as much as a small call.
    trace_endpoint: str | None = None
    # What is not asked for is not open: None for no management.
    management_port: int | None = None
    # Whoever reaches it without a token may unload models.
    management_host: str = LOOPBACK
    # In PEM; None for no TLS.
    tls_certificate: pathlib.Path | None = None
    tls_key: pathlib.Path | None = None
    # Who signs clients' certificates; every client must have one then.
    tls_client_ca: pathlib.Path | None = None
    # See serving.tokens; None for callers without tokens.
    tokens: pathlib.Path | None = None
    # Services that answer without credentials: "health", "reflection".
    open_services: tuple[str, ...] = ()
    # Listen beyond loopback with neither TLS nor tokens.
    insecure: bool = False
    # The first GPU that TensorFlow sees, else the CPU.
    device: str = "auto"
    # How long a small operation on the device may take before the server says that it is not alive. Longer than what
    # queues up on a GPU before it, and not so long that a device that is gone goes unnoticed.
    device_timeout_s: float = 30.0
    # 64 million float32 in one message. Larger ones cost memory on both sides several times over.
    max_message_bytes: int = 256 * 2**20
    # Computations beside the event loop. TensorFlow spreads each over all cores by itself: more than there are cores
    # only makes them wait inside TensorFlow.
    execution_threads: int = dataclasses.field(default_factory=lambda: max(2, os.cpu_count() or 1))
    # A call that waits holds its message: a thousand of a megabyte each are a gigabyte.
    max_concurrent_calls: int = 1024
    # Of requests that arrive in pieces, wait or run: four of the longest.
    max_concurrent_bytes: int = 2**30
    # The share of one principal in calls, bytes and weights; None for half where principals are told apart, so that
    # none can take all, and for everything where they are not.
    max_concurrent_calls_per_principal: int | None = None
    max_concurrent_bytes_per_principal: int | None = None
    weights_bytes_per_principal: int | None = None
    # Of a connection without a call: far more than the pauses of a caller who works, and a new one costs milliseconds.
    connection_idle_s: float = 600.0
    # Whether concurrent calls with the same weights are run as one batch, where a model shows that it can be.
    batching: bool = True
    # Of a batch made of several calls: enough that the cost of a call of TensorFlow is nothing beside its work.
    max_batch_examples: int = 1024
    # Of weights that callers put, on the device; None for a share of its memory: half of a GPU's, a quarter of the
    # host's, which holds models and messages too.
    weights_bytes: int | None = None
    # Where weights are kept beyond the process and the device's memory; None for nowhere.
    weights_folder: pathlib.Path | None = None
    # Of weights in that folder.
    weights_disk_bytes: int = 64 * 2**30
    # Time for a client to come back to an upload whose connection broke, with all its retries.
    upload_expiry_s: float = 60.0
    # Where metric sessions are kept: sqlite:///PATH, redis://..., rediss://... or memory://. None for a file of this
    # port's in the user's state folder; on a free port, by which no client finds the server again, for memory.
    session_store: str | None = None
    # A client that is in the middle of an evaluation comes back within a day, or not at all.
    session_expiry_s: float = 24 * 3600.0
    # Of one principal: one for each of the clients of a large round.
    max_sessions: int = 10_000
    # Of one principal, where a session takes a few KiB.
    sessions_bytes: int = 256 * 2**20
    # A hundred metrics with 200 thresholds each take less than one; each update writes all of it.
    max_state_bytes: int = 16 * 2**20
    # Measured: clients that watch health or retry lose no call where the server waits half a second before it stops.
    drain_delay_s: float = 1.0
    # Kubernetes kills 30 s after SIGTERM: be done before.
    drain_timeout_s: float = 20.0

    @property
    def tells_principals_apart(self) -> bool:
        """Whether callers have to say who they are."""
        return self.tokens is not None or self.tls_client_ca is not None

    def share(self, of_principal: int | None, in_all: int) -> int:
        """What one principal may take of what there is in all."""
        if of_principal is not None:
            return of_principal
        return max(in_all // 2, 1) if self.tells_principals_apart else in_all

    def __post_init__(self) -> None:
        self._check_models()
        self._check_numbers()
        self._check_security()

    def _check_models(self) -> None:
        if self.model_repository is None and not self.factories:
            raise SettingsError("--model-repository: expected a folder, or a --factory beside")
        if self.model_repository is not None and not self.model_repository.is_dir():
            raise SettingsError(f"--model-repository: expected a folder, got {str(self.model_repository)!r}")
        if self.repository_poll_s and self.model_repository is None:
            raise SettingsError("--repository-poll: expected a --model-repository beside")
        for name, factory in self.factories.items():
            if not MODEL_NAME.fullmatch(name):
                raise SettingsError(f"--factory: expected a model name like {MODEL_NAME.pattern}, got {name!r}")
            if not all(factory.partition(":")):
                raise SettingsError(f"--factory: expected NAME=MODULE:FUNCTION, got {name}={factory}")

    def _check_numbers(self) -> None:
        for flag, port in (
            ("--port", self.port),
            ("--metrics-port", self.metrics_port),
            ("--management-port", self.management_port),
        ):
            if port is not None and not 0 <= port <= 65535:
                raise SettingsError(f"{flag}: expected 0 to 65535, got {port}")
        # Chunks of weights have to fit, and gRPC cannot take longer messages than an int32 counts.
        if not 2 * CHUNK_BYTES <= self.max_message_bytes < 2**31:
            raise SettingsError(
                f"--max-message-mib: expected {2 * CHUNK_BYTES // 2**20} to 2047, "
                f"got {self.max_message_bytes / 2**20:g}"
            )
        for flag, number in (
            ("--execution-threads", self.execution_threads),
            ("--max-concurrent-calls", self.max_concurrent_calls),
            ("--max-concurrent-mib", self.max_concurrent_bytes),
            ("--max-batch-examples", self.max_batch_examples),
            ("--weights-mib", self.weights_bytes),
            ("--weights-disk-mib", self.weights_disk_bytes),
            ("--max-sessions", self.max_sessions),
            ("--sessions-mib", self.sessions_bytes),
            ("--max-state-mib", self.max_state_bytes),
            ("--max-concurrent-calls-per-principal", self.max_concurrent_calls_per_principal),
            ("--max-concurrent-mib-per-principal", self.max_concurrent_bytes_per_principal),
            ("--weights-mib-per-principal", self.weights_bytes_per_principal),
        ):
            if number is not None and number < 1:
                raise SettingsError(f"{flag}: expected at least 1, got {number}")
        for flag, seconds in (
            ("--repository-poll", self.repository_poll_s),
            ("--drain-delay", self.drain_delay_s),
            ("--drain-timeout", self.drain_timeout_s),
            ("--upload-expiry", self.upload_expiry_s),
            ("--connection-idle", self.connection_idle_s),
        ):
            if not 0 <= seconds < float("inf"):
                raise SettingsError(f"{flag}: expected seconds >= 0, got {seconds:g}")
        if not 1 <= self.device_timeout_s < float("inf"):
            raise SettingsError(f"--device-timeout: expected seconds >= 1, got {self.device_timeout_s:g}")
        if not 1 <= self.session_expiry_s < float("inf"):
            raise SettingsError(f"--session-expiry: expected seconds >= 1, got {self.session_expiry_s:g}")
        if self.session_store is not None and not _SESSION_STORE.match(self.session_store):
            # What was given may hold a password.
            raise SettingsError("--session-store: expected sqlite:///PATH, redis://..., rediss://... or memory://")
        if self.trace_endpoint is not None and not _TRACE_ENDPOINT.match(self.trace_endpoint):
            raise SettingsError("--trace-endpoint: expected http://HOST:PORT, or https://HOST:PORT for TLS")

    def _check_security(self) -> None:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise SettingsError("--tls-certificate: expected --tls-key beside, and the other way round")
        if self.tls_client_ca is not None and self.tls_certificate is None:
            raise SettingsError("--tls-client-ca: expected --tls-certificate and --tls-key beside")
        if self.open_services and not self.tells_principals_apart:
            raise SettingsError("--open: expected --tokens or --tls-client-ca beside: everything is open without")
        if self.insecure:
            return
        if not is_loopback(self.host) and self.tls_certificate is None and self.tokens is None:
            raise SettingsError(
                f"--host: {self.host} can be reached from elsewhere, by anybody and unencrypted: give "
                "--tls-certificate, --tls-key and --tokens or --tls-client-ca, or else --insecure"
            )
        is_managed = self.management_port is not None and not is_loopback(self.management_host)
        # It is little to be encrypted where anybody may unload models.
        if is_managed and not self.tells_principals_apart:
            raise SettingsError(
                f"--management-host: {self.management_host} can be reached from elsewhere, by anybody: give "
                "--tokens or --tls-client-ca, or else --insecure"
            )


def is_loopback(host: str) -> bool:
    """Whether an address to listen on can be reached from this machine alone, as far as its name tells."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def parse_factories(values: tuple[str, ...]) -> dict[str, str]:
    """`NAME=MODULE:FUNCTION`, each. Raises SettingsError for another form and for a name given twice."""
    factories: dict[str, str] = {}
    for value in values:
        name, separator, factory = value.partition("=")
        if not separator:
            raise SettingsError(f"--factory: expected NAME=MODULE:FUNCTION, got {value!r}")
        if name in factories:
            raise SettingsError(f"--factory: {name} is given twice")
        factories[name] = factory
    return factories
