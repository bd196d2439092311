"""The subcommands of `forwardpass`."""

from __future__ import annotations

import contextlib
import pathlib
import re
import shlex
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Column, Table
from rich.text import Text

import forwardpass_client
from forwardpass.wire import description, errors, trees
from forwardpass.wire.dtypes import Array
from forwardpass.wire.specs import StructureSpec, TensorSpec
from forwardpass_client.backoff import RETRYABLE
from forwardpass_client.calls import ModelVersion
from forwardpass_client.cli import npz
from forwardpass_client.cli.evaluation import Evaluation
from forwardpass_client.cli.hosts import Host, host_argument
from forwardpass_client.cli.named_models import NamedModel, model_argument
from forwardpass_client.cli.slices import Slices
from forwardpass_client.combinations import Integers
from forwardpass_client.metrics_sessions import MetricsSession
from forwardpass_client.model import RemoteFunctionalModel
from forwardpass_client.weights_handles import WeightsHandle

_OUT = Console()
_ERR = Console(stderr=True)

_weights_option = click.option(
    "--weights",
    metavar="FILE|ID",
    help="An .npz file as `forwardpass weights` writes it, or the id that `forwardpass put-weights` printed."
    "  [default: the weights that the model was saved with]",
)
_data_option = click.option(
    "--data",
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=pathlib.Path),
    help="An .npz file: x, and y to evaluate; for structures one array each, such as x/dense.",
)
_batch_size_option = click.option("--batch-size", default=256, show_default=True, type=click.IntRange(min=1))


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="forwardpass")
def forwardpass() -> None:
    """Call functional models on a forwardpass server. HOST is host:port, e.g. localhost:8500.

    Pass a token by the environment variable FORWARDPASS_TOKEN rather than by --token: other users of a machine can
    read its command lines.
    """


@forwardpass.command()
@host_argument
def models(host: Host) -> None:
    """List the models of a server, with those that failed to load."""
    with _client(host) as client:
        found = client.models()
    names = (Column(title, no_wrap=True) for title in ("model", "version", "state", "content"))
    told = (Column(title, overflow="fold") for title in ("labels", "error"))
    table = Table(*names, *told, box=None, header_style="bold")
    for model in found:
        colour = {"available": "green", "failed": "red"}.get(model.state, "yellow")
        table.add_row(
            model.name,
            str(model.version),
            f"[{colour}]{model.state}[/]",
            model.content_hash[:12],
            ", ".join(model.labels),
            Text(model.error),
        )
    _OUT.print(table)


@forwardpass.command()
@host_argument
@click.option("--service", default="", help="A service, such as model/digits.  [default: the server as a whole]")
@click.option("--timeout", default=3.0, show_default=True, type=click.FloatRange(min=0, min_open=True), help="Seconds.")
def health(host: Host, service: str, timeout: float) -> None:
    """Ask whether a server is serving: exits with 0 if it says SERVING, with 1 otherwise.

    For probes: it starts in a third of a second and asks once. If the server is not ready, it prints the reasons.
    """
    reasons: list[str] = []
    with _client(host) as client:
        is_serving = client.is_serving(service, timeout_s=timeout)
        if not is_serving:
            # Best effort: an older server gives no reasons, and some callers may only ask for health.
            with contextlib.suppress(errors.ForwardPassError):
                reasons = client.unready_reasons(timeout_s=timeout)
    click.echo("SERVING" if is_serving else "NOT_SERVING")
    for reason in reasons:
        click.echo(reason, err=True)
    if not is_serving:
        raise click.exceptions.Exit(1)


@forwardpass.command()
@host_argument
@model_argument
def describe(host: Host, model: NamedModel) -> None:
    """Show what a model takes and returns, and which functions it has."""
    with _model(host, model) as remote:
        described = remote.description
    facts = Table(box=None, show_header=False)
    facts.add_column(style="bold")
    facts.add_column(overflow="fold")
    for name, value in (
        ("model", str(described.identity)),
        ("content", remote.content_hash),
        ("versions", ", ".join(map(_version, remote.versions))),
        *description.facts(described),
    ):
        facts.add_row(name, Text(value))
    _OUT.print(facts)
    functions = Table("function", "", box=None, header_style="bold")
    for title, value in description.function_facts(described.spec):
        functions.add_row(title, Text(value, "green" if value == "yes" else "yellow"))
    _OUT.print(functions)


