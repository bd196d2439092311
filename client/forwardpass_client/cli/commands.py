"""The subcommands of `forwardpass`."""

from __future__ import annotations

import contextlib
import pathlib
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

import forwardpass_client
from forwardpass.wire import errors, trees
from forwardpass.wire.description import Function
from forwardpass_client.cli import npz
from forwardpass_client.cli.hosts import Host, host_argument
from forwardpass_client.model import RemoteFunctionalModel
from forwardpass_client.weights import WeightsHandle

_OUT = Console()
_ERR = Console(stderr=True)

_version_option = click.option("--version", type=click.IntRange(min=1), help="Version.  [default: the highest]")
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

    A server that asks for a token finds it best in the environment, as FORWARDPASS_TOKEN: other users of a machine see
    its command lines.
    """


@forwardpass.command()
@host_argument
def models(host: Host) -> None:
    """List the models of a server, those that failed to load included."""
    with _client(host) as client:
        found = client.models()
    table = Table("model", "version", "state", "content", "error", box=None, header_style="bold")
    for model in found:
        colour = {"available": "green", "failed": "red"}.get(model.state, "yellow")
        table.add_row(
            model.name,
            str(model.version),
            f"[{colour}]{model.state}[/]",
            model.content_hash[:12],
            Text(model.error),
        )
    _OUT.print(table)


@forwardpass.command()
@host_argument
@click.option("--service", default="", help="Of one service, such as model/digits.  [default: the server as a whole]")
@click.option("--timeout", default=3.0, show_default=True, type=click.FloatRange(min=0, min_open=True), help="Seconds.")
def health(host: Host, service: str, timeout: float) -> None:
    """Ask whether a server is serving: exits with 0 if it says SERVING, with 1 otherwise.

    Fit for a probe: it starts in a third of a second and asks once.
    """
    with _client(host) as client:
        is_serving = client.is_serving(service, timeout_s=timeout)
    click.echo("SERVING" if is_serving else "NOT_SERVING")
    if not is_serving:
        raise click.exceptions.Exit(1)


@forwardpass.command()
@host_argument
@click.argument("model")
@_version_option
def describe(host: Host, model: str, version: int | None) -> None:
    """Show what a model takes and returns, and which functions it has."""
    with _model(host, model, version) as remote:
        description = remote.description
    spec = description.spec
    facts = Table(box=None, show_header=False)
    facts.add_column(style="bold")
    facts.add_column(overflow="fold")
    for name, value in (
        ("model", str(description.identity)),
        ("content", remote.content_hash),
        ("format", description.format),
        ("versions", ", ".join(f"{found.version} {found.state}" for found in remote.versions)),
        ("weights", _summary(spec.weights)),
        ("x", str(spec.x)),
        ("y", str(spec.y)),
        ("predictions", str(spec.predictions)),
        ("forward_pass", "the model's own" if spec.has_own_forward_pass else "predict_on_batch and loss"),
        ("metrics", str(spec.metrics)),
        ("batching", _yes_unless(description.unbatchable_reason)),
        ("merging metrics states", _yes_unless(description.unmergeable_reason)),
    ):
        facts.add_row(name, Text(value))
    _OUT.print(facts)
    functions = Table("function", "", box=None, header_style="bold")
    for function in Function:
        reason = spec.unavailable.get(function)
        functions.add_row(function.title, Text("yes", "green") if reason is None else Text(f"no: {reason}", "yellow"))
    _OUT.print(functions)


def _yes_unless(reason: str) -> str:
    return f"no: {reason}" if reason else "yes"


def _summary(spec: Any) -> str:
    size_bytes = sum(int(np.prod(leaf.shape)) * max(leaf.data_type.itemsize, 1) for leaf in spec.leaves)
    numbers = sum(int(np.prod(leaf.shape)) for leaf in spec.leaves)
    return f"{len(spec.leaves)} arrays, {numbers:,} numbers, {size_bytes / 2**20:,.2f} MiB"


@forwardpass.command()
@host_argument
@click.argument("model")
@click.option("--output", "-o", required=True, type=click.Path(dir_okay=False, path_type=pathlib.Path))
@click.option("--id", "weights_id", help="Those under this id.  [default: those that the model was saved with]")
@_version_option
def weights(host: Host, model: str, output: pathlib.Path, weights_id: str | None, version: int | None) -> None:
    """Write weights of a model into an .npz file: trainable/0, non_trainable/0 and so on."""
    with _model(host, model, version) as remote:
        if weights_id is None:
            found = remote.initial_weights
        else:
            with _transfer("fetching") as progress:
                found = remote.get_weights(remote.weights_handle(weights_id), progress=progress)
        arrays: dict[str, Any] = {}
        for name, part in zip(("trainable", "non_trainable"), found, strict=True):
            npz.put(arrays, name, part)
        npz.save(output, arrays)
    _ERR.print(f"wrote {len(arrays)} arrays to {output}")


@forwardpass.command("put-weights")
@host_argument
@click.argument("model")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=pathlib.Path))
@click.option("--lease", type=click.FloatRange(min=0), help="Keep them on the server for so many seconds.")
@_version_option
def put_weights(host: Host, model: str, file: pathlib.Path, lease: float | None, version: int | None) -> None:
    """Send the weights in an .npz file once, and print the id by which they can be named from then on.

    The server keeps them until it needs the room, or the lease ends.
    """
    with _model(host, model, version) as remote:
        handle = _put(remote, _read_weights(remote, file))
        if lease is not None:
            handle.lease(lease)
    click.echo(handle.id)


@forwardpass.command("delete-weights")
@host_argument
@click.argument("model")
@click.argument("weights_id", metavar="ID")
def delete_weights(host: Host, model: str, weights_id: str) -> None:
    """Drop weights that were put."""
    with _model(host, model, None) as remote:
        remote.weights_handle(weights_id).delete()


@forwardpass.command()
@host_argument
@click.argument("model")
@_data_option
@click.option(
    "--output",
    "-o",
    required=True,
    type=click.Path(dir_okay=False, path_type=pathlib.Path),
    help="The .npz file to write: predictions, or predictions/0 and so on.",
)
@_weights_option
@_batch_size_option
@_version_option
def predict(
    host: Host,
    model: str,
    data: pathlib.Path,
    output: pathlib.Path,
    weights: str | None,
    batch_size: int,
    version: int | None,
) -> None:
    """Predict for the examples in an .npz file (in inference mode) and write the predictions into another."""
    with _model(host, model, version) as remote:
        model_weights = _weights(remote, weights)
        x = npz.take(npz.load(data), "x", remote.description.spec.x)
        predictions = [
            remote.predict_on_batch(model_weights, batch, training=False)
            for batch in _batches(x, batch_size, "predicting")
        ]
        arrays: dict[str, Any] = {}
        npz.put(arrays, "predictions", _concatenate(predictions))
        npz.save(output, arrays)
    _ERR.print(f"wrote {', '.join(arrays)} to {output}")


@forwardpass.command()
@host_argument
@click.argument("model")
@_data_option
@_weights_option
@_batch_size_option
@_version_option
def evaluate(
    host: Host, model: str, data: pathlib.Path, weights: str | None, batch_size: int, version: int | None
) -> None:
    """Evaluate a model on the examples in an .npz file (in inference mode) and show its metrics."""
    with _model(host, model, version) as remote:
        spec = remote.description.spec
        model_weights = _weights(remote, weights)
        arrays = npz.load(data)
        pair = npz.take(arrays, "x", spec.x), npz.take(arrays, "y", spec.y)
        started = time.monotonic()
        state = remote.initialize_metrics_state()
        examples = 0
        for x, y in _batches(pair, batch_size, "evaluating"):
            batch_output = remote.forward_pass(model_weights, (x, y), training=False)
            state = remote.update_metrics_state(state, y, batch_output)
            examples += int(batch_output.num_examples)
        metrics = remote.finalize_metrics(state)
        seconds = time.monotonic() - started
    table = Table("metric", "value", box=None, header_style="bold")
    tree, values = trees.flatten(metrics)
    for name, value in zip(tree.paths(""), values, strict=True):
        table.add_row(Text(name.strip("[]'") or "metric"), str(value[()]))
    table.add_row("examples", f"{examples}")
    _OUT.print(table)
    _ERR.print(f"{examples / seconds:,.0f} examples/s")


@contextlib.contextmanager
def _client(host: Host) -> Iterator[forwardpass_client.Client]:
    """A client whose errors, and those of files, end the program with one line."""
    try:
        with host.connect() as client:
            yield client
    except (errors.ForwardPassError, ValueError) as error:
        raise click.ClickException(str(error)) from None


@contextlib.contextmanager
def _model(host: Host, name: str, version: int | None) -> Iterator[RemoteFunctionalModel]:
    with _client(host) as client:
        yield client.model(name, version)


def _weights(model: RemoteFunctionalModel, file_or_id: str | None) -> WeightsHandle:
    """Weights on the server: named by their id, or put there."""
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
    """A progress bar for bytes on their way."""
    columns = (TextColumn(title), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=_ERR, transient=True) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _batches(data: Any, batch_size: int, title: str) -> Iterator[Any]:
    """Slices of a structure of arrays along their first dimension, at least one, with a progress bar for a person."""
    tree, leaves = trees.flatten(data)
    sizes = {int(leaf.shape[0]) if leaf.ndim else -1 for leaf in leaves}
    if len(sizes) != 1 or -1 in sizes:
        raise errors.ShapeMismatch(place="data", expected="as many examples in each array", found=f"{sorted(sizes)}")
    (total,) = sizes
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TextColumn("examples"), TimeRemainingColumn())
    with Progress(*columns, console=_ERR, transient=True) as progress:
        task = progress.add_task(title, total=total)
        for start in range(0, max(total, 1), batch_size):
            yield tree.unflatten([leaf[start : start + batch_size] for leaf in leaves])
            progress.update(task, completed=min(start + batch_size, total))


def _concatenate(structures: list[Any]) -> Any:
    flat = [trees.flatten(structure) for structure in structures]
    tree = flat[0][0]
    return tree.unflatten([np.concatenate(leaves) for leaves in zip(*(leaves for _, leaves in flat), strict=True)])
