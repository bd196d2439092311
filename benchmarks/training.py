"""What training on the server is worth: steps and gradients beside Keras in one process, as Markdown.

    python benchmarks/training.py [--seconds 1] [--rounds 9] [--models mlp,cnn] [--onednn off]

Keras models of MLP 784-128-10 and of a CNN with 1M parameters, batch 32, SGD, with a sparse cross-entropy and the
accuracy. The server and the local loop have the same model, metrics, batches, and TensorFlow settings: all cores, and
no XLA (`jit_compile`), as is Keras's default on a machine without a GPU. Each side is one process that stays, and the
kinds take turns within each round. A step of `train` and of `train_on_batch` updates weights, loss and metrics; the
figure of `train` includes the publication of the weights, and that of the loop returns the metrics of each step.

--onednn: on both sides. `default` leaves it to each: on some processors TensorFlow turns it on, and our server turns it
off.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import grpc
import load
import numpy as np
import run
import timing

import forwardpass_client
from forwardpass import v1
from forwardpass.wire import messages
from forwardpass.wire.structures import Structure

MODELS = {"mlp": "MLP 784-128-10", "cnn": "CNN, 1M parameters"}
OURS = [
    *("-m", "forwardpass_server.app.cli", "serve", "--port", "0", "--metrics-port", "-1"),
    *(f"--factory={name}=training:{name}" for name in MODELS),
]
LOCAL = ("keras", "keras-gradients")
REMOTE = ("train", "by-value", "gradients", "echo")

_BATCH = 32
_RATE = 0.01
_INPUTS = {"mlp": (784,), "cnn": (28, 28, 1)}
_LABELS = {"mlp": 10, "cnn": 62}


def network(name: str) -> Any:
    """The Keras model, the same in each process."""
    import keras

    keras.utils.set_random_seed(0)
    layers = keras.layers
    if name == "mlp":
        return keras.Sequential([keras.Input((784,)), layers.Dense(128, "relu"), layers.Dense(10)])
    return keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            layers.Conv2D(16, 3, padding="same", activation="relu"),
            layers.MaxPooling2D(),
            layers.Conv2D(32, 3, padding="same", activation="relu"),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dense(600, "relu"),
            layers.Dense(62),
        ]
    )


def cross_entropy() -> Any:
    import keras

    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def accuracy() -> list[Any]:
    import keras

    return [keras.metrics.SparseCategoricalAccuracy()]


def _served(name: str) -> Any:
    import tensorflow as tf

    from forwardpass_server import functional_model_from_keras

    spec = tf.TensorSpec([None, *_INPUTS[name]], tf.float32), tf.TensorSpec([None], tf.int64)
    return functional_model_from_keras(network(name), cross_entropy(), spec, accuracy)


def mlp() -> Any:
    """A factory for the server."""
    return _served("mlp")


def cnn() -> Any:
    """A factory for the server."""
    return _served("cnn")


def batches(name: str) -> list[tuple[Any, Any]]:
    """64 batches, the same in each process."""
    rng = np.random.default_rng(0)
    return [
        (rng.standard_normal((_BATCH, *_INPUTS[name]), np.float32), rng.integers(0, _LABELS[name], _BATCH))
        for _ in range(64)
    ]


def until(seconds: float, found: list[Any]) -> Iterator[Any]:
    """The batches again and again, for so long."""
    end = time.perf_counter() + seconds
    return itertools.takewhile(lambda _: time.perf_counter() < end, itertools.cycle(found))


def steps(run_steps: Callable[[Iterator[Any]], int], found: list[Any], seconds: float) -> dict[str, float]:
    """The figures of one round. run_steps: runs a step for each batch, and returns how many."""
    started, worked = time.perf_counter(), time.process_time()
    count = run_steps(until(seconds, found))
    taken, worked = time.perf_counter() - started, time.process_time() - worked
    return {"steps_per_s": count / taken, "cpu_s": worked, "steps": count}


def calls(call: Callable[[Any], Any], found: list[Any], seconds: float) -> dict[str, float]:
    """The figures of one round of single calls."""
    again = itertools.cycle(found)
    taken = timing.repeat(lambda: call(next(again)), seconds)
    return {"p50_ms": statistics.median(taken) * 1e3}


def local_round(name: str) -> Callable[[str, float], dict[str, float]]:
    """The rounds of Keras and TensorFlow in this process."""
    import tensorflow as tf

    model = network(name)
    model.compile(optimizer="sgd", loss=cross_entropy(), metrics=accuracy())
    model.optimizer.learning_rate = _RATE
    if model.jit_compile:
        raise SystemExit("expected Keras not to use XLA on a CPU")
    loss_of = cross_entropy()
    found = batches(name)

    @tf.function
    def value_and_gradients(x: Any, y: Any) -> Any:
        with tf.GradientTape() as tape:
            predictions = model(x, training=True)
            loss = loss_of(y, predictions)
        return loss, predictions, tape.gradient(loss, model.trainable_variables)

    def train(some: Iterator[Any]) -> int:
        count = 0
        for x, y in some:
            model.train_on_batch(x, y)
            count += 1
        return count

    def once(kind: str, seconds: float) -> dict[str, float]:
        if kind == "keras":
            return steps(train, found, seconds)
        return calls(
            lambda batch: tf.nest.map_structure(np.asarray, value_and_gradients(*map(tf.constant, batch))),
            found,
            seconds,
        )

    return once


def remote_round(name: str, address: str, echo: str) -> Callable[[str, float], dict[str, float]]:
    """The rounds of a client."""
    client = forwardpass_client.connect(address, max_message_bytes=2**30, reuse_weights=False)
    model = client.model(name)
    weights = model.initial_weights
    handle = model.put_weights(weights)
    found = batches(name)
    output, gradients = model.forward_backward(handle, found[0])
    returned = (output.loss, output.predictions, *gradients)
    method = grpc.insecure_channel(echo, load.OPTIONS).unary_unary("/floor/Echo")
    answer = sum(np.asarray(leaf).nbytes for leaf in returned) + 80
    request = os.urandom(_request_bytes(name, found[0]) - 8) + answer.to_bytes(8, "little")

    def by_value(some: Iterator[Any]) -> int:
        trainable, non_trainable = weights
        count = 0
        for batch in some:
            _, slopes = model.forward_backward((trainable, non_trainable), batch)
            trainable = tuple(leaf - np.float32(_RATE) * slope for leaf, slope in zip(trainable, slopes, strict=True))
            count += 1
        return count

    def once(kind: str, seconds: float) -> dict[str, float]:
        if kind == "train":
            return steps(lambda some: model.train(handle, some, learning_rate=_RATE).num_steps, found, seconds)
        if kind == "by-value":
            return steps(by_value, found, seconds)
        if kind == "gradients":
            return calls(lambda batch: model.forward_backward(handle, batch), found, seconds)
        return calls(lambda _: method(request), found, seconds)

    return once


def _request_bytes(name: str, batch: tuple[Any, Any]) -> int:
    """The length of our request for gradients, with the weights' id."""
    parts = {"batch_input.x": Structure.of(batch[0]), "batch_input.y": Structure.of(batch[1])}
    selector = v1.ModelSelector(name=name, version=1)
    return len(messages.encode(v1.ForwardBackwardRequest(model=selector, weights_id=bytes(32)), parts))


