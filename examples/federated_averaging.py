"""Federated learning of handwritten digits with 100 clients. No weights travel after the first upload.

python examples/federated_averaging.py    # takes about two minutes and writes federated_averaging.png

Each client has images of two digits at most. Three methods run for 20 rounds on a server that this program starts:

- FedAvg: each client trains the global weights on its images. The average of the results is the next global weights.
- FedProx: FedAvg with a loss that grows with the distance from the global weights.
- Personal heads: clients train all layers but the last, which stays as it was initialised, and the results are
  averaged. For an evaluation each client trains a last layer of its own on the frozen other layers.

FedAvg also runs in this program, with Keras and without a server, from the same weights and with the same batches. The
weights of both must be equal up to float rounding.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import pathlib
import re
import tempfile
import time
import urllib.request
from collections.abc import Iterable, Iterator
from typing import Any

from forwardpass_server.process import onednn, quiet

# As the server does. On some CPUs TensorFlow uses oneDNN by default, which rounds differently.
onednn.decide("auto")
with quiet.native_stderr():
    import digits
    import keras
    import local_server
    import matplotlib
    import numpy as np
    import tensorflow as tf
    from matplotlib import pyplot
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table

    import forwardpass_client
    from forwardpass_server import functional_model_from_keras, save_functional_model

SEED = 0
BATCH = 7
EPOCHS = 2
LEARNING_RATE = 0.3
PROXIMAL = 0.3
HEAD_EPOCHS = 5
HEAD_LEARNING_RATE = 0.03
# For each leaf of the trainable weights, whether it belongs to the last layer: its kernel and its bias.
HEAD = (False, False, False, False, True, True)
BODY = tuple(not is_head for is_head in HEAD)
# Of the largest difference of two weights. The server and Keras compute the same float32 sums in graphs that may add in
# another order, and each step continues from the rounded result of the one before.
TOLERANCE = 1e-4

Batches = list[tuple[Any, Any]]
Metrics = dict[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Client:
    """The images of one client. x: float32[N, 8, 8, 1]. y: int64[N]."""

    number: int
    x: Any
    y: Any
    test_x: Any
    test_y: Any

    def batches(self, round_number: int) -> Batches:
        """The training batches of a round, in an order that depends on the client and the round only."""
        order = np.random.default_rng([SEED, round_number, self.number]).permutation(len(self.y))
        parts = np.split(order, range(BATCH, len(order), BATCH))
        return [(self.x[part], self.y[part]) for part in parts]


@dataclasses.dataclass
class Run:
    """The results of one method: a number for each round. sent and received: bytes of the messages of the client."""

    name: str
    accuracy: list[float] = dataclasses.field(default_factory=list)
    loss: list[float] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    sent: int = 0
    received: int = 0
    weights: Any = None


def make_clients(count: int) -> list[Client]:
    """Shards the images by digit: each client gets 2 of `2 * count` shards, and each shard has images of one digit."""
    (x, y), (test_x, test_y) = digits.data()
    shards = np.random.default_rng(SEED).permutation(2 * count).reshape(count, 2)

    def images_of(labels: Any) -> list[Any]:
        parts = [
            part for digit in range(10) for part in np.array_split(np.flatnonzero(labels == digit), 2 * count // 10)
        ]
        return [np.concatenate([parts[one], parts[other]]) for one, other in shards]

    train, test = images_of(y), images_of(test_y)
    return [
        Client(number, x[own], y[own], test_x[tests], test_y[tests])
        for number, (own, tests) in enumerate(zip(train, test, strict=True))
    ]


def make_keras_model() -> keras.Model:
    keras.utils.set_random_seed(SEED)
    return keras.Sequential(
        [
            keras.layers.Input((8, 8, 1)),
            keras.layers.Conv2D(32, 3, padding="same", activation="relu"),
            keras.layers.MaxPooling2D(),
            keras.layers.Conv2D(64, 3, activation="relu"),
            keras.layers.Flatten(),
            keras.layers.Dense(10),
        ]
    )


def cross_entropy() -> keras.losses.Loss:
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def save(model: keras.Model, folder: pathlib.Path) -> None:
    """Writes the model for the server. Its metrics are the accuracy and the loss."""
    functional = functional_model_from_keras(
        model,
        cross_entropy(),
        (tf.TensorSpec([None, 8, 8, 1], tf.float32), tf.TensorSpec([None], tf.int64)),
        [
            "SparseCategoricalAccuracy",
            {"class_name": "SparseCategoricalCrossentropy", "config": {"name": "loss", "from_logits": True}},
        ],
    )
    save_functional_model(functional, folder)


def federated_averaging(
    model: Any, clients: list[Client], weights: Any, rounds: int, proximal: float = 0.0
) -> Iterator[tuple[Any, Metrics]]:
    """Yields the handle of the global weights and their metrics after each round. weights: the handle at the start."""
    test = [(np.concatenate([c.test_x for c in clients]), np.concatenate([c.test_y for c in clients]))]
    for number in range(rounds):
        results = model.train_many(
            ((client.batches(number), None) for client in clients),
            weights=weights,
            learning_rate=LEARNING_RATE,
            epochs=EPOCHS,
            proximal=proximal,
        )
        weights = model.average(results)
        yield weights, model.evaluate(weights, test)


def personal_heads(model: Any, clients: list[Client], weights: Any, rounds: int) -> Iterator[tuple[Any, Metrics]]:
    """`federated_averaging` with a head of each client. The images of each client count under its own weights."""
    for number in range(rounds):
        updates = [(client.batches(number), None) for client in clients]
        results = model.train_many(updates, weights=weights, learning_rate=LEARNING_RATE, epochs=EPOCHS, trainable=BODY)
        weights = model.average(results)
        personal = model.train_many(
            updates, weights=weights, learning_rate=HEAD_LEARNING_RATE, epochs=HEAD_EPOCHS, trainable=HEAD
        )
        with model.metrics_session() as session:
            for client, result in zip(clients, personal, strict=True):
                metrics = model.evaluate(result.weights, [(client.test_x, client.test_y)], session=session)
        yield weights, metrics


def local_federated_averaging(
    model: keras.Model, clients: list[Client], weights: Any, rounds: int
) -> Iterator[tuple[Any, Metrics]]:
    """`federated_averaging` with Keras alone. weights: the arrays of the trainable weights at the start."""
    model.compile(keras.optimizers.SGD(LEARNING_RATE), cross_entropy())
    x, y = np.concatenate([c.test_x for c in clients]), np.concatenate([c.test_y for c in clients])
    total = sum(len(client.y) for client in clients)
    for number in range(rounds):
        average = [np.zeros_like(leaf) for leaf in weights]
        for client in clients:
            model.set_weights(weights)
            for _ in range(EPOCHS):
                for batch in client.batches(number):
                    model.train_on_batch(*batch)
            share = np.float32(len(client.y) / total)
            average = [leaf + share * own for leaf, own in zip(average, model.get_weights(), strict=True)]
        weights = average
        model.set_weights(weights)
        logits = model.predict_on_batch(x)
        accuracy, loss = np.mean(np.argmax(logits, axis=1) == y), cross_entropy()(y, logits)
        yield weights, {"sparse_categorical_accuracy": accuracy, "loss": loss}


class Traffic:
    """Bytes of messages that the server has counted so far, without the headers of HTTP/2 and TCP."""

    def __init__(self, metrics_url: str) -> None:
        self._url = metrics_url

    def read(self) -> dict[str, int]:
        """Bytes by "sent" and "received", as the client sees them."""
        with urllib.request.urlopen(self._url) as response:
            text = response.read().decode()
        counted = collections.Counter({"sent": 0, "received": 0})
        for name, value in re.findall(r"^forwardpass_(received|sent)_bytes_total\{.*\} (\S+)$", text, re.MULTILINE):
            counted["sent" if name == "received" else "received"] += int(float(value))
        return counted


class Progressing:
    """Shows the rounds: in one line on a terminal, otherwise in a line for every fifth round. A context manager."""

    def __init__(self, console: Console, rounds: int) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bar = Progress(*columns, console=console, disable=not console.is_terminal, transient=True)
        self._task = self._bar.add_task("starting a server", total=None)
        self._console = console
        self._rounds = rounds

    def follow(self, run: Run, steps: Iterable[tuple[Any, Metrics]], traffic: Traffic | None = None) -> Run:
        """Notes the results of the rounds in a run, and what they took."""
        self._bar.reset(self._task, total=self._rounds, description=run.name)
        before = traffic.read() if traffic else {"sent": 0, "received": 0}
        began = time.perf_counter()
        for number, (weights, metrics) in enumerate(steps, 1):
            run.weights = weights
            run.accuracy.append(float(metrics["sparse_categorical_accuracy"]))
            run.loss.append(float(metrics["loss"]))
            text = f"{run.name}: accuracy {run.accuracy[-1]:.3f}"
            self._bar.update(self._task, completed=number, description=text)
            if not self._console.is_terminal and (number % 5 == 0 or number == self._rounds):
                print(f"{text} after round {number} of {self._rounds}", flush=True)
        run.seconds = time.perf_counter() - began
        after = traffic.read() if traffic else before
        run.sent, run.received = (after[name] - before[name] for name in ("sent", "received"))
        return run

    def __enter__(self) -> Progressing:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()


def transfer(model: Any, weights: Any, traffic: Traffic) -> int:
    """The bytes of one download and one upload of weights: what a client update takes where weights are sent.

    weights: a handle.
    """
    before = traffic.read()
    trainable, non_trainable = model.get_weights(weights)
    model.put_weights((tuple(leaf + np.float32(1) for leaf in trainable), non_trainable))
    after = traffic.read()
    return sum(after.values()) - sum(before.values())


def draw(runs: list[Run], local: Run, title: str, path: pathlib.Path) -> None:
    """Writes a picture of the accuracy and the loss after each round. title: of the picture."""
    matplotlib.use("Agg")
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 5), layout="constrained")
    figure.suptitle(title, fontsize="medium")
    for plot, values, label in zip(axes, ("accuracy", "loss"), ("accuracy", "cross-entropy in nats"), strict=True):
        for run, colour in zip(runs, ("tab:blue", "tab:orange", "tab:green"), strict=True):
            numbers = getattr(run, values)
            plot.plot(range(1, len(numbers) + 1), numbers, color=colour, label=run.name)
        numbers = getattr(local, values)
        plot.plot(range(1, len(numbers) + 1), numbers, "o", color="black", fillstyle="none", label=local.name)
        plot.set_xlabel("round")
        plot.set_ylabel(f"{label}, on 360 test images")
        plot.xaxis.get_major_locator().set_params(integer=True)
        plot.grid(alpha=0.3)
        plot.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylim(0, 1)
    axes[1].set_ylim(bottom=0)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, ncols=len(labels), loc="outside lower center")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def show(console: Console, runs: list[Run], rounds: int) -> None:
    table = Table(title=f"after {rounds} rounds, on 360 test images", title_style="bold", header_style="bold")
    table.add_column("method", no_wrap=True)
    for title in ("accuracy", "loss", "seconds", "sent, MiB", "received, MiB"):
        table.add_column(title, justify="right")
    for run in runs:
        figures = [f"{run.accuracy[-1]:.3f}", f"{run.loss[-1]:.3f}", f"{run.seconds:.1f}"]
        travelled = [f"{count / 2**20:.2f}" if count else "-" for count in (run.sent, run.received)]
        table.add_row(run.name, *figures, *travelled)
    console.print(table)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train 100 clients by federated averaging on a server, and compare it with a local program."
    )
    parser.add_argument("--clients", type=int, default=100, help="a multiple of 5, from 5 to 100")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--picture", type=pathlib.Path, default=pathlib.Path("federated_averaging.png"))
    arguments = parser.parse_args()
    if arguments.clients not in range(5, 101, 5):
        parser.error(f"--clients: expected a multiple of 5, from 5 to 100, got {arguments.clients}")
    if arguments.rounds < 1:
        parser.error(f"--rounds: expected 1 or more, got {arguments.rounds}")
    return arguments


def main() -> None:
    arguments = parse()
    console = Console()
    rounds, clients = arguments.rounds, make_clients(arguments.clients)
    with tempfile.TemporaryDirectory(prefix="forwardpass-federated-") as folder, Progressing(console, rounds) as shown:
        repository = pathlib.Path(folder)
        with quiet.native_stderr():
            keras_model = make_keras_model()
            save(keras_model, repository / "digits" / "1")
        with local_server.serve(repository) as server, forwardpass_client.connect(server.address) as client:
            traffic = Traffic(server.metrics_url)
            model = client.model("digits")
            start = model.put_weights(model.initial_weights)
            fedavg = shown.follow(Run("FedAvg"), federated_averaging(model, clients, start, rounds), traffic)
            fedprox = shown.follow(
                Run("FedProx"), federated_averaging(model, clients, start, rounds, PROXIMAL), traffic
            )
            heads = shown.follow(Run("Personal heads"), personal_heads(model, clients, start, rounds), traffic)
            by_value = transfer(model, fedavg.weights, traffic) * len(clients) * rounds
            begin = list(model.initial_weights[0])
            there, _ = model.get_weights(fedavg.weights)
        with quiet.native_stderr():
            local = shown.follow(
                Run("FedAvg in one program"), local_federated_averaging(keras_model, clients, begin, rounds)
            )
    runs = [fedavg, fedprox, heads]
    show(console, [*runs, local], rounds)
    print(
        f"FedAvg moved {(fedavg.sent + fedavg.received) / 2**20:.1f} MiB: batches, ids and metrics. "
        f"With weights by value, {len(clients) * rounds} client updates would move {by_value / 2**20:.1f} MiB more."
    )
    draw(runs, local, f"{len(clients)} clients, each with images of at most two digits", arguments.picture)
    print(f"wrote {arguments.picture}")
    difference = max(float(np.abs(one - other).max()) for one, other in zip(there, local.weights, strict=True))
    print(f"largest difference of the weights of FedAvg from those in one program: {difference:.1e}")
    if not difference <= TOLERANCE:
        raise SystemExit(f"expected at most {TOLERANCE:.0e}, which float rounding explains")


if __name__ == "__main__":
    main()
