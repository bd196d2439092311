"""`load.py` for TFF's remote executor: weights stay there, x goes, predictions come, by four RPCs and a computation.

Its client blocks in each RPC, in an `async def` too: several callers are threads with an executor each.
"""

import asyncio
import os
import pathlib
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.append(str(pathlib.Path(__file__).parent.parent))

import grpc
import numpy as np
import tensorflow as tf
import tensorflow_federated as tff
import timing
import workloads


async def call_repeatedly(channel, predict, name, seconds):
    arrays, _ = workloads.weights(workloads.WORKLOADS[name].model)
    x = workloads.batch(name)
    executor = tff.framework.RemoteExecutor(tff.framework.RemoteExecutorGrpcStub(channel))
    executor.set_cardinalities({tff.CLIENTS: 0})
    weights_type, x_type = predict.type_signature.parameter
    function = await executor.create_value(predict, predict.type_signature)
    weights = await executor.create_value(list(arrays), weights_type)

    async def call():
        argument = await executor.create_struct([weights, await executor.create_value(x, x_type)])
        return await (await executor.create_call(function, argument)).compute()

    workloads.check(name, await call())
    taken = await timing.repeat_async(call, 1, seconds)
    executor.close()
    return taken


def computation(name):
    """The MLP's prediction of (weights, x)."""
    arrays, _ = workloads.weights(workloads.WORKLOADS[name].model)
    weights_type = tff.StructType([tff.TensorType(np.float32, array.shape) for array in arrays])

    @tff.tensorflow.computation(weights_type, tff.TensorType(np.float32, workloads.batch(name).shape))
    def predict(weights, x):
        w1, b1, w2, b2 = weights
        return tf.nn.relu(x @ w1 + b1) @ w2 + b2

    return predict


def main() -> None:
    options = timing.arguments(__doc__)
    predict = computation(options.workload)
    with grpc.insecure_channel(options.address) as channel:

        def measure():
            return asyncio.run(call_repeatedly(channel, predict, options.workload, options.seconds))

        timing.show(timing.on_threads(measure, options.callers), options.callers)


if __name__ == "__main__":
    main()
