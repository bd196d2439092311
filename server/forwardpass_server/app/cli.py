"""The command `forwardpass-server`."""

from __future__ import annotations

import asyncio
import logging
import os
import pathlib
from collections.abc import Coroutine
from typing import Any

import click

from forwardpass_server.app import logs, quiet
from forwardpass_server.app import settings as app_settings
from forwardpass_server.app.settings import Settings, SettingsError
from forwardpass_server.serving import tokens
from forwardpass_server.serving.errors import DeviceNotFound, ModelLoadError, SessionStoreError
from forwardpass_server.serving.tokens import Role


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="forwardpass")
def main() -> None:
    """Run functional models: models whose forward pass takes its weights as an argument.

    \b
    A model repository is a folder of models, each with a folder for each version:
        models/digits/1/    a SavedModel by tff.learning.models.save_functional_model,
        models/digits/2/    one by `forwardpass-server export`,
        models/mnist/1/     or a .keras file with a forwardpass.json beside it.
    Serve it with
        forwardpass-server serve --model-repository models
    """


@main.command()
@click.option(
    "--model-repository",
    type=click.Path(path_type=pathlib.Path),
    envvar="FORWARDPASS_MODEL_REPOSITORY",
    show_envvar=True,
    help="Folder NAME/VERSION/ of models.",
)
@click.option(
    "--repository-poll",
    default=Settings.repository_poll_s,
    show_default=True,
    envvar="FORWARDPASS_REPOSITORY_POLL",
    show_envvar=True,
    help="Seconds between looks for versions that came, changed or went; 0 means never.",
)
@click.option(
    "--factory",
    "factories",
    multiple=True,
    metavar="NAME=MODULE:FUNCTION",
    envvar="FORWARDPASS_FACTORIES",
    show_envvar=True,
    help="Serve the FunctionalModel that a Python function returns, as version 1 of NAME. May be repeated.",
)
@click.option(
    "--host",
    default=Settings.host,
    show_default=True,
    envvar="FORWARDPASS_HOST",
    show_envvar=True,
    help="Address to listen on. Beyond loopback it takes TLS or tokens, or --insecure.",
)
@click.option(
    "--port",
    default=Settings.port,
    show_default=True,
    envvar="FORWARDPASS_PORT",
    show_envvar=True,
    help="Port for gRPC; 0 takes a free one and prints it.",
)
@click.option(
    "--metrics-port",
    default=Settings.metrics_port,
    show_default=True,
    envvar="FORWARDPASS_METRICS_PORT",
    show_envvar=True,
    help="Port for Prometheus; 0 takes a free one, -1 means none.",
)
@click.option(
    "--metrics-host",
    default=Settings.metrics_host,
    show_default=True,
    envvar="FORWARDPASS_METRICS_HOST",
    show_envvar=True,
    help="Address for Prometheus. Anybody who reaches it sees the metrics, which hold no data.",
)
@click.option(
    "--management-port",
    default=-1,
    show_default=True,
    envvar="FORWARDPASS_MANAGEMENT_PORT",
    show_envvar=True,
    help="Port for loading and unloading models; 0 takes a free one, -1 means none.",
)
@click.option(
    "--management-host",
    default=Settings.management_host,
    show_default=True,
    envvar="FORWARDPASS_MANAGEMENT_HOST",
    show_envvar=True,
    help="Address for management. With --tokens it takes one with the role manage.",
)
@click.option(
    "--tls-certificate",
    type=click.Path(dir_okay=False, path_type=pathlib.Path),
    envvar="FORWARDPASS_TLS_CERTIFICATE",
    show_envvar=True,
    help="The server's certificate, in PEM, with those between it and its root. Read again when it changes.",
)
@click.option(
    "--tls-key",
    type=click.Path(dir_okay=False, path_type=pathlib.Path),
    envvar="FORWARDPASS_TLS_KEY",
    show_envvar=True,
    help="The certificate's key, in PEM, unencrypted.",
)
@click.option(
    "--tls-client-ca",
    type=click.Path(dir_okay=False, path_type=pathlib.Path),
    envvar="FORWARDPASS_TLS_CLIENT_CA",
    show_envvar=True,
    help="Take only clients whose certificates these sign, in PEM (mutual TLS). Who calls is the certificate's name.",
)
@click.option(
    "--tokens",
    "tokens_file",
    type=click.Path(dir_okay=False, path_type=pathlib.Path),
    envvar="FORWARDPASS_TOKENS",
    show_envvar=True,
    help="Take only calls with a token of this file: see `forwardpass-server token`. Read again when it changes.",
)
@click.option(
    "--open",
    "open_services",
    multiple=True,
    type=click.Choice(["health", "reflection"]),
    envvar="FORWARDPASS_OPEN",
    show_envvar=True,
    help="Answer this service without a token. May be repeated.",
)
@click.option(
    "--insecure",
    is_flag=True,
    envvar="FORWARDPASS_INSECURE",
    show_envvar=True,
    help="Listen beyond loopback with neither TLS nor tokens.",
)
@click.option(
    "--connection-idle",
    default=Settings.connection_idle_s,
    show_default=True,
    envvar="FORWARDPASS_CONNECTION_IDLE",
    show_envvar=True,
    help="Seconds without a call after which a connection is closed.",
)
@click.option(
    "--device",
    default=Settings.device,
    show_default=True,
    envvar="FORWARDPASS_DEVICE",
    show_envvar=True,
    help="auto, cpu, gpu, or one of several as gpu:1. auto is the first GPU, else the CPU.",
)
@click.option(
    "--device-timeout",
    default=Settings.device_timeout_s,
    show_default=True,
    envvar="FORWARDPASS_DEVICE_TIMEOUT",
    show_envvar=True,
    help="Seconds that a small operation may take before the device counts as dead, and health says so.",
)
@click.option(
    "--max-message-mib",
    default=Settings.max_message_bytes // 2**20,
    show_default=True,
    envvar="FORWARDPASS_MAX_MESSAGE_MIB",
    show_envvar=True,
    help="Longest request and response, in MiB.",
)
@click.option(
    "--execution-threads",
    type=int,
    envvar="FORWARDPASS_EXECUTION_THREADS",
    show_envvar=True,
    help="Computations at once beside the event loop.  [default: the number of cores, at least 2]",
)
@click.option(
    "--max-concurrent-calls",
    default=Settings.max_concurrent_calls,
    show_default=True,
    envvar="FORWARDPASS_MAX_CONCURRENT_CALLS",
    show_envvar=True,
    help="Calls at once; further ones are refused with RESOURCE_EXHAUSTED.",
)
@click.option(
    "--max-concurrent-mib",
    default=Settings.max_concurrent_bytes // 2**20,
    show_default=True,
    envvar="FORWARDPASS_MAX_CONCURRENT_MIB",
    show_envvar=True,
    help="MiB of requests at once; further ones are refused with RESOURCE_EXHAUSTED.",
)
@click.option(
    "--max-concurrent-calls-per-principal",
    type=int,
    envvar="FORWARDPASS_MAX_CONCURRENT_CALLS_PER_PRINCIPAL",
    show_envvar=True,
    help="Calls at once of one principal.  [default: half of all, where there are tokens or client certificates]",
)
@click.option(
    "--max-concurrent-mib-per-principal",
    type=int,
    envvar="FORWARDPASS_MAX_CONCURRENT_MIB_PER_PRINCIPAL",
    show_envvar=True,
    help="MiB of requests at once of one principal.  [default: likewise]",
)
@click.option(
    "--batching/--no-batching",
    default=Settings.batching,
    show_default=True,
    envvar="FORWARDPASS_BATCHING",
    show_envvar=True,
    help="Run concurrent calls with the same weights as one batch, where a model shows that its rows are independent.",
)
@click.option(
    "--max-batch-examples",
    default=Settings.max_batch_examples,
    show_default=True,
    envvar="FORWARDPASS_MAX_BATCH_EXAMPLES",
    show_envvar=True,
    help="Examples in a batch made of several calls.",
)
@click.option(
    "--weights-mib",
    type=int,
    envvar="FORWARDPASS_WEIGHTS_MIB",
    show_envvar=True,
    help="MiB of weights that callers put on the device.  [default: half of a GPU's memory, a quarter of the host's]",
)
@click.option(
    "--weights-mib-per-principal",
    type=int,
    envvar="FORWARDPASS_WEIGHTS_MIB_PER_PRINCIPAL",
    show_envvar=True,
    help="MiB of weights of one principal.  [default: half of all, where there are tokens or client certificates]",
)
@click.option(
    "--weights-folder",
    type=click.Path(file_okay=False, path_type=pathlib.Path),
    envvar="FORWARDPASS_WEIGHTS_FOLDER",
    show_envvar=True,
    help="Keep the weights that callers put in this folder too, so that they outlive a restart.",
)
@click.option(
    "--weights-disk-mib",
    default=Settings.weights_disk_bytes // 2**20,
    show_default=True,
    envvar="FORWARDPASS_WEIGHTS_DISK_MIB",
    show_envvar=True,
    help="MiB of weights in that folder; beyond, those used least recently are deleted.",
)
@click.option(
    "--upload-expiry",
    default=Settings.upload_expiry_s,
    show_default=True,
    envvar="FORWARDPASS_UPLOAD_EXPIRY",
    show_envvar=True,
    help="Seconds after which an upload of which nothing comes is dropped.",
)
@click.option(
    "--session-store",
    metavar="URL",
    envvar="FORWARDPASS_SESSION_STORE",
    show_envvar=True,
    help="Where metric sessions are kept: sqlite:///PATH, redis://[:PASSWORD@]HOST:PORT/DB (rediss:// with TLS), which"
    " servers may share, or memory://.  [default: a SQLite file for this port in the user's state folder]",
)
@click.option(
    "--session-expiry",
    default=Settings.session_expiry_s,
    show_default=True,
    envvar="FORWARDPASS_SESSION_EXPIRY",
    show_envvar=True,
    help="Seconds without a use after which a metric session is dropped.",
)
@click.option(
    "--max-sessions",
    default=Settings.max_sessions,
    show_default=True,
    envvar="FORWARDPASS_MAX_SESSIONS",
    show_envvar=True,
    help="Metric sessions at once; further ones are refused with RESOURCE_EXHAUSTED.",
)
@click.option(
    "--sessions-mib",
    default=Settings.sessions_bytes // 2**20,
    show_default=True,
    envvar="FORWARDPASS_SESSIONS_MIB",
    show_envvar=True,
    help="MiB of metric sessions at once; more are refused with RESOURCE_EXHAUSTED.",
)
@click.option(
    "--max-state-mib",
    default=Settings.max_state_bytes // 2**20,
    show_default=True,
    envvar="FORWARDPASS_MAX_STATE_MIB",
    show_envvar=True,
    help="MiB of the metrics state of one session.",
)
@click.option(
    "--drain-delay",
    default=Settings.drain_delay_s,
    show_default=True,
    envvar="FORWARDPASS_DRAIN_DELAY",
    show_envvar=True,
    help="Seconds between health's NOT_SERVING and the end of listening, after SIGTERM.",
)
@click.option(
    "--drain-timeout",
    default=Settings.drain_timeout_s,
    show_default=True,
    envvar="FORWARDPASS_DRAIN_TIMEOUT",
    show_envvar=True,
    help="Seconds for running calls to end, after that.",
)
@click.option(
    "--trace-endpoint",
    metavar="URL",
    envvar="FORWARDPASS_TRACE_ENDPOINT",
    show_envvar=True,
    help="Send a span for each call to this collector of OpenTelemetry, http://HOST:PORT for OTLP over gRPC.  [default:"
    " none are made]",
)
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="info",
    show_default=True,
    envvar="FORWARDPASS_LOG_LEVEL",
    show_envvar=True,
    help="What is logged to stderr.",
)
@click.option(
    "--log-format",
    type=click.Choice(logs.FORMATS),
    default="text",
    show_default=True,
    envvar="FORWARDPASS_LOG_FORMAT",
    show_envvar=True,
    help="Lines for a person, or a JSON object for each event. Neither holds what callers send.",
)
def serve(
    model_repository: pathlib.Path | None,
    repository_poll: float,
    factories: tuple[str, ...],
    host: str,
    port: int,
    metrics_port: int,
    metrics_host: str,
    management_port: int,
    management_host: str,
    tls_certificate: pathlib.Path | None,
    tls_key: pathlib.Path | None,
    tls_client_ca: pathlib.Path | None,
    tokens_file: pathlib.Path | None,
    open_services: tuple[str, ...],
    insecure: bool,
    connection_idle: float,
    device: str,
    device_timeout: float,
    max_message_mib: int,
    execution_threads: int | None,
    max_concurrent_calls: int,
    max_concurrent_mib: int,
    max_concurrent_calls_per_principal: int | None,
    max_concurrent_mib_per_principal: int | None,
    batching: bool,
    max_batch_examples: int,
    weights_mib: int | None,
    weights_mib_per_principal: int | None,
    weights_folder: pathlib.Path | None,
    weights_disk_mib: int,
    upload_expiry: float,
    session_store: str | None,
    session_expiry: float,
    max_sessions: int,
    sessions_mib: int,
    max_state_mib: int,
    drain_delay: float,
    drain_timeout: float,
    trace_endpoint: str | None,
    log_level: str,
    log_format: str,
) -> None:
    """Serve models until SIGTERM or Ctrl-C.

    Prints where it listens and, once the models are loaded, which of them failed; a model that fails hinders no other.
    """
    _configure_logging(log_level, log_format)
    try:
        settings = Settings(
            model_repository=model_repository,
            repository_poll_s=repository_poll,
            factories=app_settings.parse_factories(factories),
            host=host,
            port=port,
            metrics_port=None if metrics_port < 0 else metrics_port,
            metrics_host=metrics_host,
            trace_endpoint=trace_endpoint,
            management_port=None if management_port < 0 else management_port,
            management_host=management_host,
            tls_certificate=tls_certificate,
            tls_key=tls_key,
            tls_client_ca=tls_client_ca,
            tokens=tokens_file,
            open_services=open_services,
            insecure=insecure,
            connection_idle_s=connection_idle,
            device=device,
            device_timeout_s=device_timeout,
            max_message_bytes=max_message_mib * 2**20,
            **({} if execution_threads is None else {"execution_threads": execution_threads}),
            max_concurrent_calls=max_concurrent_calls,
            max_concurrent_bytes=max_concurrent_mib * 2**20,
            max_concurrent_calls_per_principal=max_concurrent_calls_per_principal,
            max_concurrent_bytes_per_principal=_bytes(max_concurrent_mib_per_principal),
            batching=batching,
            max_batch_examples=max_batch_examples,
            weights_bytes=_bytes(weights_mib),
            weights_bytes_per_principal=_bytes(weights_mib_per_principal),
            weights_folder=weights_folder,
            weights_disk_bytes=weights_disk_mib * 2**20,
            upload_expiry_s=upload_expiry,
            session_store=session_store,
            session_expiry_s=session_expiry,
            max_sessions=max_sessions,
            sessions_bytes=sessions_mib * 2**20,
            max_state_bytes=max_state_mib * 2**20,
            drain_delay_s=drain_delay,
            drain_timeout_s=drain_timeout,
        )
        # TensorFlow takes seconds to import: --help and a wrong setting need not wait for it.
        with quiet.native_stderr():
            from forwardpass_server.app import serve as app_serve

        asyncio.run(_run(app_serve.serve(settings, _announce)))
    except (SettingsError, DeviceNotFound, SessionStoreError, OSError) as error:
        raise click.ClickException(str(error)) from None


