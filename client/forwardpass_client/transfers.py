"""Weights on their way to a server and back: which calls in which order, for whoever makes them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np

from forwardpass import v1
from forwardpass.wire import chunks, errors, fields, manifests, tensors
from forwardpass.wire.chunks import Pieces
from forwardpass.wire.dtypes import Array
from forwardpass.wire.manifests import TensorManifest, WeightsManifest
from forwardpass.wire.methods import METHODS
from forwardpass.wire.structures import Structure
from forwardpass_client.patience import AWAY, PATIENCE_S, Patience, deadline_exceeded

Progress = Callable[[int, int], None]
"""Is told (bytes done, bytes in all), possibly from another thread."""

# A transfer goes on where it stopped when the connection comes back.
_FIRST_PAUSE_S = 0.2

# What a broken connection, or another server behind the same address, looks like.
_BROKEN = (*AWAY, errors.UploadOutOfStep)

# Slower than this a transfer is taken to have stopped.
_LEAST_BYTES_PER_S = 2**20


@dataclasses.dataclass(frozen=True, slots=True)
class Unary:
    """One request, one response: the step's result. timeout_s: None for the usual one.

    stays: whether it goes to the server that the client stays with; otherwise the next in turn may answer it.
    """

    path: str
    request: bytes | Pieces
    timeout_s: float | None = None
    stays: bool = True


@dataclasses.dataclass(frozen=True, slots=True)
class Send:
    """Many requests, one response: the step's result. timeout_s: None for the usual one."""

    path: str
    requests: Iterable[bytes]
    timeout_s: float


@dataclasses.dataclass(frozen=True, slots=True)
class Receive:
    """One request, many responses, each given to `take`."""

    path: str
    request: bytes
    take: Callable[[bytes], None]
    timeout_s: float


@dataclasses.dataclass(frozen=True, slots=True)
class Exchange:
    """Many requests, many responses, each given to `take`: the step's result is the first that is not None.

    stays: whether it needs what other calls left on the server.
    """

    path: str
    requests: Iterator[bytes]
    take: Callable[[bytes], Any]
    timeout_s: float | None
    stays: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Pause:
    """Nothing for a while."""

    seconds: float


Steps: TypeAlias = Generator[Any, Any, Any]
"""Yields steps, is sent their results or thrown their errors, and returns what comes of them all."""


def put(manifest: WeightsManifest, structure: Structure, progress: Progress | None = None) -> Steps:
    """Puts a set of weights, sending only the tensors that the server lacks.

    Raises WeightStoreFull, TensorCorrupted where the numbers are no longer those of the manifest, ServerUnavailable.
    """
    request = v1.PutWeightsRequest(manifest=manifests.encode(manifest)).SerializeToString()
    leaves = {tensor.digest: index for index, tensor in enumerate(manifest.tensors)}
    progressing = _Progressing()
    while True:
        try:
            answer = yield Unary(METHODS["PutWeights"].path, request)
            missing = fields.parse(v1.PutWeightsResponse, answer).missing
            remaining = sum(manifest.distinct[one.digest].size_bytes - one.received_bytes for one in missing)
            if progress is not None:
                progress(manifest.size_bytes - remaining, manifest.size_bytes)
            if not missing:
                return
            progressing.note(remaining)
            sending = _Sending(manifest, structure, leaves, missing, progress)
            yield Send(METHODS["UploadTensors"].path, sending.requests(), _timeout_s(remaining))
            sending.check()
        except errors.DeadlineExceeded as error:
            raise progressing.named(error) from None
        except _BROKEN as error:
            yield progressing.pause(error)


class _Sending:
    """The chunks of the tensors that a server lacks."""

    def __init__(
        self,
        manifest: WeightsManifest,
        structure: Structure,
        leaves: dict[bytes, int],
        missing: Sequence[v1.MissingTensor],
        progress: Progress | None,
    ) -> None:
        self._manifest = manifest
        self._structure = structure
        self._leaves = leaves
        self._missing = missing
        self._progress = progress
        self._error: BaseException | None = None

    def requests(self) -> Iterator[bytes]:
        """UploadTensorsRequest messages. gRPC asks for them on a thread of its own: see `check`."""
        try:
            yield from self._requests()
        except Exception as error:
            self._error = error

    def check(self) -> None:
        """Raises what went wrong while the requests were made."""
        if self._error is not None:
            raise self._error

    def _requests(self) -> Iterator[bytes]:
        sizes = self._manifest.distinct
        done = self._manifest.size_bytes - sum(
            sizes[one.digest].size_bytes - one.received_bytes for one in self._missing
        )
        for one in self._missing:
            data = self._elements(one.digest)[one.received_bytes :]
            header = v1.UploadTensorsRequest(digest=one.digest, offset=one.received_bytes)
            # A tensor without elements has a chunk too.
            for chunk in chunks.split([data]) if data else [[data]]:
                yield chunks.encode(header, chunk)
                sent = sum(map(len, chunk))
                header.offset += sent
                done += sent
                if self._progress is not None:
                    self._progress(done, self._manifest.size_bytes)

    def _elements(self, digest: bytes) -> memoryview:
        index = self._leaves[digest]
        tensor = self._manifest.tensors[index]
        return tensors.element_bytes(self._structure.leaves[index], tensor.spec.data_type)


