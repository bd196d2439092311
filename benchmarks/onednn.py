"""What oneDNN gains on this machine: median times of models without it, as a multiple of those with it.

Each round runs one process with oneDNN and one without, so that both see the same machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time

import timing

SETTINGS = {"on": "1", "off": "0"}
BATCHES = (1, 32)


def measure(seconds: float) -> dict[str, float]:
    """The median milliseconds of one call, by model and batch size."""
    import keras
    import models
    import numpy as np
    import tensorflow as tf

    from forwardpass.wire.description import Function
    from forwardpass_server import functional_model_from_keras
    from forwardpass_server.models import tracing
    from forwardpass_server.models.execution import Execution

    tokens = keras.Input((64, 64))
    attended = keras.layers.LayerNormalization()(tokens + keras.layers.MultiHeadAttention(4, 16)(tokens, tokens))
    hidden = keras.layers.Dense(64)(keras.layers.Dense(256, "gelu")(attended))
    transformer = keras.Model(tokens, keras.layers.LayerNormalization()(attended + hidden))
    spec = (tf.TensorSpec([None, 64, 64]), tf.TensorSpec([None, 64, 64]))
    found = {}
    for name, model in {
        "MLP 784-128-10": models.mlp(),
        "CNN": models.cnn(),
        "transformer block": functional_model_from_keras(transformer, "mse", spec),
    }.items():
        traced = tracing.trace(model)
        execution = Execution(traced.functions, "/device:CPU:0")
        (x,) = traced.spec.x.leaves
        for batch in BATCHES:
            leaves = [*traced.initial_weights, np.ones((batch, *x.shape[1:]), x.dtype)]
            taken = []
            end = time.perf_counter() + seconds
            while (started := time.perf_counter()) < end:
                execution.run(Function.PREDICT_ON_BATCH, False, leaves)
                taken.append(time.perf_counter() - started)
            found[f"{name}, batch {batch}"] = statistics.median(taken) * 1e3
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each model and batch size")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(measure(given.seconds)))
        return
    command = [sys.executable, __file__, "--child", "--seconds", str(given.seconds)]

    def once(setting: str) -> dict[str, float]:
        environment = {**os.environ, "TF_ENABLE_ONEDNN_OPTS": SETTINGS[setting], "TF_CPP_MIN_LOG_LEVEL": "3"}
        return timing.figures(command, env=environment)

    on, off = timing.in_turns(list(SETTINGS), given.rounds, once)
    print("| model | on, ms | off, ms | off / on |\n|---|---|---|---|")
    for name in on:
        print(f"| {name} | {on[name]:.2f} | {off[name]:.2f} | {off[name] / on[name]:.2f} |")


if __name__ == "__main__":
    main()
