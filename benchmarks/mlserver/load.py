"""`load.py` for MLServer, whose client needs an environment of its own: tasks of one grpc.aio client."""

import asyncio
import pathlib
import sys

sys.path.append(str(pathlib.Path(__file__).parent.parent))

import grpc
import numpy as np
import timing
import workloads
from mlserver.grpc import dataplane_pb2, dataplane_pb2_grpc


async def measure(options):
    x = workloads.batch(options.workload)
    request = dataplane_pb2.ModelInferRequest(
        model_name=workloads.WORKLOADS[options.workload].model, raw_input_contents=[x.tobytes()]
    )
    request.inputs.add(name="x", datatype="FP32", shape=x.shape)
    async with grpc.aio.insecure_channel(options.address) as channel:
        infer = dataplane_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer

        async def call():
            response = await infer(request)
            return np.frombuffer(response.raw_output_contents[0], np.float32).reshape(response.outputs[0].shape)

        workloads.check(options.workload, await call())
        return await timing.repeat_async(call, options.callers, options.seconds)


def main() -> None:
    options = timing.arguments(__doc__)
    timing.show(asyncio.run(measure(options)), options.callers)


if __name__ == "__main__":
    main()
