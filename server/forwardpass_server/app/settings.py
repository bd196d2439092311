"""The settings of `forwardpass-server serve`. All are validated here, before a port opens."""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Mapping
from typing import Annotated

import click

from forwardpass.wire.chunks import CHUNK_BYTES
from forwardpass.wire.hosts import is_loopback
from forwardpass_server.app import logs, options
from forwardpass_server.app.options import FILE, FOLDER, FOLDER_OR_URL, MIB, Option
from forwardpass_server.catalog.repository import MODEL_NAME
from forwardpass_server.errors import SettingsError
from forwardpass_server.process import control_groups, onednn
from forwardpass_server.storage import urls
from forwardpass_server.training.preparation import ANY, PREPARED

_SESSION_STORE = re.compile(r"sqlite:///.|rediss?://.|memory://$")

_TRACE_ENDPOINT = re.compile(r"https?://[^/]+:\d+/?$")

LOOPBACK = "127.0.0.1"


def parse_factories(values: tuple[str, ...]) -> dict[str, str]:
    """Parses `NAME=MODULE:FUNCTION`. Raises SettingsError for another form, and for a repeated name."""
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
    """Parses `all` to None, `none` or "" to (), and anything else as names separated by commas."""
    if value.strip() == "all":
        return None
    return () if value.strip() in ("", "none") else tuple(name.strip() for name in value.split(","))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of `forwardpass-server serve`, each with the option that sets it."""

    # None if only factories are served.
    model_repository: Annotated[
        pathlib.Path | str | None,
        Option(
            "--model-repository",
            "Folder of models: NAME/VERSION/ for each version. Or a URL (file:///FOLDER, s3://BUCKET/PREFIX, "
            "gs://BUCKET/PREFIX), to which `forwardpass-server upload` has written them.",
            metavar="FOLDER|URL",
            type=FOLDER_OR_URL,
            begins="Models",
        ),
    ] = None
    # None for the folder of temporary files: the copies are removed at the end, and after a kill by the next server.
    repository_cache: Annotated[
        pathlib.Path | None,
        Option(
            "--repository-cache",
            "Folder for local copies of the versions that are served, for a --model-repository with a URL.",
            otherwise="the folder of temporary files",
            type=FOLDER,
        ),
    ] = None
    # Off by default: the server runs the models that it finds, so a file that somebody adds by accident would be run.
    # Replicas also would not change at the same moment.
    repository_poll_s: Annotated[
        float,
        Option(
            "--repository-poll",
            "Seconds between checks for added, changed and removed versions; 0 means never.",
            least=0,
        ),
    ] = 0.0
    # "module:function" by the name of the model.
    factories: Annotated[
        Mapping[str, str],
        Option(
            "--factory",
            "Serve the FunctionalModel that a Python function returns, as version 1 of NAME. MODULE may be in the "
            "working directory. May be repeated.",
            is_repeated=True,
            metavar="NAME=MODULE:FUNCTION",
            variable="FORWARDPASS_FACTORIES",
            parse=parse_factories,
        ),
    ] = dataclasses.field(default_factory=dict)
    # Only the operator chooses which code runs; a model file or a request never does.
    imports: Annotated[
        tuple[str, ...],
        Option(
            "--import",
            "Import a module that registers custom Keras objects, before any model loads. MODULE may be a file in the "
            "working directory. May be repeated.",
            is_repeated=True,
            metavar="MODULE",
            variable="FORWARDPASS_IMPORTS",
        ),
    ] = ()
    # A server that lacks a model fails some calls. With all models required, a rollout stops at the first such server.
    required_models: Annotated[
        tuple[str, ...] | None,
        Option(
            "--required-models",
            "Models that must be callable before the server is ready: NAME or NAME/VERSION, separated by commas. all: "
            "every model found at the start, and at least one. none: no model, so that a server with an empty "
            "repository is ready.",
            otherwise="all",
            metavar="NAMES",
            type=click.STRING,
            parse=parse_required_models,
        ),
    ] = None
    # With "refuse", a version stays loaded as long as clients open sessions of it, against the operator's request.
    unload_with_sessions: Annotated[
        str,
        Option(
            "--unload-with-sessions",
            "What happens to the metric sessions of an unloaded version. keep: this server keeps the model in memory "
            "until they end. refuse: the version cannot be unloaded while it has sessions on any server that shares "
            "the session store.",
            choices=("keep", "refuse"),
        ),
    ] = "keep"

    # Loopback, because everybody who reaches the port may run the models.
    host: Annotated[
        str,
        Option(
            "--host",
            "Address to listen on. Any other than loopback requires TLS or tokens, or --insecure.",
            begins="Listening",
        ),
    ] = LOOPBACK
    # The port of TensorFlow Serving for gRPC.
    port: Annotated[
        int,
        Option("--port", "Port for gRPC; 0 selects a free one and prints it.", least=0, most=65535),
    ] = 8500
    # The default port of OpenTelemetry's Prometheus exporter; None for no metrics.
    metrics_port: Annotated[
        int | None,
        Option(
            "--metrics-port",
            "Port for Prometheus; 0 selects a free one, -1 means none.",
            least=0,
            most=65535,
            none=-1,
        ),
    ] = 9464
    # Metrics reveal the names of models and the traffic, but no data of calls. Another address therefore must be chosen
    # explicitly, but does not require `insecure`.
    metrics_host: Annotated[
        str,
        Option(
            "--metrics-host",
            "Address for Prometheus. Everybody who reaches it can read the metrics, which hold no data of calls.",
        ),
    ] = LOOPBACK
    # None for no management: the port opens only on request.
    management_port: Annotated[
        int | None,
        Option(
            "--management-port",
            "Port for loading and unloading models; 0 selects a free one, -1 means none.",
            least=0,
            most=65535,
            none=-1,
        ),
    ] = None
    # Loopback, because without tokens everybody who reaches the port may unload models.
    management_host: Annotated[
        str,
        Option("--management-host", "Address for management. With --tokens, calls need a token with the role manage."),
    ] = LOOPBACK
    # Longer than the pauses of an active client. A new connection costs milliseconds.
    connection_idle_s: Annotated[
        float,
        Option("--connection-idle", "Seconds without a call after which the server closes a connection.", least=0),
    ] = 600.0

    # None for no TLS.
    tls_certificate: Annotated[
        pathlib.Path | None,
        Option(
            "--tls-certificate",
            "The server's certificate and its intermediate certificates, in PEM. Reloaded when the file changes.",
            type=FILE,
            begins="Security",
        ),
    ] = None
    # Required with the certificate.
    tls_key: Annotated[
        pathlib.Path | None,
        Option("--tls-key", "The private key of the certificate, in PEM, unencrypted.", type=FILE),
    ] = None
    # None for clients without certificates; otherwise every client must have one.
    tls_client_ca: Annotated[
        pathlib.Path | None,
        Option(
            "--tls-client-ca",
            "Accept only clients whose certificate one of these authorities has signed, in PEM (mutual TLS). The name "
            "of the certificate is the caller's principal.",
            type=FILE,
        ),
    ] = None
    # See access.tokens; None for calls without tokens.
    tokens: Annotated[
        pathlib.Path | None,
        Option(
            "--tokens",
            "Accept only calls with a token of this file: see `forwardpass-server token`. Reloaded when it changes.",
            type=FILE,
        ),
    ] = None
    # Empty: with credentials configured, every service requires them unless it is named here.
    open_services: Annotated[
        tuple[str, ...],
        Option(
            "--open",
            "Answer calls of this service without credentials. May be repeated.",
            choices=("health", "reflection"),
            is_repeated=True,
        ),
    ] = ()
    # An explicit flag, so that nobody opens an unprotected port by accident.
    insecure: Annotated[
        bool,
        Option("--insecure", "Allow other addresses than loopback without TLS or tokens."),
    ] = False

    # A GPU is nearly always faster than the CPU.
    device: Annotated[
        str,
        Option(
            "--device",
            "auto, cpu, gpu, or a certain GPU such as gpu:1. auto selects the first GPU, else the CPU.",
            begins="Computing",
        ),
    ] = "auto"
    # Longer than the queue of a busy GPU, short enough to detect a failed device soon.
    device_timeout_s: Annotated[
        float,
        Option(
            "--device-timeout",
            "Seconds that a small operation may take before the device counts as dead and health answers NOT_SERVING.",
            least=1,
        ),
    ] = 30.0
    # Off by default, because TensorFlow 2.21 with oneDNN may end the process (TensorFlow issue 117700). The price:
    # oneDNN makes a small MLP 1.3 to 1.7 times as fast, and other models faster or slower (docs/benchmarks.md).
    onednn: Annotated[
        str,
        Option(
            "--onednn",
            "Whether TensorFlow uses oneDNN on the CPU. auto: the value of TF_ENABLE_ONEDNN_OPTS, or off if it is not "
            "set, because TensorFlow 2.21 with oneDNN may end the process.",
            choices=onednn.CHOICES,
        ),
    ] = "auto"
    # A graph that ends the process must not be served, and only another process can detect it.
    trial: Annotated[
        bool,
        Option(
            "--trial",
            "Before a model is served, run it in a child process on batches of unusual sizes, and refuse a model that "
            "ends the child process.",
        ),
    ] = True
    # TensorFlow uses all cores for each computation: with more threads than cores, computations only wait inside
    # TensorFlow.
    execution_threads: Annotated[
        int,
        Option(
            "--execution-threads",
            "Concurrent computations outside the event loop.",
            otherwise="the number of cores that this process may use (affinity and container quota), at least 2",
            least=1,
        ),
    ] = dataclasses.field(default_factory=lambda: max(2, control_groups.cores()))
    # On, because only models with independent rows are batched, so that no result changes.
    batching: Annotated[
        bool,
        Option(
            "--batching",
            "Run concurrent calls with the same weights as one batch, for models whose rows are found to be "
            "independent.",
        ),
    ] = True
    # Large enough that the overhead of a TensorFlow call is negligible.
    max_batch_examples: Annotated[
        int,
        Option("--max-batch-examples", "Limit of examples in a batch of several calls.", least=1),
    ] = 1024

    # Any, because a client cannot know beforehand which optimizers it will need, and the load of a model would take
    # seconds for each of them. Each preparation takes a thread of low priority, and some MiB.
    training_optimizers: Annotated[
        str,
        Option(
            "--training-optimizers",
            "Optimizers that may train on this server. any: every Keras optimizer that the server supports; one that "
            "the load of the model has not prepared is prepared at its first use. prepared: only those that the load "
            "has prepared, so that no request makes the server trace a graph.",
            choices=(ANY, PREPARED),
        ),
    ] = ANY

    # 64 million float32 values. A message costs several times its size in memory on both sides. At least two chunks of
    # weights must fit; gRPC cannot handle messages over 2 GiB.
    max_message_bytes: Annotated[
        int,
        Option(
            "--max-message-mib",
            "Limit of a request and of a response, in MiB.",
            unit=MIB,
            least=2 * CHUNK_BYTES // MIB,
            most=2047,
            begins="Limits",
        ),
    ] = 256 * MIB
    # gRPC copies a unary request twice while it holds Python's lock. Five callers who send 240 MiB each delay others by
    # up to 3 s, with 28 MiB each by 0.38 s, with 16 MiB each by 0.08 s. --max-concurrent-mib counts a request in pieces
    # from its first piece on, and a unary request only once it is complete.
    max_unary_bytes: Annotated[
        int,
        Option(
            "--max-unary-mib",
            "Longest unary request, in MiB. A longer request must arrive in pieces over Pipeline, as the SDK sends "
            "requests of 8 MiB and more.",
            unit=MIB,
            least=8,
            most=2047,
        ),
    ] = 16 * MIB
    # gRPC decompresses messages on the thread that reads all connections: 246 KB of gzip that expand to 252 MB of empty
    # strings block every call for 16 s. The price is small, because arrays of numbers compress little.
    accept_compressed: Annotated[
        bool,
        Option(
            "--accept-compressed",
            "Accept compressed requests. Off: they are answered with UNIMPLEMENTED, because decompressing one small "
            "request may block all others.",
        ),
    ] = False
    # Each waiting call holds its message in memory: a thousand of 1 MB take 1 GB.
    max_concurrent_calls: Annotated[
        int,
        Option(
            "--max-concurrent-calls",
            "Limit of concurrent calls; further ones are refused with RESOURCE_EXHAUSTED.",
            least=1,
        ),
    ] = 1024
    # Counts requests that are being received, waiting or running, and responses that clients have not read. None
    # computes the limit from the memory of the process: a server that exceeds its memory is killed and loses all
    # weights.
    max_concurrent_bytes: Annotated[
        int | None,
        Option(
            "--max-concurrent-mib",
            "Limit of requests and responses in memory, in MiB; further requests are refused with RESOURCE_EXHAUSTED.",
            otherwise="the memory of the process or its control group, less that of weights and models",
            unit=MIB,
            least=1,
        ),
    ] = None
    # None for half of all if callers authenticate, so that no principal can take everything; else for everything.
    max_concurrent_calls_per_principal: Annotated[
        int | None,
        Option(
            "--max-concurrent-calls-per-principal",
            "Limit of concurrent calls of one principal.",
            otherwise="half of all with tokens or client certificates, else all",
            least=1,
        ),
    ] = None
    # The same rule as for calls.
    max_concurrent_bytes_per_principal: Annotated[
        int | None,
        Option(
            "--max-concurrent-mib-per-principal",
            "Limit of the requests of one principal in memory, in MiB.",
            otherwise="half of all with tokens or client certificates, else all",
            unit=MIB,
            least=1,
        ),
    ] = None

    # None for half of a GPU's memory, or a quarter of the host's, which also holds models and messages.
    weights_bytes: Annotated[
        int | None,
        Option(
            "--weights-mib",
            "Limit of the weights that clients put on the device, in MiB.",
            otherwise="half of the GPU's memory, or a quarter of the host's",
            unit=MIB,
            least=1,
            begins="Weights",
        ),
    ] = None
    # None for half of all if callers authenticate, so that no principal can take everything; else for everything.
    weights_bytes_per_principal: Annotated[
        int | None,
        Option(
            "--weights-mib-per-principal",
            "Limit of the weights of one principal, in MiB.",
            otherwise="half of all with tokens or client certificates, else all",
            unit=MIB,
            least=1,
        ),
    ] = None
    # None: weights are kept in memory only, and are lost at a restart.
    weights_folder: Annotated[
        pathlib.Path | str | None,
        Option(
            "--weights-folder",
            "Also store the weights that clients put in this folder, so that they survive a restart. Servers with the "
            "same URL instead of a path (file:///FOLDER, s3://BUCKET/PREFIX, gs://BUCKET/PREFIX) share them.",
            metavar="FOLDER|URL",
            type=FOLDER_OR_URL,
        ),
    ] = None
    # Fits on a small disk, and holds thousands of sets of a usual model.
    weights_disk_bytes: Annotated[
        int,
        Option(
            "--weights-disk-mib",
            "Limit of the weights in that folder, in MiB; beyond it the least recently used are deleted. A URL has no "
            "limit.",
            unit=MIB,
            least=1,
        ),
    ] = 64 * 1024 * MIB
    # Enough for a client to resume an upload after a broken connection, with all its retries.
    upload_expiry_s: Annotated[
        float,
        Option("--upload-expiry", "Seconds without data after which an upload is dropped.", least=0),
    ] = 60.0

    # None for a file that belongs to this port, or for memory with a free port (0): after a restart on another port no
    # client would find the sessions.
    session_store: Annotated[
        str | None,
        Option(
            "--session-store",
            "Store of metric sessions: sqlite:///PATH, redis://[:PASSWORD@]HOST:PORT/DB (rediss:// with TLS), which "
            "several servers may share, or memory://.",
            otherwise="a SQLite file for this port in the user's state folder",
            metavar="URL",
            begins="Sessions",
        ),
    ] = None
    # A client resumes an interrupted evaluation within a day, or never.
    session_expiry_s: Annotated[
        float,
        Option("--session-expiry", "Seconds without use after which a metric session is deleted.", least=1),
    ] = 24 * 3600.0
    # For one principal: one session for each client of a large federated round.
    max_sessions: Annotated[
        int,
        Option(
            "--max-sessions",
            "Limit of metric sessions of one principal; further ones are refused with RESOURCE_EXHAUSTED.",
            least=1,
        ),
    ] = 10_000
    # For one principal. A usual session takes a few KiB.
    sessions_bytes: Annotated[
        int,
        Option(
            "--sessions-mib",
            "Limit of the metric sessions of one principal, in MiB; more are refused with RESOURCE_EXHAUSTED.",
            unit=MIB,
            least=1,
        ),
    ] = 256 * MIB
    # A hundred metrics with 200 thresholds each take less than 1 MiB. Each update writes the whole state.
    max_state_bytes: Annotated[
        int,
        Option("--max-state-mib", "Limit of the metrics state of one session, in MiB.", unit=MIB, least=1),
    ] = 16 * MIB

    # Measured: with 0.5 s, clients that watch health or retry lose no call.
    drain_delay_s: Annotated[
        float,
        Option(
            "--drain-delay",
            "Seconds from SIGTERM, when health answers NOT_SERVING, until the server takes no more calls.",
            least=0,
            begins="Shutdown",
        ),
    ] = 1.0
    # Kubernetes kills a container 30 s after SIGTERM: end before that.
    drain_timeout_s: Annotated[
        float,
        Option("--drain-timeout", "Seconds that running calls may then take to end.", least=0),
    ] = 20.0

    # None for no spans: a span costs as much as a small call.
    trace_endpoint: Annotated[
        str | None,
        Option(
            "--trace-endpoint",
            "Send a span for each call to this OpenTelemetry collector, http://HOST:PORT for OTLP over gRPC.",
            otherwise="no spans",
            metavar="URL",
            begins="Observability",
        ),
    ] = None
    # At "info" the log holds events of the server and its models, but not each call.
    log_level: Annotated[
        str,
        Option("--log-level", "Lowest level that is logged to stderr.", choices=("debug", "info", "warning", "error")),
    ] = "info"
    # Text is readable for a person who starts a server by hand.
    log_format: Annotated[
        str,
        Option(
            "--log-format",
            "text: lines for a person. json: one object for each event. Neither holds data of calls.",
            choices=logs.FORMATS,
        ),
    ] = "text"

    @property
    def tells_principals_apart(self) -> bool:
        """Whether callers must authenticate, by token or certificate."""
        return self.tokens is not None or self.tls_client_ca is not None

    def share(self, of_principal: int | None, in_all: int) -> int:
        """The limit for one principal.

        of_principal: the configured limit for one principal; None for the default. in_all: the limit for all together.
        """
        if of_principal is not None:
            return of_principal
        return max(in_all // 2, 1) if self.tells_principals_apart else in_all

    def __post_init__(self) -> None:
        for problem in options.problems(self):
            raise SettingsError(problem)
        self._check_models()
        self._check_places()
        self._check_security()

    def _check_models(self) -> None:
        if self.model_repository is None and not self.factories:
            raise SettingsError("--model-repository: expected a folder; without one, give at least one --factory")
        if isinstance(self.model_repository, str):
            urls.check(self.model_repository, "--model-repository")
        elif self.model_repository is not None and not self.model_repository.is_dir():
            raise SettingsError(f"--model-repository: expected a folder, got {str(self.model_repository)!r}")
        if self.repository_cache is not None and not isinstance(self.model_repository, str):
            raise SettingsError("--repository-cache: requires --model-repository with a URL")
        if self.repository_poll_s and self.model_repository is None:
            raise SettingsError("--repository-poll: requires --model-repository")
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
        if isinstance(self.weights_folder, str):
            urls.check(self.weights_folder, "--weights-folder")
        if self.session_store is not None and not _SESSION_STORE.match(self.session_store):
            # The message does not quote the URL: it may hold a password.
            raise SettingsError("--session-store: expected sqlite:///PATH, redis://..., rediss://... or memory://")
        if self.trace_endpoint is not None and not _TRACE_ENDPOINT.match(self.trace_endpoint):
            raise SettingsError("--trace-endpoint: expected http://HOST:PORT, or https://HOST:PORT for TLS")

    def _check_security(self) -> None:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise SettingsError("--tls-certificate and --tls-key: give both or neither")
        if self.tls_client_ca is not None and self.tls_certificate is None:
            raise SettingsError("--tls-client-ca: requires --tls-certificate and --tls-key")
        if self.open_services and not self.tells_principals_apart:
            raise SettingsError("--open: requires --tokens or --tls-client-ca; without them every service is open")
        if self.insecure:
            return
        if not is_loopback(self.host) and self.tls_certificate is None and self.tokens is None:
            raise SettingsError(
                f"--host: other machines can reach {self.host}, without encryption and authentication: give "
                "--tls-certificate, --tls-key and --tokens or --tls-client-ca, or else --insecure"
            )
        is_managed = self.management_port is not None and not is_loopback(self.management_host)
        # TLS alone is not enough: everybody could unload models.
        if is_managed and not self.tells_principals_apart:
            raise SettingsError(
                f"--management-host: other machines can reach {self.management_host}, without authentication: give "
                "--tokens or --tls-client-ca, or else --insecure"
            )
