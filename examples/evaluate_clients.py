"""The weights of several clients, evaluated on one data set: each batch is sent once, and counted on the server.

python examples/evaluate_clients.py localhost:8500
"""

import sys

import numpy as np
from sklearn.datasets import load_digits

import forwardpass_client

images, digits = load_digits(return_X_y=True)
x, y = images[1437:].reshape(-1, 8, 8, 1) / 16, digits[1437:]
batches = [(x[start : start + 32], y[start : start + 32]) for start in range(0, len(x), 32)]


def client_weights(weights, seed):
    """What a client would send back after a round: here, the same weights with some noise."""
    trainable, non_trainable = weights
    rng = np.random.default_rng(seed)
    return type(trainable)(leaf + 0.1 * seed * rng.normal(size=leaf.shape) for leaf in trainable), non_trainable


with forwardpass_client.connect(sys.argv[1]) as client:
    model = client.model("digits")
    handles = [model.put_weights(client_weights(model.initial_weights, seed)) for seed in range(4)]
    for seed, metrics in enumerate(model.evaluate_many(handles, batches)):
        print(f"client {seed}", *(f"{name} {float(value):.4f}" for name, value in metrics.items()), sep="  ")
