"""One program, run with TFF's own object and with ours in its place: `call_from_tff.py ADDRESS REPOSITORY`.

Prints, for each model and result, the largest difference as a share of the largest number.
"""

from __future__ import annotations

import json
import pathlib
import sys

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff
from tff_models import MODELS

import forwardpass_client


def program(model, batches, weights):
    """What a user's code does with a functional model; it does not know which one it has."""
    results = {}
    for training in (True, False):
        for index, (x, y) in enumerate(batches):
            output = model.predict_on_batch(weights, x, training=training)
            key = f"batch {index}, training={training}"
            results[f"predictions of {key}"] = np.asarray(tf.nest.flatten(output)[0])
            results[f"loss of {key}"] = np.asarray(model.loss(output, y))
    results["default of training"] = np.asarray(model.predict_on_batch(model_weights=weights, x=batches[0][0]))
    return results


def main(address, repository):
    worst = {}
    with forwardpass_client.connect(address) as client:
        for name, (make, batch) in MODELS.items():
            remote = client.model(name)
            # TFF runs a model backed by Keras only in graphs of its own: its loaded form runs everywhere.
            local = (
                make()
                if name != "keras_model"
                else tff.learning.models.load_functional_model(str(pathlib.Path(repository) / name / "1"))
            )
            batches = [batch(examples) for examples in (5, 1, 32)]
            tf.nest.assert_same_structure(remote.initial_weights, make().initial_weights)
            weights = tf.nest.map_structure(lambda weight: weight * 1.5, make().initial_weights)
            # The user's weights may be tensors as well.
            for given in (weights, tf.nest.map_structure(tf.constant, weights)):
                here, there = program(local, batches, weights), program(remote, batches, given)
                assert list(here) == list(there)
                for key, expected in here.items():
                    found = there[key]
                    assert (found.dtype, found.shape) == (expected.dtype, expected.shape), key
                    scale = max(float(np.abs(expected).max(initial=0)), 1e-30)
                    worst[f"{name}: {key}"] = float(np.abs(found - expected).max(initial=0)) / scale
            spec = tf.nest.map_structure(lambda leaf: tf.TensorSpec(leaf.shape, leaf.dtype), remote.input_spec)
            assert spec == make().input_spec, spec
    print(json.dumps({"versions": [tff.__version__, tf.__version__, np.__version__], "worst": worst}))


main(*sys.argv[1:])
