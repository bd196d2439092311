"""Trains, exports, serves and calls a model, and compares each result with the local model. Takes half a minute."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import local_server
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Table

from forwardpass_server.process import onednn, quiet

# Relative to the largest number of a result. The server adds numbers in one graph and the local model in several, so
# the last bits of a float32 can differ.
TOLERANCE = 1e-6
BATCH = 32
STEPS = 5


@dataclasses.dataclass
class Row:
    """The results and times of one function, run locally and remotely."""

    name: str
    local: Any
    remote: Any
    local_ms: float
    remote_ms: float

    def difference(self) -> float:
        """The largest difference of two numbers, relative to the largest number; infinite for other structures."""
        import numpy as np

        from forwardpass.wire import trees

        (local_tree, local), (remote_tree, remote) = trees.flatten(self.local), trees.flatten(self.remote)
        if local_tree != remote_tree:
            return float("inf")
        worst = 0.0
        for here, there in zip(map(np.asarray, local), map(np.asarray, remote), strict=True):
            if (here.dtype, here.shape) != (there.dtype, there.shape) or not np.array_equal(
                np.isfinite(here), np.isfinite(there)
            ):
                return float("inf")
            finite = np.isfinite(here)
            apart = np.abs(here[finite].astype(np.float64) - there[finite].astype(np.float64)).max(initial=0)
            worst = max(worst, float(apart) / max(float(np.abs(here[finite]).max(initial=0)), 1e-30))
        return worst


def timed(call: Callable[[], Any], times: int = 20) -> tuple[Any, float]:
    """Returns a call's result and its median time in ms.

    The first call is not timed, unless `times` is 0 and it is the only one.
    """
    started = time.perf_counter()
    result = call()
    if not times:
        return result, (time.perf_counter() - started) * 1e3
    taken = []
    for _ in range(times):
        started = time.perf_counter()
        call()
        taken.append(time.perf_counter() - started)
    return result, sorted(taken)[times // 2] * 1e3


def compare(local: Any, remote: Any, x: Any, y: Any, advance: Callable[[], None]) -> list[Row]:
    """Compares each function of the model on one batch, and the metrics on the whole test set."""
    weights = local.initial_weights
    batch = x[:BATCH], y[:BATCH]
    predictions = local.predict_on_batch(weights, batch[0], training=False).numpy()
    calls: list[tuple[str, Callable[[Any], Any]]] = [
        ("predict_on_batch, inference", lambda model: model.predict_on_batch(weights, batch[0], training=False)),
        ("predict_on_batch, training", lambda model: model.predict_on_batch(weights, batch[0], training=True)),
        ("forward_pass, inference", lambda model: model.forward_pass(weights, batch, training=False)),
        ("forward_pass, training", lambda model: model.forward_pass(weights, batch, training=True)),
        ("loss", lambda model: model.loss(predictions, batch[1])),
        ("loss, weighted", lambda model: model.loss(predictions, batch[1], [1.0, 0.5] * (BATCH // 2))),
    ]
    # Timed once: the remote model fetches its weights once and keeps them.
    (here, here_ms), (there, there_ms) = (
        timed(lambda model=model: model.initial_weights, 0) for model in (local, remote)
    )
    rows = [Row("initial_weights", here, there, here_ms, there_ms)]
    for name, call in calls:
        (here, here_ms), (there, there_ms) = (timed(functools.partial(call, model)) for model in (local, remote))
        rows.append(Row(name, here, there, here_ms, there_ms))
        advance()
    rows += metrics(local, remote, weights, x, y)
    advance()
    return rows


def metrics(local: Any, remote: Any, weights: Any, x: Any, y: Any) -> list[Row]:
    """Compares the metrics functions on the whole test set."""
    results = []
    for model in (local, remote):
        state, initial_ms = timed(model.initialize_metrics_state)
        taken = []
        for start in range(0, len(x), BATCH):
            labels = y[start : start + BATCH]
            output = model.forward_pass(weights, (x[start : start + BATCH], labels), training=False)
            started = time.perf_counter()
            state = model.update_metrics_state(state, labels, output)
            taken.append(time.perf_counter() - started)
        final, final_ms = timed(lambda model=model, state=state: model.finalize_metrics(state))
        initial = model.initialize_metrics_state()
        results.append([(initial, initial_ms), (state, sorted(taken)[len(taken) // 2] * 1e3), (final, final_ms)])
    names = ("initialize_metrics_state", "update_metrics_state", "finalize_metrics")
    return [
        Row(name, here, there, here_ms, there_ms)
        for name, (here, here_ms), (there, there_ms) in zip(names, *results, strict=True)
    ]


def show(console: Console, rows: list[Row]) -> None:
    table = Table(title="the digits model, local and remote", title_style="bold", header_style="bold")
    table.add_column("function", no_wrap=True)
    for title in ("difference", "local, ms", "remote, ms"):
        table.add_column(title, justify="right")
    for row in rows:
        colour = "green" if row.difference() <= TOLERANCE else "red"
        table.add_row(row.name, f"[{colour}]{row.difference():.1e}[/]", f"{row.local_ms:.2f}", f"{row.remote_ms:.2f}")
    console.print(table)
    figures = Table(title="metrics on 360 test images", title_style="bold", header_style="bold")
    for title in ("metric", "local", "remote"):
        figures.add_column(title, justify="left" if title == "metric" else "right")
    for name, value in rows[-1].local.items():
        figures.add_row(name, f"{float(value):.7f}", f"{float(rows[-1].remote[name]):.7f}")
    console.print(figures)


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    # As the server does. On some CPUs TensorFlow uses oneDNN by default, which rounds differently.
    onednn.decide("auto")
    console = Console()
    with tempfile.TemporaryDirectory(prefix="forwardpass-demo-") as folder:
        rows = run(console, pathlib.Path(folder))
    show(console, rows)
    worst = max(row.difference() for row in rows)
    if worst > TOLERANCE:
        console.print(f"[red]local and remote differ by {worst:.1e}, more than float rounding ({TOLERANCE:.0e})[/]")
        raise SystemExit(1)
    console.print("The numbers are equal. To write this model, serve it and call it:\n", style="bold green")
    print(f"  {sys.executable} {pathlib.Path(__file__).with_name('digits.py')} models")
    print(f"  {pathlib.Path(sys.executable).parent}/forwardpass-server serve --model-repository models")
    print(
        f"  {sys.executable} -c \"import forwardpass_client; model = forwardpass_client.connect('localhost:8500')"
        ".model('digits'); print(model.predict_on_batch(model.initial_weights, [[[[0.5]] * 8] * 8], training=False))\""
    )


def run(console: Console, folder: pathlib.Path) -> list[Row]:
    """Trains the model, serves it from a repository in `folder`, and compares it with the local one."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("importing TensorFlow and Keras", total=1)
        # Imported here, so that the progress is visible meanwhile.
        with quiet.native_stderr():
            import digits

            import forwardpass_client
            from forwardpass_server import save_functional_model

        progress.advance(task)
        task = progress.add_task("training on 1437 handwritten digits", total=digits.EPOCHS)
        # TensorFlow prints further lines when it computes for the first time.
        with quiet.native_stderr():
            model = digits.train(lambda epoch: progress.update(task, completed=epoch))
            local = digits.functional(model)
            task = progress.add_task("exporting and serving", total=2)
            save_functional_model(local, folder / "digits" / "1")
        progress.advance(task)
        with local_server.serve(folder) as server, forwardpass_client.connect(server.address) as client:
            progress.advance(task)
            remote = client.model("digits")
            task = progress.add_task(f"calling {server.address}", total=8)
            _, (x, y) = digits.data()
            return compare(local, remote, x, y, lambda: progress.advance(task))


if __name__ == "__main__":
    main()