def _version(found: ModelVersion) -> str:
    return f"{found.version} {found.state}" + (f" ({', '.join(found.labels)})" if found.labels else "")


@forwardpass.command()
@host_argument
@model_argument
@click.option("--output", "-o", required=True, type=click.Path(dir_okay=False, path_type=pathlib.Path))
@click.option("--id", "weights_id", help="The id of the weights.  [default: the weights that the model was saved with]")
def weights(host: Host, model: NamedModel, output: pathlib.Path, weights_id: str | None) -> None:
    """Write weights of a model into an .npz file: trainable/0, non_trainable/0 and so on."""
    with _model(host, model) as remote:
        if weights_id is None:
            found = remote.initial_weights
        else:
            with _transfer("fetching") as progress:
                found = remote.get_weights(remote.weights_handle(weights_id), progress=progress)
        _save_weights(output, found)


def _save_weights(path: pathlib.Path, found: tuple[Any, Any]) -> None:
    arrays: dict[str, Any] = {}
    for name, part in zip(("trainable", "non_trainable"), found, strict=True):
        npz.put(arrays, name, part)
    npz.save(path, arrays)
    _ERR.print(f"wrote {len(arrays)} arrays to {path}")


@forwardpass.command("put-weights")
@host_argument
@model_argument
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=pathlib.Path))
@click.option("--lease", type=click.FloatRange(min=0), help="Keep the weights on the server for this many seconds.")
def put_weights(host: Host, model: NamedModel, file: pathlib.Path, lease: float | None) -> None:
    """Put the weights of an .npz file on the server, and print their id for the other commands.

    The server keeps them until the lease ends and it needs the room.
    """
    with _model(host, model) as remote:
        handle = _put(remote, _read_weights(remote, file))
        if lease is not None:
            handle.lease(lease)
    click.echo(handle.id)


@forwardpass.command()
@host_argument
@click.argument("terms", nargs=-1, required=True, metavar="ID:COEFFICIENT...")
@click.option("--float64", is_flag=True, help="Compute the sums in float64, and round them at the end.")
@click.option(
    "--integers",
    type=click.Choice(["equal", "first"]),
    default="equal",
    show_default=True,
    help="Whether integers, booleans and strings must be equal, or are taken from the first term.",
)
@click.option(
    "--save",
    type=click.Path(dir_okay=False, path_type=pathlib.Path),
    help="Also write the result into this .npz file, as `forwardpass weights` does.",
)
def combine(host: Host, terms: tuple[str, ...], float64: bool, integers: Integers, save: pathlib.Path | None) -> None:
    """Compute a sum of weights on the server, each multiplied by its coefficient, and print the id of the result.

    For example an average of two, with the ids that `forwardpass put-weights` printed: ID:0.5 ID:0.5.
    """
    with _client(host) as client:
        pairs = [(client.weights_handle(weights_id), number) for weights_id, number in map(_term, terms)]
        handle = client.combine(pairs, float64=float64, integers=integers)
        click.echo(handle.id)
        if save is not None:
            with _transfer("fetching") as progress:
                found = client.get_weights(handle, progress=progress)
            _save_weights(save, found)


def _term(text: str) -> tuple[str, float]:
    """The id and the coefficient of a term. Raises ValueError."""
    weights_id, colon, coefficient = text.partition(":")
    try:
        return weights_id, float(coefficient)
    except ValueError:
        found = f"{coefficient!r} as the coefficient" if colon else repr(text)
        raise ValueError(f"expected ID:COEFFICIENT such as {'0' * 8}...:0.5, got {found}") from None


@forwardpass.command("delete-weights")
@host_argument
@model_argument
@click.argument("weights_id", metavar="ID")
def delete_weights(host: Host, model: NamedModel, weights_id: str) -> None:
    """Drop weights on the server."""
    with _model(host, model) as remote:
        remote.weights_handle(weights_id).delete()


