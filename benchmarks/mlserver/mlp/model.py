"""A peer's model: the MLP in MLServer, weights in the model; numpy is faster here than TensorFlow."""

import os
import sys

sys.path.append(os.environ["BENCHMARKS"])

import numpy as np
import workloads
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceResponse


class Mlp(MLModel):
    async def load(self):
        self._weights, _ = workloads.weights("mlp")
        return True

    async def predict(self, payload):
        w1, b1, w2, b2 = self._weights
        predictions = np.maximum(NumpyCodec.decode_input(payload.inputs[0]) @ w1 + b1, 0) @ w2 + b2
        return InferenceResponse(model_name=self.name, outputs=[NumpyCodec.encode_output("predictions", predictions)])
