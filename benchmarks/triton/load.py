"""`load.py` for Triton, whose client needs an environment of its own: threads that call as fast as they can."""

import argparse
import concurrent.futures
import json
import pathlib
import sys
import time

import tritonclient.grpc as triton

sys.path.append(str(pathlib.Path(__file__).parent.parent))

import workloads


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workload")
    parser.add_argument("--address")
    parser.add_argument("--callers", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=2.0)
    options = parser.parse_args()
    workload = workloads.WORKLOADS[options.workload]
    arrays = [*workloads.weights(workload.model)[0], workloads.batch(options.workload)]
    inputs = []
    for name, array in zip(("w1", "b1", "w2", "b2", "x"), arrays, strict=True):
        inputs.append(triton.InferInput(name, array.shape, "FP32"))
        inputs[-1].set_data_from_numpy(array)
    end = time.perf_counter() + options.seconds + 0.5

    def call_repeatedly(_: int) -> list[float]:
        taken = []
        with triton.InferenceServerClient(options.address) as client:
            for _ in range(2):
                client.infer("mlp", inputs).as_numpy("predictions")
            while time.perf_counter() < end:
                started = time.perf_counter()
                client.infer("mlp", inputs).as_numpy("predictions")
                taken.append(time.perf_counter() - started)
        return taken

    with concurrent.futures.ThreadPoolExecutor(options.callers) as pool:
        taken = sorted(one for caller in pool.map(call_repeatedly, range(options.callers)) for one in caller)
    print(
        json.dumps({"calls_per_s": options.callers * len(taken) / sum(taken), "p50_ms": taken[len(taken) // 2] * 1e3})
    )


if __name__ == "__main__":
    main()