@main.command()
@click.argument("source")
@click.argument("model_repository", type=click.Path(file_okay=False, path_type=pathlib.Path))
@click.argument("name")
@click.option("--version", type=click.IntRange(min=1), help="Version to write.  [default: one above the highest]")
@click.option(
    "--config",
    type=click.Path(exists=True, dir_okay=False, path_type=pathlib.Path),
    help="For a .keras file: a forwardpass.json with input_spec, loss and metrics.",
)
def export(
    source: str, model_repository: pathlib.Path, name: str, version: int | None, config: pathlib.Path | None
) -> None:
    """Write a functional model into a model repository.

    SOURCE is a .keras file, with a forwardpass.json beside it or named by --config, or a Python function
    MODULE:FUNCTION that returns a FunctionalModel.

    \b
    Example of a forwardpass.json:
        {"input_spec": {"x": {"dtype": "float32", "shape": [null, 8, 8, 1]},
                        "y": {"dtype": "int64", "shape": [null]}},
         "loss": {"class_name": "SparseCategoricalCrossentropy", "config": {"from_logits": true}},
         "metrics": ["SparseCategoricalAccuracy"]}
    """
    _configure_logging("warning")
    with quiet.native_stderr():
        from forwardpass_server.app import export as app_export

    try:
        folder = app_export.export(source, model_repository, name, version, config)
    except (ModelLoadError, SettingsError, OSError) as error:
        raise click.ClickException(str(error)) from None
    except Exception as error:  # The model's own code.
        raise click.ClickException(f"{source}: {type(error).__name__}: {error}") from error
    click.echo(f"wrote {folder}")


