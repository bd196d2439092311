"""Transfers of weights to a server and back, as steps that the transport of threads or of asyncio carries out."""

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
from forwardpass_client.backoff import RETRYABLE, Backoff
from forwardpass_client.deadlines import Deadline

Progress = Callable[[int, int], None]
"""Is called with (bytes done, bytes in all), possibly from another thread."""

# What a broken connection, or another server behind the same address, looks like.
_BROKEN = (*RETRYABLE, errors.UploadOutOfStep)

# A transfer that is slower than this counts as stalled.
_LEAST_BYTES_PER_S = 2**20


@dataclasses.dataclass(frozen=True, slots=True)
class Unary:
    """One attempt of a call with one request and one response: the step's result.

    sticky: whether it goes to the sticky server; otherwise the next server in turn answers it.
    address: of the replica that it goes to instead; None for no certain one.
    timeout_s: of this attempt, within the deadline of the steps; None for no other limit.
    """

    path: str
    request: bytes | Pieces
    sticky: bool = True
    address: str | None = None
    timeout_s: float | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Send:
    """Many requests, one response: the step's result. address: see `Unary`."""

    path: str
    requests: Iterable[bytes]
    address: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Receive:
    """One request, many responses, each given to `take`. address: see `Unary`."""

    path: str
    request: bytes
    take: Callable[[bytes], None]
    address: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Exchange:
    """Many requests, many responses, each given to `take`: the step's result is the first that is not None.

    sticky: whether it needs what other calls left on the server. address: see `Unary`.
    """

    path: str
    requests: Iterator[bytes]
    take: Callable[[bytes], Any]
    sticky: bool
    address: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Pause:
    """A wait before the next attempt."""

    seconds: float


@dataclasses.dataclass(frozen=True, slots=True)
class Resolve:
    """Looks a name up: the step's result is a list of addresses such as "10.0.0.1:8500", sorted.

    Raises ServerUnavailable where the name cannot be looked up.
    """

    host: str
    port: int


Steps: TypeAlias = Generator[Any, Any, Any]
"""Yields steps, is sent their results or thrown their errors, and returns the result of them all.

Every step ends with the deadline of the call. The transport that carries out the steps has the deadline.
"""


def put(manifest: WeightsManifest, structure: Structure, deadline: Deadline, progress: Progress | None = None) -> Steps:
    """Puts a set of weights: sends only the tensors that the server lacks.

    An upload that breaks goes on where it stopped. deadline: a renewable one is renewed whenever fewer bytes are
    missing than before, for as long as these bytes take at 1 MiB/s.
    Raises WeightStoreFull, TensorCorrupted where the numbers are no longer those of the manifest, ServerUnavailable,
    UploadOutOfStep where for half a minute the server drops what it received, DeadlineExceeded.
    """
    request = v1.PutWeightsRequest(manifest=manifests.encode(manifest)).SerializeToString()
    leaves = {tensor.digest: index for index, tensor in enumerate(manifest.tensors)}
    retrying = _Retrying(deadline)
    has_sent = False
    while True:
        try:
            answer = yield Unary(METHODS["PutWeights"].path, request)
            missing = fields.parse(v1.PutWeightsResponse, answer).missing
            remaining = sum(manifest.distinct[one.digest].size_bytes - one.received_bytes for one in missing)
            if progress is not None:
                progress(manifest.size_bytes - remaining, manifest.size_bytes)
            if not missing:
                return
            is_progress = retrying.note(remaining)
            if has_sent and not is_progress:
                has_sent = False
                raise errors.UploadOutOfStep(
                    "the server has dropped the tensors that it had received: put the weights again"
                )
            sending = _Sending(manifest, structure, leaves, missing, progress)
            yield Send(METHODS["UploadTensors"].path, sending.requests())
            sending.check()
            has_sent = True
        except _BROKEN as error:
            yield Pause(retrying.pause_s(error))


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
        """Raises the error that `requests` ended with, such as one of `progress`."""
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
            # A tensor without elements is sent as one empty chunk.
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


def get(weights_id: bytes, deadline: Deadline, progress: Progress | None = None) -> Steps:
    """Fetches a set of weights: nested containers of read-only arrays.

    A download that breaks goes on where it stopped. deadline: as of `put`.
    Raises WeightsNotFound, ServerUnavailable, DeadlineExceeded, TensorCorrupted where the bytes do not have their hash.
    """
    retrying = _Retrying(deadline)
    request = v1.DescribeWeightsRequest(weights_id=weights_id).SerializeToString()
    answer = None
    while answer is None:
        try:
            answer = yield Unary(METHODS["DescribeWeights"].path, request)
        except RETRYABLE as error:
            yield Pause(retrying.pause_s(error))
    manifest = manifests.decode(fields.parse(v1.DescribeWeightsResponse, answer).manifest)
    arrays: dict[bytes, Array] = {}
    done = 0
    for index, tensor in enumerate(manifest.tensors):
        if tensor.digest not in arrays:
            receiving = _Receiving(tensor, done, manifest.size_bytes, progress)
            yield from _get_tensor(weights_id, index, receiving, deadline)
            arrays[tensor.digest] = receiving.array()
            done += tensor.size_bytes
    return manifest.tree.unflatten([arrays[tensor.digest] for tensor in manifest.tensors])


def _get_tensor(weights_id: bytes, index: int, receiving: _Receiving, deadline: Deadline) -> Steps:
    retrying = _Retrying(deadline)
    while receiving.missing:
        request = v1.DownloadTensorRequest(weights_id=weights_id, leaf=index, offset=receiving.received)
        retrying.note(receiving.missing)
        try:
            yield Receive(METHODS["DownloadTensor"].path, request.SerializeToString(), receiving.take)
        except _BROKEN as error:
            yield Pause(retrying.pause_s(error))


class _Receiving:
    """A tensor that is being received. done: bytes of the tensors before it; total: of all tensors."""

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
            raise errors.TensorCorrupted(
                place="tensor", expected=f"at most {self.missing} more bytes", found=f"{len(data)}"
            )
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


class _Retrying:
    """The backoff of a transfer: it begins anew, and renews the deadline, when fewer bytes are missing than ever."""

    def __init__(self, deadline: Deadline) -> None:
        self._deadline = deadline
        self._backoff = Backoff(deadline)
        self._least: int | None = None

    def note(self, remaining: int) -> bool:
        """Notes how many bytes are missing: whether that is fewer than ever."""
        if self._least is not None and remaining >= self._least:
            return False
        self._least = remaining
        self._backoff.reset()
        self._deadline.renew(remaining / _LEAST_BYTES_PER_S)
        return True

    def pause_s(self, error: errors.ForwardPassError) -> float:
        """See `Backoff.pause_s`."""
        return self._backoff.pause_s(error)
