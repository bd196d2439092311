"""Mixed traffic for a long time, and whether the server's memory grows under it.

    python benchmarks/soak.py [--minutes 30] [--reloads 200]

Callers of several kinds at once: batches of all sizes by value, by id and over pipelines, uploads, deletions, metric
sessions, evaluations, bad requests, clients that are killed. Prints the server's resident memory as it goes and, in the
end, its slope over the second half of the time, in MiB an hour, and a verdict: where that is more than the noise of the
measurements the memory grows, and the exit status is 1. With --reloads, a model is loaded again so often, evenly spread
over the time.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import pathlib
import random
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator

import grpc
import numpy as np
import run
import workloads

import forwardpass_client
from forwardpass import v1
from forwardpass.wire.methods import METHODS
from forwardpass_client import errors

COMMAND = [
    *("-m", "forwardpass_server.app.cli", "serve", "--port", "0", "--metrics-port", "-1", "--weights-mib", "64"),
    *("--upload-expiry", "5", "--session-expiry", "60"),
    *(f"--factory={name}=models:{name}" for name in ("mlp", "cnn", "scale")),
]
SAMPLE_S = 2.0


def by_value(client: forwardpass_client.Client, rng: random.Random) -> None:
    name = rng.choice(["mlp", "cnn"])
    model = client.model(name)
    x = workloads.batch("small-1" if name == "mlp" else "medium")
    model.predict_on_batch(workloads.weights(name), np.repeat(x, rng.randint(1, 40), 0), training=rng.random() < 0.5)


def by_id(client: forwardpass_client.Client, rng: random.Random) -> None:
    (w1, b1, w2, _), rest = workloads.weights("mlp")
    model = client.model("mlp")
    handle = model.put_weights(((w1, b1, w2, workloads.vector(rng.randrange(1000), 10)), rest))
    for _ in range(20):
        model.predict_on_batch(handle, workloads.batch("small-32")[: rng.randint(1, 32)], training=False)
    if rng.random() < 0.5:
        handle.delete()


def new_weights(client: forwardpass_client.Client, rng: random.Random) -> None:
    shapes = [leaf.shape for leaf in workloads.weights("cnn")[0]]
    leaves = tuple(workloads.vector(rng.randrange(2**31), int(np.prod(shape))).reshape(shape) for shape in shapes)
    model = client.model("cnn")
    handle = model.put_weights((leaves, ()))
    model.get_weights(handle)


def over_a_pipeline(client: forwardpass_client.Client, rng: random.Random) -> None:
    model = client.model("mlp")
    batches = [workloads.batch("small-32")[: rng.randint(0, 32)] for _ in range(200)]
    for _ in model.predict_many(workloads.weights("mlp"), batches, training=False):
        pass


def in_a_session(client: forwardpass_client.Client, rng: random.Random) -> None:
    model = client.model("mlp")
    handle = model.put_weights(workloads.weights("mlp"))
    batch = workloads.batch("small-32"), workloads.labels("small-32")
    session = model.metrics_session()
    for _ in range(rng.randint(1, 30)):
        output = session.forward_pass(handle, batch)
        session.update(batch[1], output)
    session.result()
    if rng.random() < 0.5:
        # Else it expires.
        session.close()


def evaluated(client: forwardpass_client.Client, rng: random.Random) -> None:
    model = client.model("cnn")
    batch = workloads.batch("medium"), workloads.labels("medium")
    model.evaluate(workloads.weights("cnn"), (batch for _ in range(rng.randint(0, 40))))


def large(client: forwardpass_client.Client, rng: random.Random) -> None:
    x = np.ones((rng.randint(1, 4096), 1024), np.float32)
    client.model("scale").predict_on_batch(workloads.weights("scale"), x)


def wrong(client: forwardpass_client.Client, rng: random.Random) -> None:
    model = client.model("mlp")
    with contextlib.suppress(errors.WeightsNotFound):
        model.predict_on_batch(model.weights_handle(rng.randbytes(32).hex()), workloads.batch("small-1"))
    with contextlib.suppress(errors.DeadlineExceeded):
        model.predict_on_batch(workloads.weights("mlp"), workloads.batch("small-1"), timeout_s=0.0005)
    with contextlib.suppress(errors.ModelNotFound):
        client.model("nobody")


KINDS: list[Callable[[forwardpass_client.Client, random.Random], None]] = [
    by_value,
    by_id,
    new_weights,
    over_a_pipeline,
    in_a_session,
    evaluated,
    large,
    wrong,
]


def caller(address: str, seed: int) -> None:
    """Calls until it is killed; a connection lasts for some calls."""
    rng = random.Random(seed)
    while True:
        with forwardpass_client.connect(address) as client:
            for _ in range(rng.randint(1, 30)):
                rng.choice(KINDS)(client, rng)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


@contextlib.contextmanager
def reloading(management: str) -> Iterator[Callable[[], None]]:
    """What loads a model again that others call meanwhile."""
    request = v1.ReloadModelRequest(model=v1.ModelSelector(name="mlp", version=1)).SerializeToString()
    with grpc.insecure_channel(management) as channel:
        yield lambda: channel.unary_unary(METHODS["ReloadModel"].path)(request, timeout=120)


def resident_mib(pid: int) -> float:
    pages = int(pathlib.Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--reloads", type=int, default=0)
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    samples: list[tuple[float, float]] = []
    deaths = 0
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        store = f"--session-store=sqlite://{folder}/sessions.sqlite3"
        management = f"127.0.0.1:{free_port()}"
        ports = f"--management-port={management.rpartition(':')[2]}"
        address, pid = stack.enter_context(run.server_process([*COMMAND, store, ports]))
        reload = stack.enter_context(reloading(management))
        reloads = 0
        callers = [context.Process(target=caller, args=(address, seed), daemon=True) for seed in range(3)]
        for one in callers:
            one.start()
        started = time.monotonic()
        while (now := time.monotonic() - started) < options.minutes * 60:
            time.sleep(SAMPLE_S)
            samples.append((now, resident_mib(pid)))
            if not all(one.is_alive() for one in callers):
                raise SystemExit("a caller failed: its error stands above")
            if len(samples) % 5 == 0:
                # One that is in the middle of something.
                callers[2].kill()
                callers[2].join()
                deaths += 1
                callers[2] = context.Process(target=caller, args=(address, 100 + deaths), daemon=True)
                callers[2].start()
            while reloads < options.reloads * now / (options.minutes * 60):
                reload()
                reloads += 1
            if len(samples) % 30 == 0:
                print(f"{now / 60:5.1f} min  {samples[-1][1]:7.0f} MiB  {deaths} callers killed", flush=True)
        for one in callers:
            one.kill()
    second = samples[len(samples) // 2 :]
    slope, _ = statistics.linear_regression([at for at, _ in second], [mib for _, mib in second])
    noise = statistics.pstdev(mib for _, mib in second)
    grown = slope * (second[-1][0] - second[0][0])
    print(f"slope {slope * 3600:+.0f} MiB an hour, {grown:+.0f} MiB over the second half, noise {noise:.0f} MiB")
    grows = grown > 2 * noise + 8
    print(f"verdict: {'the memory grows' if grows else 'no slope'}")
    raise SystemExit(int(grows))


if __name__ == "__main__":
    main()
