"""Peers with an environment of their own, which is made under .cache/benchmarks on the first run."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator

import timing

FOLDER = pathlib.Path(__file__).parent
CACHE = FOLDER.parent / ".cache" / "benchmarks"
REQUIREMENTS = FOLDER.parent / "requirements"

START_S = 120.0


@dataclasses.dataclass(frozen=True)
class Peer:
    """A server, and beside it in the folder of its name what calls it, `load.py`.

    installs: the arguments of one `pip install` after another.
    """

    name: str
    title: str
    installs: tuple[tuple[str, ...], ...]
    serve: Callable[[Peer], contextlib.AbstractContextManager[str]]

    @property
    def environment(self) -> pathlib.Path:
        return CACHE / self.name

    @property
    def python(self) -> pathlib.Path:
        return self.environment / "bin" / "python"

    @property
    def site_packages(self) -> pathlib.Path:
        (found,) = self.environment.glob("lib/python*/site-packages")
        return found

    @contextlib.contextmanager
    def server(self) -> Iterator[str]:
        """Starts the server and gives its address, once it answers. Installs it where that was never done."""
        complete = self.environment / "complete"
        if not complete.exists():
            print(f"installing {self.title}: some minutes, the first time", file=sys.stderr)
            shutil.rmtree(self.environment, ignore_errors=True)
            subprocess.run([sys.executable, "-m", "venv", str(self.environment)], check=True)
            for arguments in self.installs:
                subprocess.run([str(self.python), "-m", "pip", "install", "--quiet", *arguments], check=True)
            complete.touch()
        with self.serve(self) as address:
            yield address

    def measure(self, workload: str, address: str, callers: int, seconds: float) -> dict[str, float]:
        command = [str(self.python), str(FOLDER / self.name / "load.py"), workload, f"--address={address}"]
        command += [f"--callers={callers}", f"--seconds={seconds}"]
        return timing.figures(command)


def _triton(peer: Peer) -> contextlib.AbstractContextManager[str]:
    """From the package that brings its binaries."""
    home = peer.site_packages / "pytriton" / "tritonserver"
    stub = home / "backends" / "python" / "triton_python_backend_stub"
    if not stub.exists():
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        # A link may be left that leads to where the environment was made.
        stub.unlink(missing_ok=True)
        stub.symlink_to(home / "python_backend_stubs" / version / stub.name)
    grpc_port, http_port, metrics_port = free_ports(3)
    command = [
        *(str(home / "bin" / "tritonserver"), f"--grpc-port={grpc_port}", f"--http-port={http_port}"),
        *(f"--metrics-port={metrics_port}", f"--backend-directory={home / 'backends'}"),
        f"--model-repository={FOLDER / 'triton'}",
    ]
    environment = {"SITE_PACKAGES": str(peer.site_packages)}
    return _process(command, peer, grpc_port, lambda: _is_ready(http_port), environment)


def _mlserver(peer: Peer) -> contextlib.AbstractContextManager[str]:
    grpc_port, http_port, metrics_port = free_ports(3)
    ports = {"GRPC_PORT": grpc_port, "HTTP_PORT": http_port, "METRICS_PORT": metrics_port}
    environment = {f"MLSERVER_{name}": str(port) for name, port in ports.items()} | {"BENCHMARKS": str(FOLDER)}
    command = [str(peer.environment / "bin" / "mlserver"), "start", str(FOLDER / "mlserver")]
    return _process(command, peer, grpc_port, lambda: _is_ready(http_port), environment)


def _tff(peer: Peer) -> contextlib.AbstractContextManager[str]:
    """The worker that TFF's own contexts start: its executor service, in C++."""
    (port,) = free_ports(1)
    worker = peer.site_packages / "tensorflow_federated" / "data" / "worker_binary"
    return _process([str(worker), f"--port={port}"], peer, port, lambda: _listens(port))


PEERS = {
    peer.name: peer
    for peer in (
        Peer("triton", "Triton", (("nvidia-pytriton", "tritonclient[grpc]"),), _triton),
        Peer("mlserver", "MLServer", (("mlserver",),), _mlserver),
        Peer(
            "tff",
            "TFF",
            (
                ("-r", str(REQUIREMENTS / "tff-0.87.txt")),
                ("--no-deps", "-r", str(REQUIREMENTS / "tff-0.87-no-deps.txt")),
            ),
            _tff,
        ),
    )
}


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        taken = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [one.getsockname()[1] for one in taken]


@contextlib.contextmanager
def _process(
    command: list[str], peer: Peer, port: int, is_ready: Callable[[], bool], environment: dict[str, str] | None = None
) -> Iterator[str]:
    """Runs a server until it is left, and gives the address of `port`, once it is ready."""
    process = subprocess.Popen(
        command,
        # Some write files where they are started.
        cwd=peer.environment,
        env={**os.environ, **(environment or {})},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        # Some have processes of their own, which would outlive them.
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + START_S
        while not is_ready():
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"{peer.title} does not start: {' '.join(command)}")
            time.sleep(0.2)
        yield f"127.0.0.1:{port}"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


def _is_ready(http_port: int) -> bool:
    """Whether a server of the Open Inference Protocol has loaded its model."""
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{http_port}/v2/models/mlp/ready", timeout=5).close()
    except OSError:
        return False
    return True