@forwardpass.command()
@host_argument
@model_argument
@_data_option
@click.option(
    "--output",
    "-o",
    required=True,
    type=click.Path(dir_okay=False, path_type=pathlib.Path),
    help="The .npz file to write: predictions, or predictions/0 and so on. A result for a whole batch, such as a "
    "scalar, has one entry for each batch.",
)
@_weights_option
@_batch_size_option
def predict(
    host: Host, model: NamedModel, data: pathlib.Path, output: pathlib.Path, weights: str | None, batch_size: int
) -> None:
    """Predict for the examples in an .npz file (in inference mode) and write the predictions into another."""
    with _model(host, model) as remote:
        model_weights = _weights(remote, weights)
        x = npz.take(npz.load(data), "x", remote.description.spec.x)
        slices, predictions = Slices(x, batch_size), []
        counts = [slices.examples_in(index + 1) - slices.examples_in(index) for index in range(len(slices))]
        with _bar("predicting", slices.examples) as show:
            for index in range(len(slices)):
                predictions.append(remote.predict_on_batch(model_weights, slices[index], training=False))
                show(slices.examples_in(index + 1))
        arrays: dict[str, Any] = {}
        npz.put(arrays, "predictions", _joined(predictions, remote.description.spec.predictions, counts))
        npz.save(output, arrays)
    _ERR.print(f"wrote {', '.join(arrays)} to {output}")


@forwardpass.command()
@host_argument
@model_argument
@_data_option
@click.option(
    "--weights",
    "named_weights",
    multiple=True,
    metavar="FILE|ID",
    help="As for `predict`. May be repeated: each batch is sent once, and each set of weights has a row of metrics.",
)
@_batch_size_option
@click.option(
    "--session",
    "session_ids",
    multiple=True,
    metavar="ID",
    help="Resume an interrupted evaluation: one session for each --weights. Ctrl-C prints the whole command.",
)
@click.pass_context
def evaluate(
    context: click.Context,
    host: Host,
    model: NamedModel,
    data: pathlib.Path,
    named_weights: tuple[str, ...],
    batch_size: int,
    session_ids: tuple[str, ...],
) -> None:
    """Evaluate a model on the examples in an .npz file (in inference mode) and show its metrics.

    The server runs the batches and counts them; sample_weight in the file is for the metrics. After Ctrl-C the server
    keeps what has counted, and the command that resumes the evaluation is printed.
    """
    with _model(host, model) as remote:
        slices = Slices(_examples(remote, npz.load(data)), batch_size)
        handles = [_weights(remote, one) for one in named_weights or (None,)]
        if session_ids and len(session_ids) != len(handles):
            raise click.UsageError(
                f"--session: expected {len(handles)}, one for each --weights, got {len(session_ids)}"
            )
        sessions = [remote.metrics_session(one) for one in session_ids or [None] * len(handles)]
        evaluation = Evaluation(remote, handles, sessions, slices)
        command = ["forwardpass", "evaluate", *host.words(), remote.name, "--data", str(data)]
        command += ["--batch-size", str(batch_size), "--version", str(remote.version)]
        command += [argument for one in named_weights for argument in ("--weights", one)]
        command += [argument for one in sessions for argument in ("--session", one.id)]
        try:
            _run(evaluation, slices)
            if not evaluation.is_complete:
                _leave(evaluation, slices, command)
                context.exit(128 + signal.SIGINT)
            metrics = [session.result() for session in sessions]
        except (*RETRYABLE, KeyboardInterrupt):
            _leave(evaluation, slices, command)
            raise
        except errors.ForwardPassError:
            # Resuming would meet the same error.
            _close(sessions)
            raise
        _close(sessions)
    _show(metrics, named_weights, slices.examples)


