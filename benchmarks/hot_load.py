"""What a model's callers notice while another model is loaded. Prints Markdown.

    python benchmarks/hot_load.py [--seconds 20] [--callers 4]

One server serves the MLP 784-128-10; callers of a process of its own call it by weights id, one example each. For a
time nothing else happens; then a Keras convolutional network is loaded again and again through the management port.
"""

from __future__ import annotations

import argparse
import multiprocessing
import pathlib
import queue
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

HEADER = """| meanwhile | calls | p50, ms | p99, ms | p99.9, ms | longest, ms | loads |
|---|---|---|---|---|---|---|"""

CONFIG = """{"input_spec": {"x": {"dtype": "float32", "shape": [null, 28, 28, 1]},
 "y": {"dtype": "int64", "shape": [null]}},
 "loss": {"class_name": "SparseCategoricalCrossentropy", "config": {"from_logits": true}},
 "metrics": ["SparseCategoricalAccuracy"]}"""


def write_model(folder: pathlib.Path) -> None:
    """A network of some 20 layers, with batch normalisation."""
    layers: list[Any] = [keras.layers.Input((28, 28, 1))]
    for channels in (16, 16, 32, 32, 64):
        layers += [
            keras.layers.Conv2D(channels, 3, padding="same"),
            keras.layers.BatchNormalization(),
            keras.layers.ReLU(),
        ]
    layers += [keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(10)]
    folder.mkdir(parents=True)
    keras.Sequential(layers).save(folder / "model.keras")
    (folder / "forwardpass.json").write_text(CONFIG)


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


def show(title: str, taken: list[float], loads: list[float]) -> None:
    taken.sort()
    p50, p99, p999 = (taken[int(len(taken) * share)] * 1e3 for share in (0.5, 0.99, 0.999))
    loaded = f"{len(loads)}, {sum(loads) / len(loads):.1f} s each" if loads else ""
    print(
        f"| {title} | {len(taken)} | {p50:.2f} | {p99:.2f} | {p999:.1f} | {taken[-1] * 1e3:.0f} | {loaded} |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--callers", type=int, default=4)
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    found, asked = context.Queue(), context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        write_model(pathlib.Path(folder) / "cnn_20" / "1")
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
            print(HEADER)
            asked.put(options.seconds)
            show("nothing", found.get(), [])
            asked.put(options.seconds)
            loads = []
            with grpc.insecure_channel(lines["management on"]) as channel:
                reload = channel.unary_unary("/forwardpass.v1.ManagementService/ReloadModel")
                request = v1.ReloadModelRequest(model=v1.ModelSelector(name="cnn_20", version=1)).SerializeToString()
                while (taken := taken_now(found)) is None:
                    started = time.monotonic()
                    reload(request, timeout=120)
                    loads.append(time.monotonic() - started)
            show("loads", taken, loads)
            asked.put(0.0)
            calling.join()
        finally:
            server.kill()
            server.wait()


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


def taken_now(found: Any) -> list[float] | None:
    try:
        taken: list[float] = found.get_nowait()
    except queue.Empty:
        return None
    return taken


if __name__ == "__main__":
    main()