@main.command()
@click.argument("principal")
@click.option(
    "--role",
    "roles",
    multiple=True,
    type=click.Choice([role.value for role in Role]),
    default=(Role.CALL.value,),
    show_default=True,
    help="What it is good for: calling models, or managing them. May be repeated.",
)
@click.option(
    "--expires",
    default="90d",
    show_default=True,
    help="A date or time (ISO 8601, UTC), so many days such as 30d, or never.",
)
def token(principal: str, roles: tuple[str, ...], expires: str) -> None:
    """Make a bearer token for a caller, and print it with its line for the file of `serve --tokens`.

    Nothing is stored: the token is for the caller, and the file holds no more than its hash.
    """
    try:
        secret, made = tokens.create(principal, map(Role, roles), tokens.parse_expiry(expires))
    except ValueError as error:
        raise click.ClickException(str(error)) from None
    click.echo(f"token: {secret}")
    click.echo(f"line:  {made.line()}")


def _bytes(mib: int | None) -> int | None:
    return None if mib is None else mib * 2**20


async def _run(serving: Coroutine[Any, Any, bool]) -> None:
    if not await serving:
        # Python would wait for the threads that still run.
        logging.shutdown()
        os._exit(0)


def _announce(line: str) -> None:
    # Whoever started this may read it from a pipe.
    print(line, flush=True)


def _configure_logging(level: str, log_format: str = "text") -> None:
    logs.configure(level, log_format)
    # Before TensorFlow is imported. Its own lines say nothing that ours do not.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("KERAS_BACKEND", "tensorflow")


if __name__ == "__main__":
    main()
