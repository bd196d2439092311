"""Calls a golden model with nothing but the thin client: `call_golden.py ADDRESS GOLDEN_NPZ`. Prints what it found."""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import sys

import numpy as np

import forwardpass_client
from forwardpass_client import errors


def difference(found, expected):
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    return float(np.abs(found - expected).max(initial=0) / max(np.abs(expected).max(initial=0), 1e-30))


def main(address, path):
    golden = np.load(path)
    weights = tuple(golden[f"weights/trainable/{index}"] for index in range(8)), ()
    x, y = golden["x"], golden["y"]
    worst = {}
    with forwardpass_client.connect(address) as client:
        client.wait_until_ready()
        model = client.model("keras_cnn_emnist_head")
        output = model.forward_pass(weights, (x, y), training=False)
        worst["predictions"] = difference(output.predictions, golden["forward_infer/predictions"])
        worst["loss"] = difference(output.loss, golden["forward_infer/loss"])
        worst["loss alone"] = difference(model.loss(output.predictions, y), golden["loss/infer"])
        state = model.update_metrics_state(model.initialize_metrics_state(), y, output)
        worst["metric"] = difference(model.finalize_metrics(state)["xent"], golden["finalized/1/xent"])
        try:
            model.predict_on_batch(weights, x[..., :0])
        except errors.ShapeMismatch as error:
            refused = str(error)
        try:
            client.model("nonsense")
        except errors.ModelNotFound as error:
            not_found = error.place
        # Every dtype, bfloat16 without ml_dtypes among them.
        every = client.model("every_dtype")
        values = {
            name: [b"a", b""] if name == "string" else np.array([0, 1]).astype(spec.dtype)
            for name, spec in every.input_spec[0].items()
        }
        back = every.predict_on_batch(every.initial_weights, values)
        dtypes = {name: str(array.dtype) for name, array in back.items()}
        assert all(np.asarray(values[name], array.dtype).tolist() == array.tolist() for name, array in back.items())

    async def call():
        async with forwardpass_client.connect_async(address) as client:
            remote = await client.model("keras_cnn_emnist_head")
            return await remote.predict_on_batch(weights, x, training=False)

    worst["async"] = difference(asyncio.run(call()), golden["predict_infer"])
    versions = {name: importlib.metadata.version(name) for name in ("protobuf", "grpcio", "numpy")}
    print(
        json.dumps(
            {
                "worst": worst,
                "versions": versions,
                "refused": refused,
                "not_found": not_found,
                "dtypes": dtypes,
                "modules": sorted({name.split(".")[0] for name in sys.modules}),
            }
        )
    )


main(*sys.argv[1:])