@forwardpass.command()
@host_argument
@model_argument
@_data_option
@_weights_option
@_batch_size_option
@click.option(
    "--optimizer",
    default="sgd",
    show_default=True,
    metavar="NAME|JSON",
    help='A Keras optimizer, such as adam or {"class_name": "SGD", "config": {"momentum": 0.9}}.',
)
@click.option(
    "--learning-rate", type=click.FloatRange(min=0), help="Replaces the learning rate of the optimizer's config."
)
@click.option("--epochs", default=1, show_default=True, type=click.IntRange(min=1))
@click.option("--proximal", default=0.0, show_default=True, type=click.FloatRange(min=0), help="FedProx's mu.")
@click.option("--checkpoint-steps", type=click.IntRange(min=1), help="Keep a checkpoint after each so many batches.")
@click.option(
    "--save", type=click.Path(dir_okay=False, path_type=pathlib.Path), help="Write the weights into an .npz file."
)
def train(
    host: Host,
    model: NamedModel,
    data: pathlib.Path,
    weights: str | None,
    batch_size: int,
    optimizer: str,
    learning_rate: float | None,
    epochs: int,
    proximal: float,
    checkpoint_steps: int | None,
    save: pathlib.Path | None,
) -> None:
    """Train weights on the examples in an .npz file, in their order, and print the id of the trained weights.

    The server runs the optimizer and keeps the weights. If the connection breaks, the training continues from its last
    checkpoint, or begins again. The loss and the metrics are computed while the weights change.
    """
    with _model(host, model) as remote:
        slices = Slices(_examples(remote, npz.load(data)), batch_size)
        handle = _weights(remote, weights)

        def examples_in(batches: int) -> int:
            epoch, rest = divmod(batches, len(slices))
            return epoch * slices.examples + slices.examples_in(rest)

        with _bar("training", epochs * slices.examples) as show:
            result = remote.train(
                handle,
                slices,
                optimizer=optimizer,
                learning_rate=learning_rate,
                epochs=epochs,
                proximal=proximal,
                checkpoint_steps=checkpoint_steps,
                progress=lambda count: show(examples_in(count)),
            )
        if save is not None:
            with _transfer("fetching") as fetching:
                found = remote.get_weights(result.weights, progress=fetching)
            _save_weights(save, found)
    _ERR.print(f"loss {result.loss:.6g} over {result.num_examples:,} examples in {result.num_steps:,} steps")
    if result.metrics is not None:
        tree, values = trees.flatten(result.metrics)
        names = [name.strip("[]'") or "metric" for name in tree.paths("")]
        for name, value in zip(names, values, strict=True):
            _ERR.print(Text(f"{name} {value[()]}"))
    click.echo(result.weights.id)


def _examples(model: RemoteFunctionalModel, arrays: dict[str, Any]) -> tuple[Any, ...]:
    """(x, y), or (x, y, sample_weight) where a file has some."""
    spec = model.description.spec
    pair = npz.take(arrays, "x", spec.x), npz.take(arrays, "y", spec.y)
    if any(name.split("/")[0] == "sample_weight" for name in arrays):
        return *pair, npz.take(arrays, "sample_weight", spec.sample_weight)
    return pair


def _run(evaluation: Evaluation, slices: Slices) -> None:
    """Runs the evaluation and shows a progress bar."""
    first, started = slices.examples_in(evaluation.counted), time.monotonic()
    with _bar("evaluating", slices.examples) as show:
        show(first)
        evaluation.run(lambda count: show(slices.examples_in(count)))
    counted = slices.examples_in(evaluation.counted) - first
    _ERR.print(f"{counted / (time.monotonic() - started):,.0f} examples/s")


def _close(sessions: list[MetricsSession]) -> None:
    # Best effort: the server drops idle sessions by itself.
    with contextlib.suppress(errors.ForwardPassError):
        for session in sessions:
            session.close()


def _leave(evaluation: Evaluation, slices: Slices, command: list[str]) -> None:
    counted = slices.examples_in(evaluation.counted)
    click.echo(f"{counted:,} of {slices.examples:,} examples have counted. To go on:", err=True)
    click.echo(f"  {shlex.join(command)}", err=True)


