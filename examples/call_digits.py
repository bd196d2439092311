"""Evaluates the digits model of `make serve` on test images, with the SDK alone.

python examples/call_digits.py localhost:8500
"""

import argparse

from sklearn.datasets import load_digits

import forwardpass_client

parser = argparse.ArgumentParser(description="Evaluate the digits model of a server on test images.")
parser.add_argument("address", help="host and port of the server, for example localhost:8500")
address = parser.parse_args().address

images, digits = load_digits(return_X_y=True)
x, y = images[1437:].reshape(-1, 8, 8, 1) / 16, digits[1437:]
batches = [(x[start : start + 32], y[start : start + 32]) for start in range(0, len(x), 32)]

with forwardpass_client.connect(address) as client:
    model = client.model("digits")
    weights = model.initial_weights  # Or other numbers of the same structure. They are sent with each call.
    state = model.initialize_metrics_state()
    for batch in batches:
        output = model.forward_pass(weights, batch, training=False)
        state = model.update_metrics_state(state, batch[1], output)
    print({name: float(value) for name, value in model.finalize_metrics(state).items()})
