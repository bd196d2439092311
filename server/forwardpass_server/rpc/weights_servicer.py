"""The methods of WeightsService."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

from forwardpass import v1
from forwardpass.wire import chunks, errors, fields, limits, manifests
from forwardpass.wire.manifests import WeightsManifest
from forwardpass_server.access import principals
from forwardpass_server.calls.admission import Admission
from forwardpass_server.rpc.codec import Codec
from forwardpass_server.rpc.drain import Drain
from forwardpass_server.weights import combinations
from forwardpass_server.weights.combinations import Combinations, Term
from forwardpass_server.weights.store import WeightStore

_LEASE_ID_BYTES = 16

# About two hundred tensors and their tree, or three hundred terms of a combination.
_SMALL_BYTES = 2**14


class WeightsServicer:
    """Each method has the name of its RPC; it takes and returns bytes, or asynchronous iterators of them.

    drain: cancels uploads. Finishing them is useless: publishing the set takes another call, which a draining server
    refuses.
    """

    def __init__(
        self, store: WeightStore, sums: Combinations, codec: Codec, admission: Admission, drain: Drain
    ) -> None:
        self._store = store
        self._sums = sums
        self._admission = admission
        self._codec = codec
        self._drain = drain

    async def PutWeights(self, data: bytes, context: object) -> bytes:
        is_small = len(data) <= _SMALL_BYTES
        manifest = _decode(data) if is_small else await self._codec.offload(lambda: _decode(data))
        missing = await self._store.put(principals.current(), manifest)
        if len(missing) <= limits.SMALL_LEAVES:
            return _encode_missing(manifest, missing)
        return await self._codec.offload(lambda: _encode_missing(manifest, missing))

    async def UploadTensors(self, requests: AsyncIterator[bytes], context: object) -> bytes:
        await self._drain.until(self._upload(requests))
        return b""

    async def _upload(self, requests: AsyncIterator[bytes]) -> None:
        async for data in requests:
            header, chunk = chunks.decode(v1.UploadTensorsRequest, data)
            await self._store.upload(principals.current(), header.digest, header.offset, chunk)

    async def DescribeWeights(self, data: bytes, context: object) -> bytes:
        request = fields.parse(v1.DescribeWeightsRequest, data)
        async with self._store.use(principals.current(), request.weights_id) as weights:
            if len(weights.manifest.tensors) <= limits.SMALL_LEAVES:
                return _describe(weights.manifest)
            return await self._codec.offload(lambda: _describe(weights.manifest))

    async def DownloadTensor(self, data: bytes, context: object) -> AsyncIterator[bytes]:
        request = fields.parse(v1.DownloadTensorRequest, data)
        header = v1.DownloadTensorResponse()
        async with self._store.use(principals.current(), request.weights_id) as weights:
            async for chunk in self._store.read(weights, request.leaf, request.offset):
                yield chunks.encode(header, chunk)

    async def CombineWeights(self, data: bytes, context: object) -> bytes:
        principal = principals.current()
        with self._admission.admitted(principal, len(data)):
            is_small = len(data) <= _SMALL_BYTES
            request = _combination(data) if is_small else await self._codec.offload(lambda: _combination(data))
            weights_id = await self._sums.combine(principal, *request)
        return v1.CombineWeightsResponse(weights_id=weights_id).SerializeToString()

    async def LeaseWeights(self, data: bytes, context: object) -> bytes:
        request = fields.parse(v1.LeaseWeightsRequest, data)
        if len(request.lease_id) != _LEASE_ID_BYTES:
            raise errors.InvalidRequest(
                place="lease_id", expected=f"{_LEASE_ID_BYTES} bytes", found=f"{len(request.lease_id)}"
            )
        await self._store.lease(principals.current(), request.weights_id, request.lease_id, request.ttl_s)
        return b""

    async def DeleteWeights(self, data: bytes, context: object) -> bytes:
        request = fields.parse(v1.DeleteWeightsRequest, data)
        await self._store.delete(principals.current(), request.weights_id)
        return b""


def _decode(data: bytes) -> WeightsManifest:
    manifest = manifests.decode(fields.parse(v1.PutWeightsRequest, data).manifest)
    # Compute these cached properties here, on the codec's thread, instead of later on the event loop.
    _ = manifest.weights_id, manifest.size_bytes
    return manifest


def _combination(data: bytes) -> tuple[list[Term], bool, bool]:
    """The terms of a combination, `float64` and `integers_of_first`."""
    request = fields.parse(v1.CombineWeightsRequest, data)
    terms = [(term.weights_id, term.coefficient) for term in request.terms]
    combinations.check(terms)
    return terms, request.float64, request.integers_of_first


def _encode_missing(manifest: WeightsManifest, missing: Sequence[tuple[bytes, int]]) -> bytes:
    response = v1.PutWeightsResponse(weights_id=manifest.weights_id)
    for digest, received in missing:
        response.missing.add(digest=digest, received_bytes=received)
    return response.SerializeToString()


def _describe(manifest: WeightsManifest) -> bytes:
    return v1.DescribeWeightsResponse(manifest=manifests.encode(manifest)).SerializeToString()
