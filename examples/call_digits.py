"""The SDK in fifteen lines: evaluates the digits model of `make serve` on the test images.

python examples/call_digits.py localhost:8500
"""

import sys

from sklearn.datasets import load_digits

import forwardpass_client

images, digits = load_digits(return_X_y=True)
x, y = images[1437:].reshape(-1, 8, 8, 1) / 16, digits[1437:]

with forwardpass_client.connect(sys.argv[1]) as client:
    model = client.model("digits")
    weights = model.initial_weights  # Or any other numbers of the same structure: they go with each call.
    state = model.initialize_metrics_state()
    for start in range(0, len(x), 32):
        batch = x[start : start + 32], y[start : start + 32]
        output = model.forward_pass(weights, batch, training=False)
        state = model.update_metrics_state(state, batch[1], output)
    print({name: float(value) for name, value in model.finalize_metrics(state).items()})
