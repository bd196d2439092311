"""Federated averaging by real TFF, and the same rounds on a server: `federated_averaging.py ADDRESS`.

Prints, for each model, the largest difference of a weight after each round as a share of the largest weight of its
array, and the largest change of a weight in all rounds.
"""

from __future__ import annotations

import json
import sys

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff
from tff_models import MODELS

import forwardpass_client

ROUNDS = 5
LEARNING_RATE = 0.05


def client_batches(batch):
    """The batches of three clients, which have different numbers of examples."""
    return [[batch(examples) for examples in sizes] for sizes in ([7, 3], [16], [5, 12, 4])]


def rounds_of_tff(model, clients):
    """The trainable weights after each round."""
    process = tff.learning.algorithms.build_weighted_fed_avg(
        model,
        client_optimizer_fn=tff.learning.optimizers.build_sgdm(LEARNING_RATE),
        server_optimizer_fn=tff.learning.optimizers.build_sgdm(1.0),
    )
    data = [_concatenated(batches) for batches in clients]
    state = process.initialize()
    for _ in range(ROUNDS):
        state = process.next(state, data).state
        yield list(process.get_model_weights(state).trainable)


def _concatenated(batches):
    datasets = [tf.data.Dataset.from_tensors(batch) for batch in batches]
    joined = datasets[0]
    for dataset in datasets[1:]:
        joined = joined.concatenate(dataset)
    return joined


def rounds_on_a_server(model, clients):
    """The trainable weights after each round: the server trains and averages, and weights travel as ids."""
    weights = model.put_weights(model.initial_weights)
    for _ in range(ROUNDS):
        results = [model.train(weights, batches, optimizer="sgd", learning_rate=LEARNING_RATE) for batches in clients]
        weights = model.average(results)
        yield list(model.get_weights(weights)[0])


def main(address):
    worst, moved = {}, {}
    with forwardpass_client.connect(address) as client:
        for name, (make, batch) in MODELS.items():
            clients = client_batches(batch)
            local = make()
            start = list(local.initial_weights[0])
            worst[name] = []
            found_rounds = rounds_on_a_server(client.model(name), clients)
            pairs = zip(rounds_of_tff(local, clients), found_rounds, strict=True)
            for expected, found in pairs:
                differences = [
                    np.abs(one - other).max() / np.abs(other).max() for one, other in zip(found, expected, strict=True)
                ]
                worst[name].append(float(max(differences)))
            moved[name] = float(max(np.abs(one - other).max() for one, other in zip(found, start, strict=True)))
    print(json.dumps({"worst": worst, "moved": moved}))


main(*sys.argv[1:])
