"""Trains TFF's own object and a remote model under tf.GradientTape: `train_under_tff.py ADDRESS REPOSITORY`.

Prints, for each model, the largest difference of a weight after training as a share of the largest weight, the losses,
and the error of a learning process of TFF for the model `linear`.
"""

from __future__ import annotations

import json
import pathlib
import sys

import grpc
import numpy as np
import tensorflow as tf
import tensorflow_federated as tff
from tff_models import MODELS

import forwardpass_client
import forwardpass_client.tensorflow


def train(functional_model, batches):
    """What a user's training loop does; it does not know which model it has."""
    assert isinstance(functional_model, tff.learning.models.FunctionalModel)
    model = tff.learning.models.model_from_functional(functional_model)
    losses = []
    for batch in batches:
        with tf.GradientTape() as tape:
            output = model.forward_pass(batch)
        gradients = tape.gradient(output.loss, model.trainable_variables)
        for variable, gradient in zip(model.trainable_variables, gradients, strict=True):
            variable.assign_sub(0.02 * tf.convert_to_tensor(gradient))
        losses.append(float(output.loss))
    return [variable.numpy() for variable in model.trainable_variables], losses


def refusal(functional_model):
    """The error of TFF's runtime, which runs graphs in another process."""
    data = tf.data.Dataset.from_tensors((np.ones((3, 4), np.float32), np.zeros(3, np.int64)))
    optimizer = tff.learning.optimizers.build_sgdm(0.1)
    process = tff.learning.algorithms.build_weighted_fed_avg(functional_model, client_optimizer_fn=optimizer)
    try:
        process.next(process.initialize(), [data])
    except grpc.RpcError as error:
        return error.details()
    return "none"


def main(address, repository):
    worst, losses = {}, {}
    with forwardpass_client.connect(address) as client:
        for name, (_, batch) in MODELS.items():
            remote = forwardpass_client.tensorflow.functional_model(client.model(name))
            local = tff.learning.models.load_functional_model(str(pathlib.Path(repository) / name / "1"))
            batches = [batch(examples) for examples in [7, 16, 3] * 5]
            expected, _ = train(local, batches)
            found, losses[name] = train(remote, batches)
            worst[name] = max(
                float(np.abs(one - other).max() / np.abs(other).max())
                for one, other in zip(found, expected, strict=True)
            )
        refused = refusal(forwardpass_client.tensorflow.functional_model(client.model("linear")))
    print(json.dumps({"worst": worst, "losses": losses, "refused": refused}))


main(*sys.argv[1:])