def get(weights_id: bytes, progress: Progress | None = None) -> Steps:
    """Fetches a set of weights: nested containers of read-only arrays. Raises WeightsNotFound, ServerUnavailable."""
    request = v1.DescribeWeightsRequest(weights_id=weights_id)
    answer = yield Unary(METHODS["DescribeWeights"].path, request.SerializeToString())
    manifest = manifests.decode(fields.parse(v1.DescribeWeightsResponse, answer).manifest)
    arrays: dict[bytes, Array] = {}
    done = 0
    for index, tensor in enumerate(manifest.tensors):
        if tensor.digest not in arrays:
            receiving = _Receiving(tensor, done, manifest.size_bytes, progress)
            yield from _get_tensor(weights_id, index, receiving)
            arrays[tensor.digest] = receiving.array()
            done += tensor.size_bytes
    return manifest.tree.unflatten([arrays[tensor.digest] for tensor in manifest.tensors])


def _get_tensor(weights_id: bytes, index: int, receiving: _Receiving) -> Steps:
    progressing = _Progressing()
    while receiving.missing:
        request = v1.DownloadTensorRequest(weights_id=weights_id, leaf=index, offset=receiving.received)
        progressing.note(receiving.missing)
        try:
            yield Receive(
                METHODS["DownloadTensor"].path,
                request.SerializeToString(),
                receiving.take,
                _timeout_s(receiving.missing),
            )
        except errors.DeadlineExceeded as error:
            raise progressing.named(error) from None
        except _BROKEN as error:
            yield progressing.pause(error)


class _Receiving:
    """One tensor on its way. done: bytes of others that came before; total: of all."""

    def __init__(self, tensor: TensorManifest, done: int, total: int, progress: Progress | None) -> None:
        self._tensor = tensor
        self._done = done
        self._total = total
        self._progress = progress
        self._buffer = np.empty(tensor.size_bytes, np.uint8)
        self.received = 0

    @property
    def missing(self) -> int:
        return self._tensor.size_bytes - self.received

    def take(self, message: bytes) -> None:
        """A DownloadTensorResponse."""
        _, data = chunks.decode(v1.DownloadTensorResponse, message)
        if len(data) > self.missing:
            raise errors.TensorCorrupted(place="tensor", expected=f"{self.missing} bytes more", found=f"{len(data)}")
        self._buffer[self.received : self.received + len(data)] = np.frombuffer(data, np.uint8)
        self.received += len(data)
        if self._progress is not None:
            self._progress(self._done + self.received, self._total)

    def array(self) -> Array:
        """The tensor, verified by its hash."""
        hasher = manifests.hasher_of(self._tensor.spec)
        hasher.update(self._buffer.data)
        if hasher.digest() != self._tensor.digest:
            raise errors.TensorCorrupted(
                place="tensor", expected=f"the hash {self._tensor.digest.hex()}", found=hasher.hexdigest()
            )
        return self._tensor.decode(self._buffer, "tensor")


def _timeout_s(size_bytes: int) -> float:
    return PATIENCE_S + size_bytes / _LEAST_BYTES_PER_S


class _Progressing:
    """The patience of a transfer: renewed when fewer bytes are missing than ever."""

    def __init__(self) -> None:
        self._patience = Patience(_FIRST_PAUSE_S)
        self._least: int | None = None
        self._reason: Exception | None = None

    def note(self, remaining: int) -> None:
        """Takes note of how many bytes are still missing."""
        if self._least is None or remaining < self._least:
            self._least = remaining
            self._patience.renew()

    def pause(self, error: Exception) -> Pause:
        """What to do after a failure. Raises the error where it has been long enough."""
        self._reason = error
        pause_s = self._patience.pause_s()
        if pause_s is None:
            raise error
        return Pause(pause_s)

    def named(self, error: errors.DeadlineExceeded) -> errors.DeadlineExceeded:
        """The error of a deadline, with the reason of the last failure where there was one."""
        return error if self._reason is None else deadline_exceeded(self._reason)
