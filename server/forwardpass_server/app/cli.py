"""The command `forwardpass-server`."""

from __future__ import annotations

import logging
import os
import pathlib
import tempfile
from collections.abc import Coroutine
from typing import Any

import click

from forwardpass_server.access import tokens
from forwardpass_server.access.tokens import Role
from forwardpass_server.app import logs, options
from forwardpass_server.app.settings import Settings
from forwardpass_server.catalog import upload as app_upload
from forwardpass_server.errors import (
    DeviceNotFound,
    ModelLoadError,
    SessionStoreError,
    SettingsError,
    UnsupportedLibrary,
)
from forwardpass_server.models.trial_process import TrialProcess
from forwardpass_server.process import control_groups, event_loops, import_path, onednn, quiet
from forwardpass_server.storage import urls
from forwardpass_server.weights import sweep as weight_sweep

_LOGGER = logging.getLogger(__name__)


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


@main.command(cls=options.SectionedCommand, params=options.of(Settings))
def serve(**given: Any) -> None:
    """Serve models until SIGTERM or Ctrl-C.

    Prints its addresses and, when the models are loaded, those that failed. A model that fails does not affect others.
    """
    try:
        settings = options.read(Settings, given)
        _configure_logging(settings.log_level, settings.log_format)
        _check_temporary_folder()
        _LOGGER.info(onednn.decide(settings.onednn))
        _LOGGER.info(event_loops.describe())
        trial_process = None
        if settings.trial:
            # Started first: it imports TensorFlow at the same time as this process.
            trial_process = TrialProcess(control_groups.cores())
            trial_process.start()
        # Imported late, because TensorFlow takes seconds: --help and an invalid setting do not wait for it.
        with quiet.native_stderr():
            from forwardpass_server.app import serve as app_serve
        import_path.append_working_directory()

        event_loops.run(_run(app_serve.serve(settings, _announce, trial_process)))
    except (SettingsError, DeviceNotFound, ModelLoadError, SessionStoreError, UnsupportedLibrary, OSError) as error:
        raise click.ClickException(str(error)) from None


_import_option = click.option(
    "--import",
    "imports",
    multiple=True,
    metavar="MODULE",
    envvar="FORWARDPASS_IMPORTS",
    help="Import a module that registers custom Keras objects. MODULE may be a file in the working directory. May be "
    "repeated.",
)


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
@_import_option
def export(
    source: str,
    model_repository: pathlib.Path,
    name: str,
    version: int | None,
    config: pathlib.Path | None,
    imports: tuple[str, ...],
) -> None:
    """Write a functional model into a model repository.

    SOURCE is a .keras file, with a forwardpass.json in the same folder or named by --config, or a Python function
    MODULE:FUNCTION that returns a FunctionalModel. MODULE may be a file in the working directory. A compiled .keras
    file may need no forwardpass.json.

    \b
    Example of a forwardpass.json:
        {"input_spec": {"x": {"dtype": "float32", "shape": [null, 8, 8, 1]},
                        "y": {"dtype": "int64", "shape": [null]}},
         "loss": {"class_name": "SparseCategoricalCrossentropy", "config": {"from_logits": true}},
         "metrics": ["SparseCategoricalAccuracy"]}
    """
    _configure_logging("warning")
    try:
        _check_temporary_folder()
    except SettingsError as error:
        raise click.ClickException(str(error)) from None
    try:
        with quiet.native_stderr():
            from forwardpass_server.app import export as app_export
        import_path.append_working_directory()

        folder = app_export.export(source, model_repository, name, version, config, imports)
    except (ModelLoadError, SettingsError, UnsupportedLibrary, OSError) as error:
        raise click.ClickException(str(error)) from None
    except Exception as error:  # The model's own code.
        raise click.ClickException(f"{source}: {type(error).__name__}: {error}") from error
    click.echo(f"wrote {folder}")


