"""Evaluates the weights of several clients on one data set. Each batch is sent once and counted on the server.

python examples/evaluate_clients.py localhost:8500
"""

import argparse

import numpy as np
from sklearn.datasets import load_digits

import forwardpass_client

parser = argparse.ArgumentParser(description="Evaluate the weights of several clients on one data set.")
parser.add_argument("address", help="host and port of a server with the digits model, for example localhost:8500")
address = parser.parse_args().address

images, digits = load_digits(return_X_y=True)
x, y = images[1437:].reshape(-1, 8, 8, 1) / 16, digits[1437:]
batches = [(x[start : start + 32], y[start : start + 32]) for start in range(0, len(x), 32)]


def client_weights(weights, seed):
    """The weights that a client returns after a round. Here: the same weights with random noise."""
    trainable, non_trainable = weights
    rng = np.random.default_rng(seed)
    return type(trainable)(leaf + 0.1 * seed * rng.normal(size=leaf.shape) for leaf in trainable), non_trainable


with forwardpass_client.connect(address) as client:
    model = client.model("digits")
    handles = [model.put_weights(client_weights(model.initial_weights, seed)) for seed in range(4)]
    for seed, metrics in enumerate(model.evaluate_many(handles, batches)):
        print(f"client {seed}", *(f"{name} {float(value):.4f}" for name, value in metrics.items()), sep="  ")
