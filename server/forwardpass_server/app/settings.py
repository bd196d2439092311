"""What an operator sets. Everything is checked here, before a port opens."""

from __future__ import annotations

import dataclasses
import ipaddress
import pathlib
import re
from collections.abc import Mapping
from typing import Annotated

import click

from forwardpass.wire.chunks import CHUNK_BYTES
from forwardpass_server.app import logs, options
from forwardpass_server.app.options import FILE, FOLDER, MIB, Option
from forwardpass_server.catalog.repository import MODEL_NAME
from forwardpass_server.process import control_groups, onednn

_SESSION_STORE = re.compile(r"sqlite:///.|rediss?://.|memory://$")

_TRACE_ENDPOINT = re.compile(r"https?://[^/]+:\d+/?$")

LOOPBACK = "127.0.0.1"


class SettingsError(Exception):
    """A setting that cannot be; the message names it, what was expected and what was found."""


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


def parse_required_models(value: str) -> tuple[str, ...] | None:
    """`all`, which is None; `none`, or nothing, which is (); or names with commas between them."""
    if value.strip() == "all":
        return None
    return () if value.strip() in ("", "none") else tuple(name.strip() for name in value.split(","))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of `forwardpass-server serve`, each with the option that sets it."""

    # The folder NAME/VERSION/; None where only factories are served.
    model_repository: Annotated[
        pathlib.Path | None,
        Option("--model-repository", "Folder NAME/VERSION/ of models.", begins="Models"),
    ] = None
    # What is in the repository is run: a file that somebody puts there by accident should not be, unless the operator
    # says so, and replicas would change one before another.
    repository_poll_s: Annotated[
        float,
        Option(
            "--repository-poll",
            "Seconds between looks for versions that came, changed or went; 0 means never.",
            least=0,
        ),
    ] = 0.0
    # Models that Python functions make: "module:function" by name.
    factories: Annotated[
        Mapping[str, str],
        Option(
            "--factory",
            "Serve the FunctionalModel that a Python function returns, as version 1 of NAME. May be repeated.",
            is_repeated=True,
            metavar="NAME=MODULE:FUNCTION",
            variable="FORWARDPASS_FACTORIES",
            parse=parse_factories,
        ),
    ] = dataclasses.field(default_factory=dict)
    # Code runs because an operator names it, never because a model file or a request does.
    imports: Annotated[
        tuple[str, ...],
        Option(
            "--import",
            "Import a module that registers custom Keras objects, before any model loads. May be repeated.",
            is_repeated=True,
            metavar="MODULE",
            variable="FORWARDPASS_IMPORTS",
        ),
    ] = ()
    # A server that lacks one of its models answers some of its callers with errors: a rollout should stop at the first.
    required_models: Annotated[
        tuple[str, ...] | None,
        Option(
            "--required-models",
            "Models that must be callable before the server is started and ready: NAME or NAME/VERSION, with commas "
            "between them. all: every model found at the start, and at least one. none: no model, so that an empty "
            "repository is ready too.",
            otherwise="all",
            metavar="NAMES",
            type=click.STRING,
            parse=parse_required_models,
        ),
    ] = None
    # A version that an operator takes away is not to stay for as long as callers open sessions of it.
    unload_with_sessions: Annotated[
        str,
        Option(
            "--unload-with-sessions",
            "keep: a version that is unloaded serves the metric sessions that this server has of it until they end. "
            "refuse: it is unloaded once it has none, on any server that shares the session store.",
            choices=("keep", "refuse"),
        ),
    ] = "keep"

    # Whoever reaches the port may run the models: loopback until the operator says otherwise.
    host: Annotated[
        str,
        Option(
            "--host",
            "Address to listen on. Beyond loopback it takes TLS or tokens, or --insecure.",
            begins="Listening",
        ),
    ] = LOOPBACK
    # TensorFlow Serving's port for gRPC.
    port: Annotated[
        int,
        Option("--port", "Port for gRPC; 0 takes a free one and prints it.", least=0, most=65535),
    ] = 8500
    # OpenTelemetry's port for Prometheus exporters; None for no metrics.
    metrics_port: Annotated[
        int | None,
        Option(
            "--metrics-port",
            "Port for Prometheus; 0 takes a free one, -1 means none.",
            least=0,
            most=65535,
            none=-1,
        ),
    ] = 9464
    # Metrics hold no data, but names of models and how much is called: whoever wants them elsewhere says so, which is
    # why a public one needs no `insecure` beside.
    metrics_host: Annotated[
        str,
        Option(
            "--metrics-host",
            "Address for Prometheus. Anybody who reaches it sees the metrics, which hold no data.",
        ),
    ] = LOOPBACK
    # What is not asked for is not open: None for no management.
    management_port: Annotated[
        int | None,
        Option(
            "--management-port",
            "Port for loading and unloading models; 0 takes a free one, -1 means none.",
            least=0,
            most=65535,
            none=-1,
        ),
    ] = None
    # Whoever reaches it without a token may unload models.
    management_host: Annotated[
        str,
        Option("--management-host", "Address for management. With --tokens it takes one with the role manage."),
    ] = LOOPBACK
    # Of a connection without a call: far more than the pauses of a caller who works, and a new one costs milliseconds.
    connection_idle_s: Annotated[
        float,
        Option("--connection-idle", "Seconds without a call after which a connection is closed.", least=0),
    ] = 600.0

    # None for no TLS.
    tls_certificate: Annotated[
        pathlib.Path | None,
        Option(
            "--tls-certificate",
            "The server's certificate, in PEM, with those between it and its root. Read again when it changes.",
            type=FILE,
            begins="Security",
        ),
    ] = None
    # Goes with the certificate.
    tls_key: Annotated[
        pathlib.Path | None,
        Option("--tls-key", "The certificate's key, in PEM, unencrypted.", type=FILE),
    ] = None
    # None for clients without certificates; with it, every client must have one.
    tls_client_ca: Annotated[
        pathlib.Path | None,
        Option(
            "--tls-client-ca",
            "Take only clients whose certificates these sign, in PEM (mutual TLS). Who calls is the certificate's "
            "name.",
            type=FILE,
        ),
    ] = None
    # See access.tokens; None for callers without tokens.
    tokens: Annotated[
        pathlib.Path | None,
        Option(
            "--tokens",
            "Take only calls with a token of this file: see `forwardpass-server token`. Read again when it changes.",
            type=FILE,
        ),
    ] = None
    # Nothing answers without credentials where there are any, unless it is named.
    open_services: Annotated[
        tuple[str, ...],
        Option(
            "--open",
            "Answer this service without a token. May be repeated.",
            choices=("health", "reflection"),
            is_repeated=True,
        ),
    ] = ()
    # Nobody is to listen so by accident.
    insecure: Annotated[
        bool,
        Option("--insecure", "Listen beyond loopback with neither TLS nor tokens."),
    ] = False

    # The first GPU that TensorFlow sees, else the CPU.
    device: Annotated[
        str,
        Option(
            "--device",
            "auto, cpu, gpu, or one of several as gpu:1. auto is the first GPU, else the CPU.",
            begins="Computing",
        ),
    ] = "auto"
    # Longer than what queues up on a GPU before a small operation, and not so long that a device that is gone goes
    # unnoticed.
    device_timeout_s: Annotated[
        float,
        Option(
            "--device-timeout",
            "Seconds that a small operation may take before the device counts as dead, and health says so.",
            least=1,
        ),
    ] = 30.0
    # Off unless somebody asks for it: with it TensorFlow 2.21 may end the process (TensorFlow issue 117700). It makes a
    # small MLP 1.3 to 1.7 times as fast, and other models faster or slower: see docs/benchmarks.md.
    onednn: Annotated[
        str,
        Option(
            "--onednn",
            "Whether TensorFlow uses oneDNN on the CPU. auto: as TF_ENABLE_ONEDNN_OPTS says, off without it, since "
            "TensorFlow 2.21 with oneDNN may end the process.",
            choices=onednn.CHOICES,
        ),
    ] = "auto"
    # A graph that ends the process must not be served, and only another process can find out.
    trial: Annotated[
        bool,
        Option(
            "--trial",
            "Run each model in a child process before it is served, on batches of unusual sizes, and refuse a model "
            "that ends the child process.",
        ),
    ] = True
    # TensorFlow spreads each computation over all cores by itself: more than there are cores only makes them wait
    # inside TensorFlow.
    execution_threads: Annotated[
        int,
        Option(
            "--execution-threads",
            "Computations at once beside the event loop.",
            otherwise="the cores that this process may use, by its affinity and the quota of its container, at least 2",
            least=1,
        ),
    ] = dataclasses.field(default_factory=lambda: max(2, control_groups.cores()))
    # Only where a model shows that it can be: nobody's results change by it.
    batching: Annotated[
        bool,
        Option(
            "--batching",
            "Run concurrent calls with the same weights as one batch, where a model shows that its rows are "
            "independent.",
        ),
    ] = True
    # Enough that the cost of a call of TensorFlow is nothing beside its work.
    max_batch_examples: Annotated[
        int,
        Option("--max-batch-examples", "Examples in a batch made of several calls.", least=1),
    ] = 1024

    # 64 million float32 in one message. Larger ones cost memory on both sides several times over. Chunks of weights
    # have to fit, and gRPC cannot take longer messages than an int32 counts.
    max_message_bytes: Annotated[
        int,
        Option(
            "--max-message-mib",
            "Longest request and response, in MiB.",
            unit=MIB,
            least=2 * CHUNK_BYTES // MIB,
            most=2047,
            begins="Limits",
        ),
    ] = 256 * MIB
    # gRPC copies a unary request twice while it holds Python's lock. Five callers who send 240 MiB each delay others by
    # up to 3 s, with 28 MiB each by 0.38 s, with 16 MiB each by 0.08 s. --max-concurrent-mib counts a request in pieces
    # from its first piece on, and a unary request only once it is whole.
    max_unary_bytes: Annotated[
        int,
        Option(
            "--max-unary-mib",
            "Longest unary request, in MiB. A longer request has to arrive in pieces over Pipeline; the SDK sends each "
            "request of 8 MiB and more so.",
            unit=MIB,
            least=8,
            most=2047,
        ),
    ] = 16 * MIB
    # gRPC inflates a message on the thread that reads all connections: 246 KB of gzip that hold 252 MB of empty strings
    # stop every caller for 16 s. Arrays of numbers compress little, so callers lose little.
    accept_compressed: Annotated[
        bool,
        Option(
            "--accept-compressed",
            "Take requests that gRPC has compressed. Off: they are answered with UNIMPLEMENTED, since a short one may "
            "hold up every caller while it is inflated.",
        ),
    ] = False
    # A call that waits holds its message: a thousand of a megabyte each are a gigabyte.
    max_concurrent_calls: Annotated[
        int,
        Option(
            "--max-concurrent-calls",
            "Calls at once; further ones are refused with RESOURCE_EXHAUSTED.",
            least=1,
        ),
    ] = 1024
    # Of requests that arrive in pieces, wait or run, and of responses that are not read yet. None for what the memory
    # of the process holds: a server that takes more is killed, with everything that callers have put on it.
    max_concurrent_bytes: Annotated[
        int | None,
        Option(
            "--max-concurrent-mib",
            "MiB of requests and responses at once; further requests are refused with RESOURCE_EXHAUSTED.",
            otherwise="what the memory of the process or its control group holds beside weights and models",
            unit=MIB,
            least=1,
        ),
    ] = None
    # None for half where principals are told apart, so that none can take all, and for everything where they are not.
    max_concurrent_calls_per_principal: Annotated[
        int | None,
        Option(
            "--max-concurrent-calls-per-principal",
            "Calls at once of one principal.",
            otherwise="half of all, where there are tokens or client certificates",
            least=1,
        ),
    ] = None
    # Likewise.
    max_concurrent_bytes_per_principal: Annotated[
        int | None,
        Option(
            "--max-concurrent-mib-per-principal",
            "MiB of requests at once of one principal.",
            otherwise="likewise",
            unit=MIB,
            least=1,
        ),
    ] = None

    # None for a share of the device's memory: half of a GPU's, a quarter of the host's, which holds models and messages
    # too.
    weights_bytes: Annotated[
        int | None,
        Option(
            "--weights-mib",
            "MiB of weights that callers put on the device.",
            otherwise="half of a GPU's memory, a quarter of the host's",
            unit=MIB,
            least=1,
            begins="Weights",
        ),
    ] = None
    # None for half where principals are told apart, so that none can take all, and for everything where they are not.
    weights_bytes_per_principal: Annotated[
        int | None,
        Option(
            "--weights-mib-per-principal",
            "MiB of weights of one principal.",
            otherwise="half of all, where there are tokens or client certificates",
            unit=MIB,
            least=1,
        ),
    ] = None
    # Where weights are kept beyond the process and the device's memory; None for nowhere.
    weights_folder: Annotated[
        pathlib.Path | None,
        Option(
            "--weights-folder",
            "Keep the weights that callers put in this folder too, so that they outlive a restart.",
            type=FOLDER,
        ),
    ] = None
    # A small disk, and thousands of sets of a usual model.
    weights_disk_bytes: Annotated[
        int,
        Option(
            "--weights-disk-mib",
            "MiB of weights in that folder; beyond, those used least recently are deleted.",
            unit=MIB,
            least=1,
        ),
    ] = 64 * 1024 * MIB
    # Time for a client to come back to an upload whose connection broke, with all its retries.
    upload_expiry_s: Annotated[
        float,
        Option("--upload-expiry", "Seconds after which an upload of which nothing comes is dropped.", least=0),
    ] = 60.0

    # None for a file of this port's; on a free port, by which no client finds the server again, for memory.
    session_store: Annotated[
        str | None,
        Option(
            "--session-store",
            "Where metric sessions are kept: sqlite:///PATH, redis://[:PASSWORD@]HOST:PORT/DB (rediss:// with TLS), "
            "which servers may share, or memory://.",
            otherwise="a SQLite file for this port in the user's state folder",
            metavar="URL",
            begins="Sessions",
        ),
    ] = None
    # A client that is in the middle of an evaluation comes back within a day, or not at all.
    session_expiry_s: Annotated[
        float,
        Option("--session-expiry", "Seconds without a use after which a metric session is dropped.", least=1),
    ] = 24 * 3600.0
    # Of one principal: one for each of the clients of a large round.
    max_sessions: Annotated[
        int,
        Option(
            "--max-sessions",
            "Metric sessions at once; further ones are refused with RESOURCE_EXHAUSTED.",
            least=1,
        ),
    ] = 10_000
    # Of one principal, where a session takes a few KiB.
    sessions_bytes: Annotated[
        int,
        Option(
            "--sessions-mib",
            "MiB of metric sessions at once; more are refused with RESOURCE_EXHAUSTED.",
            unit=MIB,
            least=1,
        ),
    ] = 256 * MIB
    # A hundred metrics with 200 thresholds each take less than one; each update writes all of it.
    max_state_bytes: Annotated[
        int,
        Option("--max-state-mib", "MiB of the metrics state of one session.", unit=MIB, least=1),
    ] = 16 * MIB

    # Measured: clients that watch health or retry lose no call where the server waits half a second before it stops.
    drain_delay_s: Annotated[
        float,
        Option(
            "--drain-delay",
            "Seconds between health's NOT_SERVING and the end of listening, after SIGTERM.",
            least=0,
            begins="Ending",
        ),
    ] = 1.0
    # Kubernetes kills 30 s after SIGTERM: be done before.
    drain_timeout_s: Annotated[
        float,
        Option("--drain-timeout", "Seconds for running calls to end, after that.", least=0),
    ] = 20.0

    # None for no spans: each costs as much as a small call.
    trace_endpoint: Annotated[
        str | None,
        Option(
            "--trace-endpoint",
            "Send a span for each call to this collector of OpenTelemetry, http://HOST:PORT for OTLP over gRPC.",
            otherwise="none are made",
            metavar="URL",
            begins="Seeing",
        ),
    ] = None
    # What happens to the server and its models, not to each call.
    log_level: Annotated[
        str,
        Option("--log-level", "What is logged to stderr.", choices=("debug", "info", "warning", "error")),
    ] = "info"
    # Whoever starts a server by hand reads it.
    log_format: Annotated[
        str,
        Option(
            "--log-format",
            "Lines for a person, or a JSON object for each event. Neither holds what callers send.",
            choices=logs.FORMATS,
        ),
    ] = "text"

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
        for complaint in options.complaints(self):
            raise SettingsError(complaint)
        self._check_models()
        self._check_places()
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

        for required in self.required_models or ():
            name, _, version = required.partition("/")
            if not MODEL_NAME.fullmatch(name) or (version and not version.isdecimal()) or required.endswith("/"):
                raise SettingsError(f"--required-models: expected NAME or NAME/VERSION, got {required!r}")

    def _check_places(self) -> None:
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