class Worker:
    """A process that measures one round after the other: `work`."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, "training.py", "work", *arguments]
        self._process = subprocess.Popen(
            command, cwd=run.FOLDER, env=run.ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def round(self, kind: str, seconds: float) -> dict[str, float]:
        """The figures of one round."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(kind, seconds, file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"the process that measures has ended: {self._process.args}")
        found: dict[str, float] = json.loads(line)
        return found


def work(place: str, name: str, *addresses: str) -> None:
    """Measures the round that each line of the input names, and prints its figures as JSON."""
    once = local_round(name) if place == "local" else remote_round(name, *addresses)
    for line in sys.stdin:
        kind, seconds = line.split()
        print(json.dumps(once(kind, float(seconds))), flush=True)


def processor_s(process_id: int) -> float:
    """The processor time of another process."""
    with open(f"/proc/{process_id}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Bench:
    """The rounds of one model. server_id: of the server's process."""

    def __init__(self, local: Worker, remote: Worker, server_id: int, seconds: float, rounds: int) -> None:
        self._local = local
        self._remote = remote
        self._server_id = server_id
        self._seconds = seconds
        self._found: dict[str, list[dict[str, float]]] = {kind: [] for kind in (*LOCAL, *REMOTE)}
        for kind in self._found:
            self._once(kind, 0.5)
        for _ in range(rounds):
            for kind, found in self._found.items():
                found.append(self._once(kind, seconds))

    def _once(self, kind: str, seconds: float) -> dict[str, float]:
        worker = self._local if kind in LOCAL else self._remote
        before = processor_s(self._server_id)
        found = worker.round(kind, seconds)
        if kind in REMOTE and "cpu_s" in found:
            found["cpu_s"] += processor_s(self._server_id) - before
        return found

    def steps(self, kind: str) -> tuple[float, float, str]:
        """Steps/s: the median, the best, and both with the processor time of a step as a text."""
        rates = [one["steps_per_s"] for one in self._found[kind]]
        cpu_ms = statistics.median(one["cpu_s"] / one["steps"] for one in self._found[kind]) * 1e3
        median, best = statistics.median(rates), max(rates)
        return median, best, f"{median:,.0f} ({best:,.0f}), {cpu_ms:.2f} ms"

    def p50(self, kind: str) -> tuple[float, float, str]:
        """The p50 in milliseconds: the median of the rounds, the best, and both as a text."""
        values = [one["p50_ms"] for one in self._found[kind]]
        median, best = statistics.median(values), min(values)
        return median, best, f"{median:.2f} ({best:.2f})"


def rows(bench: Bench, title: str) -> Iterator[tuple[str, str, str, float, float, str]]:
    """Target, what was measured, the figures, the ratio of medians, that of the best rounds, what it should be."""
    train, keras, value = (bench.steps(kind) for kind in ("train", "keras", "by-value"))
    yield (
        "P13",
        f"train / train_on_batch in one process, {title}",
        f"{train[2]}; {keras[2]}",
        train[0] / keras[0],
        train[1] / keras[1],
        "at least 1.0",
    )
    yield (
        "P13b",
        f"train / forward_backward with weights by value, {title}",
        f"{train[2]}; {value[2]}",
        train[0] / value[0],
        train[1] / value[1],
        "at least 3",
    )
    ours, local, echo = (bench.p50(kind) for kind in ("gradients", "keras-gradients", "echo"))
    yield (
        "P15",
        f"forward_backward by id / (tf.function + echo), p50, {title}",
        f"{ours[2]}; {local[2]} + {echo[2]} ms",
        ours[0] / (local[0] + echo[0]),
        ours[1] / (local[1] + echo[1]),
        "at most 1.25",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--onednn", choices=("off", "on", "default"), default="off")
    options = parser.parse_args()
    if options.onednn != "default":
        run.ENVIRONMENT["TF_ENABLE_ONEDNN_OPTS"] = str(int(options.onednn == "on"))
    print(f"oneDNN: {options.onednn}")
    print(f"load at the start: {os.getloadavg()[0]:.1f} on {len(os.sched_getaffinity(0))} cores")
    print("steps/s: median (best), processor time of a step in all processes; p50: median (best)\n")
    print("| | measured | figures | ratio | of the best rounds | target |\n|---|---|---|---|---|---|")
    with run.server_process(OURS) as (address, server_id), run.server(["echo_server.py"]) as echo:
        for name in options.models.split(","):
            with contextlib.ExitStack() as stack:
                local = stack.enter_context(Worker("local", name))
                remote = stack.enter_context(Worker("remote", name, address, echo))
                bench = Bench(local, remote, server_id, options.seconds, options.rounds)
            for target, measured, figures, ratio, best, wanted in rows(bench, MODELS[name]):
                print(f"| {target} | {measured} | {figures} | **{ratio:.2f}** | {best:.2f} | {wanted} |", flush=True)
    print(f"\nload at the end: {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["work"]:
        work(*sys.argv[2:])
    else:
        main()
