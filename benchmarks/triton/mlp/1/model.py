"""A peer's model: the MLP in Triton's Python backend, weights as inputs; numpy is faster here than TensorFlow."""

import os
import sys

sys.path.append(os.environ["SITE_PACKAGES"])

import numpy as np
import triton_python_backend_utils as backend


class TritonPythonModel:
    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        w1, b1, w2, b2, x = (
            backend.get_input_tensor_by_name(request, name).as_numpy() for name in ("w1", "b1", "w2", "b2", "x")
        )
        predictions = np.maximum(x @ w1 + b1, 0) @ w2 + b2
        return backend.InferenceResponse([backend.Tensor("predictions", predictions)])
