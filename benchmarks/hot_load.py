"""What a model's callers notice while other models are loaded. Prints Markdown.

    python benchmarks/hot_load.py [--seconds 10] [--rounds 2] [--callers 4]

One server serves the MLP 784-128-10; callers of a process of its own call it by weights id, one example each. In each
round nothing else happens for a time; then, as long each, one model after another is loaded again and again through the
management port. The last two columns are ratios to the same run's calls while nothing was loaded: what else the machine
did counts less in them.
"""

from __future__ import annotations

import argparse
import multiprocessing
import pathlib
import queue
import shutil
import subprocess
import sys
import tempfile
import time
from typing import Any

import grpc
import keras
import run
import timing
import workloads

import forwardpass_client
from forwardpass import v1

HEADER = """| meanwhile | loads | calls | p50, ms | p99, ms | p99.9, ms | longest, ms | p50 / quiet | p99 / quiet |
|---|---|---|---|---|---|---|---|---|"""

CONFIG = """{"input_spec": {"x": {"dtype": "float32", "shape": [null, SHAPE]},
 "y": {"dtype": "int64", "shape": [null]}},
 "loss": {"class_name": "SparseCategoricalCrossentropy", "config": {"from_logits": true}},
 "metrics": ["SparseCategoricalAccuracy"]}"""

TFF_MODEL = pathlib.Path(__file__).parents[1] / "tests" / "data" / "tff" / "keras_cnn_emnist" / "saved_model"

QUIET = "nothing"
LOADED = {
    "tff": "loads of a SavedModel of TFF's",
    "keras_17": "loads of a Keras network of 17 layers",
    "keras_154": "loads of Keras's MobileNetV2, 154 layers",
}


def write_models(folder: pathlib.Path) -> None:
    layers: list[Any] = [keras.layers.Input((28, 28, 1))]
    for channels in (16, 16, 32, 32, 64):
        layers += [
            keras.layers.Conv2D(channels, 3, padding="same"),
            keras.layers.BatchNormalization(),
            keras.layers.ReLU(),
        ]
    layers += [keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(10)]
    write_keras_model(folder / "keras_17" / "1", keras.Sequential(layers), "28, 28, 1")
    mobile_net = keras.applications.MobileNetV2((96, 96, 3), weights=None, classes=10)
    write_keras_model(folder / "keras_154" / "1", mobile_net, "96, 96, 3")
    shutil.copytree(TFF_MODEL, folder / "tff" / "1")


def write_keras_model(folder: pathlib.Path, model: keras.Model, shape: str) -> None:
    folder.mkdir(parents=True)
    model.save(folder / "model.keras")
    (folder / "forwardpass.json").write_text(CONFIG.replace("SHAPE", shape))


def call(address: str, callers: int, found: Any, asked: Any) -> None:
    """Calls without a pause, and hands over what calls took since it was last asked."""
    with forwardpass_client.connect(address) as client:
        model = client.model("mlp")
        handle = model.put_weights(workloads.weights("mlp"))
        x = workloads.batch("small-1")

        def measure(seconds: float) -> list[float]:
            return timing.on_threads(
                lambda: timing.repeat(lambda: model.predict_on_batch(handle, x, training=False), seconds), callers
            )

        while (seconds := asked.get()) > 0:
            found.put(measure(seconds))


def show(title: str, taken: list[float], loads: list[float], quiet: list[float]) -> None:
    p50, p99, p999 = (quantile(taken, share) * 1e3 for share in (0.5, 0.99, 0.999))
    ratios = [quantile(taken, share) / quantile(quiet, share) for share in (0.5, 0.99)]
    loaded = f"{len(loads)}, {sum(loads) / len(loads):.1f} s each" if loads else ""
    print(
        f"| {title} | {loaded} | {len(taken)} | {p50:.2f} | {p99:.1f} | {p999:.1f} | {max(taken) * 1e3:.0f} "
        f"| {ratios[0]:.1f} | {ratios[1]:.1f} |",
        flush=True,
    )


def quantile(taken: list[float], share: float) -> float:
    return sorted(taken)[int(len(taken) * share)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--callers", type=int, default=4)
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    found, asked = context.Queue(), context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        write_models(pathlib.Path(folder))
        arguments = ["--factory=mlp=models:mlp", "--model-repository", folder, "--management-port", "0"]
        serve = ("-m", "forwardpass_server.app.cli", "serve", "--port", "0", "--metrics-port", "-1")
        command = [sys.executable, *serve, *arguments]
        server = subprocess.Popen(
            command, cwd=run.FOLDER, env=run.ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        try:
            lines = read_until_ready(server)
            calling = context.Process(
                target=call, args=(lines["listening on"], options.callers, found, asked), daemon=True
            )
            calling.start()
            asked.put(2.0)
            found.get()
            taken: dict[str, list[float]] = {name: [] for name in (QUIET, *LOADED)}
            loads: dict[str, list[float]] = {name: [] for name in taken}
            with grpc.insecure_channel(lines["management on"]) as channel:
                for _ in range(options.rounds):
                    asked.put(options.seconds)
                    taken[QUIET] += found.get()
                    for name in LOADED:
                        asked.put(options.seconds)
                        taken[name] += load_until_found(channel, name, found, loads[name])
            asked.put(0.0)
            calling.join()
        finally:
            server.kill()
            server.wait()
    print(HEADER)
    for name, ones in taken.items():
        show(LOADED.get(name, QUIET), ones, loads[name], taken[QUIET])


def load_until_found(channel: grpc.Channel, name: str, found: Any, loads: list[float]) -> list[float]:
    """Loads a model again and again until the callers have found what their calls took."""
    reload = channel.unary_unary("/forwardpass.v1.ManagementService/ReloadModel")
    request = v1.ReloadModelRequest(model=v1.ModelSelector(name=name, version=1)).SerializeToString()
    while True:
        try:
            taken: list[float] = found.get_nowait()
            return taken
        except queue.Empty:
            started = time.monotonic()
            reload(request, timeout=120)
            loads.append(time.monotonic() - started)


def read_until_ready(server: subprocess.Popen[str]) -> dict[str, str]:
    """What the server says, by how its lines begin."""
    assert server.stdout is not None
    lines: dict[str, str] = {}
    while "ready on" not in lines:
        line = server.stdout.readline().strip()
        if not line:
            raise SystemExit("the server ended")
        one, two, *rest = line.split(" ")
        lines[f"{one} {two}"] = " ".join(rest)
    return lines


if __name__ == "__main__":
    main()