@main.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=pathlib.Path))
@click.option("--device", default="auto", show_default=True, help="See `serve`.")
@click.option("--onednn", "onednn_setting", type=click.Choice(onednn.CHOICES), default="auto", help="See `serve`.")
@click.option("--trial/--no-trial", default=True, help="See `serve`.")
@_import_option
def check(folder: pathlib.Path, device: str, onednn_setting: str, trial: bool, imports: tuple[str, ...]) -> None:
    """Load models as `serve` does, without serving them, and show what a client would see.

    FOLDER is the folder of a version, of a model with its versions, or a model repository. Exits with 1 if a model
    fails to load, and says what to change.
    """
    _configure_logging("warning")
    onednn.decide(onednn_setting)
    failed = False
    try:
        with quiet.native_stderr():
            from forwardpass_server.app import check as app_check
        import_path.append_working_directory()

        for entry in app_check.check(folder, device, trial, imports):
            if entry.servable is None:
                failed = True
                click.echo(f"{entry.source} fails to load: {entry.error}")
                continue
            click.echo(f"{entry.source} loads")
            for line in app_check.lines(entry.servable.model.description):
                click.echo(line)
    except (SettingsError, DeviceNotFound, ModelLoadError, UnsupportedLibrary, OSError) as error:
        raise click.ClickException(str(error)) from None
    if failed:
        raise click.exceptions.Exit(1)


@main.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=pathlib.Path))
@click.argument("url")
def upload(folder: pathlib.Path, url: str) -> None:
    """Write a version into a model repository with a URL.

    FOLDER is the folder of a version, and URL that of the version in the repository:

    \b
        forwardpass-server upload models/digits/3 s3://bucket/models/digits/3

    Servers use the version when all its files are there. A version that is there is replaced.
    """
    try:
        urls.check(url, "URL")
        store = urls.open_store(url, "URL", is_written=True)
        store.open()
        names = app_upload.upload(folder, store)
    except (ModelLoadError, SettingsError, OSError) as error:
        raise click.ClickException(str(error)) from None
    click.echo(f"wrote {len(names)} files to {url}")


@main.command("sweep-weights")
@click.argument("url")
@click.option(
    "--older-than",
    "days",
    type=click.FloatRange(min=0),
    metavar="DAYS",
    help="Also delete sets that were written longer ago.",
)
def sweep_weights(url: str, days: float | None) -> None:
    """Delete weights that nothing uses from the tier of `serve --weights-folder URL`.

    Deletes tensors that no set uses, if they were written more than a day ago. Servers may run at the same time. Run
    it regularly, for example each night.
    """
    try:
        urls.check(url, "URL")
        store = urls.open_store(url, "URL", is_written=True)
        store.open()
        swept = weight_sweep.sweep(store, None if days is None else days * 24 * 3600)
    except (SettingsError, OSError) as error:
        raise click.ClickException(str(error)) from None
    click.echo(f"deleted {swept.sets} sets and {swept.tensors} tensors, {swept.size_bytes} bytes")


@main.command()
@click.argument("principal")
@click.option(
    "--role",
    "roles",
    multiple=True,
    type=click.Choice([role.value for role in Role]),
    default=(Role.CALL.value,),
    show_default=True,
    help="A permission: call models, or manage them. May be repeated.",
)
@click.option(
    "--expires",
    default="90d",
    show_default=True,
    help="A date or time (ISO 8601, UTC), a number of days such as 30d, or never.",
)
def token(principal: str, roles: tuple[str, ...], expires: str) -> None:
    """Create a bearer token for a caller, and print it with its line for the file of `serve --tokens`.

    Nothing is stored. Give the token to the caller; the file holds only its hash.
    """
    try:
        secret, made = tokens.create(principal, map(Role, roles), tokens.parse_expiry(expires))
    except ValueError as error:
        raise click.ClickException(str(error)) from None
    click.echo(f"token: {secret}")
    click.echo(f"line:  {made.line()}")


async def _run(serving: Coroutine[Any, Any, bool]) -> None:
    if not await serving:
        # A normal exit would wait for running threads.
        logging.shutdown()
        os._exit(0)


def _announce(line: str) -> None:
    # Flushed: the reader may be a program at the other end of a pipe.
    print(line, flush=True)


def _check_temporary_folder() -> None:
    """Raises SettingsError without a folder for temporary files: TensorFlow and Keras need one."""
    try:
        tempfile.gettempdir()
    except FileNotFoundError as error:
        raise SettingsError(
            f"TensorFlow needs a writable folder for temporary files, and there is none ({error.strerror}): "
            "mount one at /tmp, or name one with TMPDIR"
        ) from None


def _configure_logging(level: str, log_format: str = "text") -> None:
    logs.configure(level, log_format)
    # Before the import of TensorFlow. Its log lines add nothing to ours.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # Overrides the environment and keras.json: models run on TensorFlow. See also `models.keras_settings`.
    os.environ["KERAS_BACKEND"] = "tensorflow"


if __name__ == "__main__":
    main()