def _show(metrics: list[Any], named_weights: tuple[str, ...], examples: int) -> None:
    """Shows the metrics: one below the other for one set of weights, one row for each of several."""
    flat = [trees.flatten(one) for one in metrics]
    names = [name.strip("[]'") or "metric" for name in flat[0][0].paths("")]
    rows = [[str(value[()]) for value in values] for _, values in flat]
    if len(rows) == 1:
        table = Table("metric", "value", box=None, header_style="bold")
        for name, value in zip(names, rows[0], strict=True):
            table.add_row(Text(name), value)
        table.add_row("examples", f"{examples}")
    else:
        table = Table("weights", *map(escape, names), "examples", box=None, header_style="bold")
        for one, row in zip(named_weights, rows, strict=True):
            table.add_row(Text(one, overflow="fold"), *row, f"{examples}")
    _OUT.print(table)


@contextlib.contextmanager
def _client(host: Host) -> Iterator[forwardpass_client.Client]:
    """A client. Its errors, and those of files, end the program with one line."""
    try:
        with host.connect() as client:
            yield client
    except (errors.ForwardPassError, ValueError) as error:
        raise click.ClickException(str(error)) from None


@contextlib.contextmanager
def _model(host: Host, named: NamedModel) -> Iterator[RemoteFunctionalModel]:
    with _client(host) as client:
        yield client.model(named.name, named.version, label=named.label)


def _weights(model: RemoteFunctionalModel, file_or_id: str | None) -> WeightsHandle:
    """A handle of weights: by their id, or of a file that is put on the server."""
    if file_or_id is None:
        return _put(model, model.initial_weights)
    if not pathlib.Path(file_or_id).exists() and re.fullmatch("[0-9a-f]{64}", file_or_id):
        return model.weights_handle(file_or_id)
    return _put(model, _read_weights(model, pathlib.Path(file_or_id)))


def _read_weights(model: RemoteFunctionalModel, path: pathlib.Path) -> Any:
    spec, arrays = model.description.spec.weights, npz.load(path)
    return tuple(npz.take(arrays, name, spec.child(index)) for index, name in enumerate(("trainable", "non_trainable")))


def _put(model: RemoteFunctionalModel, model_weights: Any) -> WeightsHandle:
    with _transfer("sending weights") as progress:
        return model.put_weights(model_weights, progress=progress)


@contextlib.contextmanager
def _transfer(title: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar for a transfer: called with (bytes done, bytes in all)."""
    columns = (TextColumn(title), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=_ERR, transient=True) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


class _Rate(ProgressColumn):
    """Examples per second."""

    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else f"{task.speed:,.0f}/s")


@contextlib.contextmanager
def _bar(title: str, examples: int) -> Iterator[Callable[[int], None]]:
    """A progress bar: called with the number of examples done."""
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TextColumn("examples"), _Rate())
    with Progress(*columns, TimeRemainingColumn(), console=_ERR, transient=True) as progress:
        task = progress.add_task(title, total=examples)
        yield lambda done: progress.update(task, completed=done)


def _joined(structures: list[Any], spec: StructureSpec, examples: list[int]) -> Any:
    """The predictions of all batches as one structure. examples: the number of examples in each batch.

    Rows of examples are concatenated. Results for a whole batch, such as scalars, are stacked along a new first
    dimension, in the order of the batches.
    """
    flat = [trees.flatten(structure) for structure in structures]
    tree = flat[0][0]
    batches = zip(*(leaves for _, leaves in flat), strict=True)
    named = zip(tree.paths("predictions"), batches, spec.leaves, strict=True)
    return tree.unflatten([_joined_leaf(name, leaves, leaf_spec, examples) for name, leaves, leaf_spec in named])


def _joined_leaf(name: str, leaves: Sequence[Array], spec: TensorSpec, examples: list[int]) -> Array:
    is_free = spec.shape is None or spec.shape[:1] == (None,)
    has_rows = leaves[0].ndim > 0 and (is_free or [len(leaf) for leaf in leaves] == examples)
    try:
        return np.concatenate(leaves) if has_rows else np.stack(leaves)
    except ValueError:
        shapes = ", ".join(sorted({str(list(leaf.shape)) for leaf in leaves}))
        raise ValueError(
            f"{name}: the shapes of the results differ between batches, {shapes}: use a --batch-size of "
            f"{sum(examples)}, for one batch"
        ) from None
