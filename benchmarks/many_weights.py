"""Calls of many sets of weights: one computation for all against one by one. Prints Markdown.

    python benchmarks/many_weights.py [--rounds 9] [--models mlp,cnn,lstm,transformer] [--onednn off]

One server has each Keras model twice: as `rounding`, whose calls may run as one computation, and as `never`, whose
calls run one by one. One client predicts under K sets of weights, in one stream (`predict_each`). Both take turns
within each round, after warm-up rounds in which the server decides. The sets differ in all leaves, or in the last layer
only; each has an input of its own. `calls` is the ratio of the medians. `computation` leaves out gRPC and the batcher:
it compares single graph calls with one call of the graph for all sets, whose stack is made before, in one thread of
this process. The answers of both are compared. The exit status is 1 where they differ by more than rounding.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

TESTS = str(pathlib.Path(__file__).parent.parent / "tests")
sys.path.append(TESTS)
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import forwardpass_client  # noqa: E402
from support.servers import ServerProcess  # noqa: E402

MODELS = {
    "mlp": "MLP 784-128-10",
    "cnn": "CNN, 1M parameters",
    "lstm": "LSTM 32, 20 words",
    "transformer": "transformer, 2 layers of width 32, 20 words",
}
WORDS = 500
_TOLERANCE = 1e-4
_WARM_S = 3.0


def network(name: str) -> Any:
    """The Keras model."""
    import keras

    keras.utils.set_random_seed(0)
    layers = keras.layers
    if name == "mlp":
        return keras.Sequential([keras.Input((784,)), layers.Dense(128, "relu"), layers.Dense(10)])
    if name == "cnn":
        convolutions = [layers.Conv2D(16, 3, activation="relu"), layers.MaxPooling2D()]
        convolutions += [layers.Conv2D(32, 3, activation="relu"), layers.MaxPooling2D(), layers.Flatten()]
        return keras.Sequential([keras.Input((28, 28, 1)), *convolutions, layers.Dense(1100, "relu"), layers.Dense(62)])
    words = keras.Input((20,), dtype="int32")
    hidden = layers.Embedding(WORDS, 32)(words)
    if name == "lstm":
        return keras.Model(words, layers.Dense(WORDS)(layers.LSTM(32)(hidden)))
    for _ in range(2):
        hidden = layers.LayerNormalization()(hidden + layers.MultiHeadAttention(4, 8)(hidden, hidden))
        hidden = layers.LayerNormalization()(hidden + layers.Dense(32)(layers.Dense(64, "relu")(hidden)))
    return keras.Model(words, layers.Dense(WORDS)(layers.GlobalAveragePooling1D()(hidden)))


def write(folder: pathlib.Path, names: Sequence[str]) -> None:
    """A repository with each model twice."""
    for name in names:
        model = network(name)
        x = {"dtype": model.inputs[0].dtype, "shape": [None, *model.inputs[0].shape[1:]]}
        y = {"dtype": "int64", "shape": [None]}
        loss = {"class_name": "SparseCategoricalCrossentropy", "config": {"from_logits": True}}
        for kind, vectorize in (("rounding", "rounding"), ("never", False)):
            version = folder / f"{name}-{kind}" / "1"
            version.mkdir(parents=True)
            model.save(version / "model.keras")
            config = {"input_spec": {"x": x, "y": y}, "loss": loss, "gradients": False, "vectorize": vectorize}
            (version / "forwardpass.json").write_text(json.dumps(config))


def weights(initial: Any, sets: int, *, only_last: bool) -> list[Any]:
    """Sets that differ in all trainable leaves, or in those of the last layer."""
    trainable, non_trainable = initial
    rng = np.random.default_rng(0)
    shared = len(trainable) - 2 if only_last else 0
    return [
        (
            type(trainable)(
                leaf if index < shared else leaf + rng.standard_normal(leaf.shape).astype(leaf.dtype) / 16
                for index, leaf in enumerate(trainable)
            ),
            non_trainable,
        )
        for _ in range(sets)
    ]


def inputs(name: str, sets: int, rows: int) -> list[np.ndarray[Any, Any]]:
    """x of each set."""
    rng = np.random.default_rng(1)
    if name in ("lstm", "transformer"):
        return [rng.integers(0, WORDS, (rows, 20)).astype(np.int32) for _ in range(sets)]
    shape = (784,) if name == "mlp" else (28, 28, 1)
    return [rng.standard_normal((rows, *shape), np.float32) for _ in range(sets)]


def turns(kinds: dict[str, Callable[[], Any]], rounds: int, warm_s: float) -> dict[str, list[float]]:
    """The seconds of each round of each kind; they take turns."""
    for once in kinds.values():
        end = time.perf_counter() + warm_s
        while time.perf_counter() < end:
            once()
    taken: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(rounds):
        for kind, once in kinds.items():
            began = time.perf_counter()
            once()
            taken[kind].append(time.perf_counter() - began)
    return taken


def check(found: Sequence[Any], expected: Sequence[Any], title: str) -> None:
    """Ends the program where predictions differ by more than rounding."""
    for one, other in zip(found, expected, strict=True):
        if not np.allclose(one, other, rtol=0, atol=_TOLERANCE * np.abs(other).max()):
            raise SystemExit(f"{title}: the predictions differ")


def of_calls(
    client: Any, name: str, sets: int, rows: int, *, only_last: bool, rounds: int
) -> tuple[float, float, float]:
    """The ratio of calls one by one to calls together, and the milliseconds of both, for all sets."""
    never, rounding = client.model(f"{name}-never"), client.model(f"{name}-rounding")
    several = weights(never.initial_weights, sets, only_last=only_last)
    xs = inputs(name, sets, rows)
    handles = [rounding.put_weights(one) for one in several]

    def predict(model: Any) -> list[Any]:
        return list(model.predict_each(zip(handles, xs, strict=True), training=False))

    taken = turns({"never": lambda: predict(never), "rounding": lambda: predict(rounding)}, rounds, _WARM_S)
    check(predict(rounding), predict(never), f"{name}, {sets} sets, {rows} rows")
    for handle in handles:
        handle.delete()
    one_by_one, together = (statistics.median(taken[kind]) for kind in ("never", "rounding"))
    return one_by_one / together, one_by_one * 1e3, together * 1e3


def of_computation(models: dict[str, Any], name: str, sets: int, rows: int, *, only_last: bool, rounds: int) -> float:
    """The ratio of single graph calls to one graph call."""
    from forwardpass.wire.functions import Function
    from forwardpass_server.models.placement import CPU, TensorFlowDevice

    model, place = models[name], TensorFlowDevice(CPU).place
    spec = model.description.spec.weights
    initial = tuple(model.initial_weights)
    count = len(spec.child(0).leaves)
    shared = [place(np.ascontiguousarray(leaf)) for leaf in initial]
    several = []
    for trainable, _ in weights((initial[:count], ()), sets, only_last=only_last):
        several.append(
            [
                kept if only_last and index < count - 2 else place(np.ascontiguousarray(leaf))
                for index, (leaf, kept) in enumerate(zip(trainable, shared, strict=False))
            ]
            + shared[count:]
        )
    differing = [index < count and not (only_last and index < count - 2) for index in range(len(initial))]
    together = model.stack(differing)
    stacked, xs = together.stack(several), inputs(name, sets, rows)
    taken = turns(
        {
            "one by one": lambda: [
                model.run(Function.PREDICT_ON_BATCH, False, [*one, x]) for one, x in zip(several, xs, strict=True)
            ],
            "together": lambda: together.run(stacked, [np.stack(xs)]),
        },
        rounds,
        0.3,
    )
    return statistics.median(taken["one by one"]) / statistics.median(taken["together"])


def main() -> None:
    """Prints two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--sets", type=int, default=64)
    parser.add_argument("--grid", default="2x1,8x1,64x1,256x1,8x8,64x8,8x64,64x64", help="of the second table")
    parser.add_argument("--onednn", choices=("on", "off"), default="off")
    options = parser.parse_args()
    names = options.models.split(",")
    from forwardpass_server.process import onednn

    onednn.decide(options.onednn)
    from forwardpass_server.calls.model import ModelSource
    from forwardpass_server.models.loading import TensorFlowLoader

    with tempfile.TemporaryDirectory() as folder:
        repository = pathlib.Path(folder)
        write(repository, names)
        loader = TensorFlowLoader("cpu")
        local = {name: loader.load(ModelSource(name, 1, repository / f"{name}-rounding" / "1")) for name in names}
        with (
            ServerProcess("--model-repository", folder, "--onednn", options.onednn, "--weights-mib", "4096") as server,
            forwardpass_client.connect(server.address) as client,
        ):
            print(f"\n| {options.sets} sets, 1 row each | calls | one by one, together (ms) | computation |")
            print("|---|---|---|---|")
            for only_last in (False, True):
                for name in names:
                    title = f"{MODELS[name]}, {'the last layer' if only_last else 'all leaves'} differ"
                    common = {"only_last": only_last, "rounds": options.rounds}
                    calls, one_by_one, together = of_calls(client, name, options.sets, 1, **common)
                    computed = of_computation(local, name, options.sets, 1, **common)
                    print(f"| {title} | {calls:.2f} | {one_by_one:.1f}, {together:.1f} | {computed:.1f} |", flush=True)
            sizes = [tuple(map(int, size.split("x"))) for size in options.grid.split(",")]
            print("\n| calls, sets x rows | " + " | ".join(f"{sets} x {rows}" for sets, rows in sizes) + " |")
            print("|---|" + "---|" * len(sizes))
            for only_last in (False, True):
                for name in names:
                    cells = [
                        f"{of_calls(client, name, sets, rows, only_last=only_last, rounds=options.rounds)[0]:.2f}"
                        for sets, rows in sizes
                    ]
                    print(f"| {name}, {'last' if only_last else 'all'} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
