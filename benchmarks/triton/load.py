"""`load.py` for Triton, whose client needs an environment of its own: threads with a client each."""

import pathlib
import sys

import tritonclient.grpc as triton

sys.path.append(str(pathlib.Path(__file__).parent.parent))

import timing
import workloads


def main() -> None:
    options = timing.arguments(__doc__)
    arrays = [*workloads.weights(workloads.WORKLOADS[options.workload].model)[0], workloads.batch(options.workload)]
    inputs = []
    for name, array in zip(("w1", "b1", "w2", "b2", "x"), arrays, strict=True):
        inputs.append(triton.InferInput(name, array.shape, "FP32"))
        inputs[-1].set_data_from_numpy(array)

    def measure() -> list[float]:
        with triton.InferenceServerClient(options.address) as client:

            def call():
                return client.infer("mlp", inputs).as_numpy("predictions")

            workloads.check(options.workload, call())
            return timing.repeat(call, options.seconds)

    timing.show(timing.on_threads(measure, options.callers), options.callers)


if __name__ == "__main__":
    main()
