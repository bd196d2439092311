"""Weights that are sent once: put, named, leased, lost, sent again."""

from __future__ import annotations

import asyncio
import concurrent.futures
import pathlib
import signal
import subprocess
import sys
import textwrap
import time

import grpc
import numpy as np
import pytest

import forwardpass_client
from forwardpass import v1
from forwardpass.wire import chunks, errors, manifests
from forwardpass.wire.methods import METHODS
from support import zoo
from support.servers import ServerProcess

MIB = 2**20
WIDE = tuple(
    argument for size in ("4k", "1m", "24m") for argument in ("--factory", f"wide_{size}=support.zoo:wide_{size}")
)


@pytest.fixture(scope="module")
def wide_server():
    with ServerProcess(*WIDE, "--max-message-mib", "4") as server:
        yield server


@pytest.fixture
def wide(wide_server):
    with forwardpass_client.connect(wide_server.address) as client:
        yield client.model("wide_1m")


@pytest.fixture
def wider(wide_server):
    with forwardpass_client.connect(wide_server.address) as client:
        yield client.model("wide_24m")


def grown(server, before, name: str) -> float:
    return server.metrics().get(name, 0) - before.get(name, 0)


@pytest.mark.parametrize("name", ["keras_cnn", "structures", "every_dtype", "dict_inputs", "keras_cnn_emnist_head"])
def test_a_handle_gives_the_numbers_that_the_weights_give(client, name):
    model = client.model(name)
    weights = model.initial_weights
    handle = model.put_weights(weights)
    x = zoo.inputs(model, 5)
    for training in (True, False):
        expected = model.predict_on_batch(weights, x, training)
        found = model.predict_on_batch(handle, x, training)
        zoo.assert_equal(found, expected, atol=1e-6)
    zoo.assert_equal(model.get_weights(handle), weights)
    assert repr(handle) == f"<WeightsHandle {handle.id[:12]}>"


def test_the_id_is_a_hash_of_the_numbers(client):
    model = client.model("no_metrics")
    weights = model.initial_weights
    handle = model.put_weights(weights)
    again = model.put_weights([list(map(np.array, group)) for group in weights])
    assert handle.id == again.id == manifests_id(weights)
    changed = [np.array(leaf) for leaf in weights[0]]
    changed[0][0, 0] += 1
    assert model.put_weights((changed, weights[1])).id != handle.id


def manifests_id(weights) -> str:
    from forwardpass.wire.structures import Structure

    return manifests.of_structure(Structure.of(weights), "w").weights_id.hex()


def test_only_what_the_server_lacks_is_sent(client, server):
    model = client.model("keras_cnn")
    trainable, non_trainable = model.initial_weights
    model.put_weights((trainable, non_trainable))
    changed = (*trainable[:-1], trainable[-1] + 1)
    seen = []
    handle = model.put_weights((changed, non_trainable), progress=lambda done, total: seen.append((done, total)))
    total = sum(leaf.nbytes for leaf in (*changed, *non_trainable))
    # Equal tensors count once: batch normalisation starts with vectors of zeros and ones.
    assert seen[0][0] == seen[0][1] - changed[-1].nbytes
    assert seen[-1][0] == seen[-1][1] <= total
    x, _ = zoo.keras_batch(3)
    expected = model.predict_on_batch((changed, non_trainable), x, training=False)
    assert np.allclose(model.predict_on_batch(handle, x, training=False), expected, rtol=0, atol=1e-6)


def test_weights_above_the_message_limit_are_uploaded_and_downloaded(wider, wide_server):
    weights = zoo.wide_weights(24 * MIB, seed=1)
    up, down = [], []
    handle = wider.put_weights(weights, progress=lambda *state: up.append(state))
    x = np.ones((2, 4), np.float32)
    expected = np.float32(x.sum(1)) * weights[0][0].sum(dtype=np.float64)
    assert np.allclose(wider.predict_on_batch(handle, x), expected, rtol=1e-3)
    found = wider.get_weights(handle, progress=lambda *state: down.append(state))
    zoo.assert_equal(found, weights)
    for states in (up, down):
        done = [state[0] for state in states]
        assert done == sorted(done)
        assert states[-1] == (24 * MIB, 24 * MIB)
        assert len(states) > 5
    with pytest.raises(errors.MessageTooLarge):
        forwardpass_client.connect(wide_server.address, reuse_weights=False).model("wide_24m").predict_on_batch(
            weights, x
        )


def test_weights_that_the_server_dropped_are_sent_again_without_an_error(wide):
    weights = zoo.wide_weights(MIB, seed=2)
    handle = wide.put_weights(weights)
    x = np.ones((2, 4), np.float32)
    expected = wide.predict_on_batch(handle, x)
    handle.delete()
    assert np.array_equal(wide.predict_on_batch(handle, x), expected)
    handle.delete()
    handle.lease(5)
    handle.lease(0)
    handle.delete()
    nameless = wide.weights_handle(handle.id)
    for call in (
        lambda: wide.predict_on_batch(nameless, x),
        lambda: nameless.lease(5),
        lambda: wide.get_weights(nameless),
    ):
        with pytest.raises(errors.WeightsNotFound, match=handle.id):
            call()
    nameless.delete()


def test_arrays_that_were_changed_are_not_sent_under_their_old_id(wide):
    weights = zoo.wide_weights(MIB, seed=3)
    handle = wide.put_weights(weights)
    weights[0][0][0] += 1
    x = np.ones((1, 4), np.float32)
    wide.predict_on_batch(handle, x)
    handle.delete()
    with pytest.raises(errors.WeightsNotFound, match="their arrays were changed after put_weights"):
        wide.predict_on_batch(handle, x)


@pytest.mark.parametrize("wrong", ["", "12", "xyz", "0" * 63])
def test_an_invalid_weights_id_is_refused(wide, wrong):
    with pytest.raises(ValueError, match="weights_id: expected 64 hexadecimal digits"):
        wide.weights_handle(wrong)


@pytest.mark.parametrize("ttl_s", [-1, float("nan"), float("inf")])
def test_an_infinite_lease_is_refused(wide, ttl_s):
    with pytest.raises(ValueError, match="ttl_s: expected seconds >= 0"):
        wide.put_weights(zoo.wide_weights(MIB)).lease(ttl_s)


def test_the_async_client_puts_uses_leases_and_fetches_too(wide_server):
    async def run() -> None:
        async with forwardpass_client.connect_async(wide_server.address) as client:
            model = await client.model("wide_24m")
            weights = zoo.wide_weights(24 * MIB, seed=4)
            seen = []
            handle = await model.put_weights(weights, progress=lambda *state: seen.append(state))
            x = np.ones((2, 4), np.float32)
            expected = await model.predict_on_batch(handle, x)
            await handle.lease(10)
            await handle.delete()
            assert np.array_equal(await model.predict_on_batch(handle, x), expected)
            zoo.assert_equal(await model.get_weights(handle), weights)
            assert seen[-1] == (24 * MIB, 24 * MIB)
            with pytest.raises(errors.WeightsNotFound):
                await model.predict_on_batch(model.weights_handle("ab" * 32), x)

    asyncio.run(run())


def test_the_same_arrays_passed_again_are_sent_once():
    small, large = zoo.wide_weights(4096, seed=5), zoo.wide_weights(MIB, seed=6)
    x = np.ones((2, 4), np.float32)
    puts = 'grpc_server_handled_total{grpc_code="OK",grpc_method="UploadTensors",'
    puts += 'grpc_service="forwardpass.v1.WeightsService",grpc_type="client_stream"}'
    hits = 'forwardpass_weights_lookups_total{outcome="hit"}'
    with ServerProcess(*WIDE) as server, forwardpass_client.connect(server.address) as client:
        model = client.model("wide_1m")
        expected = [model.predict_on_batch(large, x) for _ in range(5)]
        assert all(np.array_equal(one, expected[0]) for one in expected)
        assert server.metrics()[puts] == 1
        assert server.metrics()[hits] == 4
        # Changed in place, they are other weights.
        large[0][0][:] = 1
        assert np.allclose(model.predict_on_batch(large, x), 4 * large[0][0].size, rtol=1e-3)
        for _ in range(3):
            client.model("wide_4k").predict_on_batch(small, x)
        assert server.metrics()["forwardpass_weights_sets"] == 1
        with forwardpass_client.connect(server.address, reuse_weights=False) as plain:
            for _ in range(3):
                plain.model("wide_1m").predict_on_batch(large, x)
        assert server.metrics()[hits] == 4


def test_weights_that_change_in_place_before_each_call_give_their_own_numbers(wide):
    weights = zoo.wide_weights(MIB, seed=7)
    x = np.ones((1, 4), np.float32)
    for step in range(8):
        weights[0][0][:] = step
        assert np.allclose(wide.predict_on_batch(weights, x), 4.0 * step * weights[0][0].size, rtol=1e-3)


def test_eight_clients_that_put_the_same_weights_at_once_store_them_once(wide_server):
    weights = zoo.wide_weights(24 * MIB, seed=8)
    before = wide_server.metrics()

    def put(_: int) -> str:
        with forwardpass_client.connect(wide_server.address) as client:
            return client.model("wide_24m").put_weights(weights).id

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(put, range(8)))) == 1
    assert grown(wide_server, before, "forwardpass_weights_sets") == 1
    assert grown(wide_server, before, "forwardpass_weights_bytes") == 24 * MIB


def test_weights_that_do_not_fit_are_refused_unless_others_can_be_evicted():
    with ServerProcess(*WIDE, "--weights-mib", "3") as server, forwardpass_client.connect(server.address) as client:
        assert any("weights: up to 3 MiB on CPU:0" in line for line in server.lines)
        model = client.model("wide_1m")
        first, second, third = (model_weights(seed) for seed in range(3))
        handles = [model.put_weights(weights) for weights in (first, second, third)]
        assert server.metrics()["forwardpass_weights_evictions_total"] == 0
        handles[0].lease(60)
        model.put_weights(model_weights(4))
        metrics = server.metrics()
        assert metrics["forwardpass_weights_evictions_total"] == 1
        assert metrics["forwardpass_weights_bytes"] == 3 * MIB
        with pytest.raises(errors.WeightsNotFound):
            model.predict_on_batch(model.weights_handle(handles[1].id), np.ones((1, 4)))
        for handle in handles:
            handle.lease(60)
        with pytest.raises(errors.WeightStoreFull, match="in use or under a lease"):
            model.put_weights(model_weights(5))
        with pytest.raises(errors.WeightStoreFull, match="expected at most 3145728 bytes"):
            client.model("wide_24m").put_weights(zoo.wide_weights(24 * MIB))


def model_weights(seed: int):
    return zoo.wide_weights(MIB, seed=seed)


def free_port() -> int:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


def test_an_upload_continues_after_its_server_is_killed():
    port = free_port()
    weights = zoo.wide_weights(24 * MIB, seed=9)
    servers = [ServerProcess(*WIDE, port=port)]
    killed = []

    def kill_in_the_middle(done: int, total: int) -> None:
        if not killed and done > total // 3:
            killed.append(done)
            servers[0].process.kill()
            servers[0].process.wait()

    with forwardpass_client.connect(servers[0].address) as client:
        model = client.model("wide_24m")
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            put = pool.submit(model.put_weights, weights, progress=kill_in_the_middle)
            while not killed:
                time.sleep(0.01)
            with ServerProcess(*WIDE, port=port) as again:
                handle = put.result(60)
                assert again.metrics()["forwardpass_weights_bytes"] == 24 * MIB
                zoo.assert_equal(model.get_weights(handle), weights)
    servers[0].__exit__()


def test_the_upload_of_a_killed_client_expires():
    script = """
        import os, signal, sys
        import forwardpass_client
        from support import zoo
        def die(done, total):
            if done > total // 2:
                os.kill(os.getpid(), signal.SIGKILL)
        with forwardpass_client.connect(sys.argv[1]) as client:
            client.model("wide_24m").put_weights(zoo.wide_weights(24 * 2**20), progress=die)
    """
    with ServerProcess(*WIDE, "--upload-expiry", "0.5") as server:
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(script), server.address], capture_output=True, check=False
        )
        assert done.returncode == -signal.SIGKILL
        assert server.metrics()["forwardpass_weights_bytes"] in (0, 24 * MIB)
        deadline = time.monotonic() + 20
        while server.metrics()["forwardpass_weights_bytes"]:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert server.metrics()["forwardpass_weights_sets"] == 0


def test_a_folder_of_weights_survives_kill_9(tmp_path):
    arguments = (*WIDE, "--weights-folder", str(tmp_path / "weights"), "--weights-mib", "2")
    weights = [zoo.wide_weights(MIB, seed=seed) for seed in range(4)]
    x = np.ones((1, 4), np.float32)
    with ServerProcess(*arguments) as server, forwardpass_client.connect(server.address) as client:
        assert any("kept in" in line for line in server.lines)
        model = client.model("wide_1m")
        ids = [model.put_weights(one).id for one in weights]
        expected = [model.predict_on_batch(model.weights_handle(one), x) for one in ids]
        server.process.kill()
    with ServerProcess(*arguments) as server, forwardpass_client.connect(server.address) as client:
        model = client.model("wide_1m")
        for one, result, held in zip(ids, expected, weights, strict=True):
            assert np.array_equal(model.predict_on_batch(model.weights_handle(one), x), result)
            zoo.assert_equal(model.get_weights(model.weights_handle(one)), held)
        assert server.metrics()["forwardpass_weights_bytes"] <= 2 * MIB


def test_metrics_show_the_contents_of_the_weights_folder(tmp_path):
    arguments = (*WIDE, "--weights-folder", str(tmp_path / "weights"), "--weights-disk-mib", "2")

    def on_disk(server) -> list[float]:
        metrics = server.metrics()
        return [metrics[f"forwardpass_weights_disk_{name}"] for name in ("sets", "bytes", "budget_bytes")]

    with ServerProcess(*arguments) as server, forwardpass_client.connect(server.address) as client:
        assert on_disk(server) == [0, 0, 2 * MIB]
        model = client.model("wide_1m")
        handles = [model.put_weights(zoo.wide_weights(MIB, seed=seed)) for seed in range(3)]
        # The third has taken the place of the first, which is on the device still.
        assert on_disk(server) == [2, 2 * MIB, 2 * MIB]
        assert server.metrics()["forwardpass_weights_sets"] == 3
        handles[2].delete()
        assert on_disk(server) == [1, MIB, 2 * MIB]
    with ServerProcess(*arguments) as server:
        assert on_disk(server) == [1, MIB, 2 * MIB]
        assert server.metrics()["forwardpass_weights_sets"] == 0


def test_an_upload_takes_no_more_memory_than_the_weights_and_some_chunks():
    size = 128 * MIB
    script = """
        import resource, sys
        import forwardpass_client
        from support import zoo
        weights = zoo.wide_weights(int(sys.argv[2]))
        with forwardpass_client.connect(sys.argv[1]) as client:
            model = client.model("wide_128m")
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            model.put_weights(weights)
            print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
    """
    with ServerProcess("--factory", "wide_128m=support.zoo:wide_128m", "--weights-mib", "1000") as server:
        before = server.resident_bytes()
        # From here on the peak is counted anew.
        pathlib.Path(f"/proc/{server.process.pid}/clear_refs").write_text("5")
        grown_bytes = int(
            subprocess.check_output([sys.executable, "-c", textwrap.dedent(script), server.address, str(size)])
        )
        # gRPC holds some chunks of 2 MiB on either side.
        assert grown_bytes < 64 * MIB
        assert peak_resident_bytes(server) - before < size + 64 * MIB


def peak_resident_bytes(server: ServerProcess) -> int:
    with open(f"/proc/{server.process.pid}/status") as file:
        return int(next(line.split()[1] for line in file if line.startswith("VmHWM"))) * 1024


def test_any_protobuf_client_can_put_weights(server):
    from forwardpass.v1 import service_pb2_grpc, weights_pb2_grpc

    numbers = np.arange(3, dtype=np.float32)
    leaf = v1.TreeDef(leaf=v1.TreeDef.Leaf())

    def group(count: int) -> v1.TreeDef:
        return v1.TreeDef(tuple=v1.TreeDef.Sequence(items=[leaf] * count))

    with grpc.insecure_channel(server.address) as channel:
        models = service_pb2_grpc.FunctionalModelServiceStub(channel)
        weights = models.GetInitialWeights(
            v1.GetInitialWeightsRequest(model=v1.ModelSelector(name="linear_regression"))
        ).model_weights
        kernel, bias = weights.trainable.leaves
        # Of other numbers than any other test puts.
        kernel.data, bias.data = np.float32([3.5, 4.5, 5.5]).tobytes(), np.float32([12.5]).tobytes()
        tensors = [
            v1.TensorManifest(
                digest=digest_of(one), spec=v1.TensorSpec(data_type=2, shape=one.shape), size_bytes=len(one.data)
            )
            for one in (kernel, bias)
        ]
        tree = v1.TreeDef(tuple=v1.TreeDef.Sequence(items=[weights.trainable.tree, weights.non_trainable.tree]))
        manifest = v1.WeightsManifest(tree=tree, tensors=tensors)
        store = weights_pb2_grpc.WeightsServiceStub(channel)
        put = store.PutWeights(v1.PutWeightsRequest(manifest=manifest))
        assert {one.digest for one in put.missing} == {digest_of(kernel), digest_of(bias)}
        store.UploadTensors(
            iter([v1.UploadTensorsRequest(digest=digest_of(one), data=one.data) for one in (kernel, bias)])
        )
        assert not store.PutWeights(v1.PutWeightsRequest(manifest=manifest)).missing
        x = v1.Structure(tree=leaf, leaves=[v1.Tensor(data_type=2, shape=[1, 3], data=numbers.tobytes())])
        answer = models.PredictOnBatch(
            v1.PredictOnBatchRequest(model=v1.ModelSelector(name="linear_regression"), weights_id=put.weights_id, x=x)
        )
        (found,) = np.frombuffer(answer.predictions.leaves[0].data, np.float32)
        k, b = (np.frombuffer(one.data, np.float32) for one in (kernel, bias))
        assert np.isclose(found, k @ numbers + b[0], rtol=1e-6)
        (described,) = [store.DescribeWeights(v1.DescribeWeightsRequest(weights_id=put.weights_id)).manifest]
        assert described == manifest
        pieces = store.DownloadTensor(v1.DownloadTensorRequest(weights_id=put.weights_id, leaf=0, offset=4))
        assert b"".join(piece.data for piece in pieces) == kernel.data[4:]


def digest_of(tensor: v1.Tensor) -> bytes:
    import hashlib
    import struct

    dims = struct.pack(f"<{len(tensor.shape)}q", *tensor.shape)
    head = b"forwardpass.tensor.v1\0" + bytes([tensor.data_type, len(tensor.shape)])
    return hashlib.sha256(head + dims + tensor.data).digest()


def test_an_interrupted_upload_stream_can_be_resumed(wide_server):
    weights = zoo.wide_weights(24 * MIB, seed=11)
    from forwardpass.wire.structures import Structure

    structure = Structure.of(weights)
    manifest = manifests.of_structure(structure, "w")
    (digest,) = manifest.distinct
    data = weights[0][0].view(np.uint8).data
    put = v1.PutWeightsRequest(manifest=manifests.encode(manifest)).SerializeToString()
    with grpc.insecure_channel(wide_server.address) as channel:

        def missing() -> dict[bytes, int]:
            response = v1.PutWeightsResponse.FromString(channel.unary_unary(METHODS["PutWeights"].path)(put))
            return {one.digest: one.received_bytes for one in response.missing}

        def send(start: int, end: int) -> None:
            header = v1.UploadTensorsRequest(digest=digest, offset=start)
            channel.stream_unary(METHODS["UploadTensors"].path)(iter([chunks.encode(header, [data[start:end]])]))

        assert missing() == {digest: 0}
        send(0, MIB)
        assert missing() == {digest: MIB}
        send(MIB, 2 * MIB)
        with forwardpass_client.connect(wide_server.address) as client:
            seen = []
            client.model("wide_24m").put_weights(weights, progress=lambda *state: seen.append(state))
        assert seen[0] == (2 * MIB, 24 * MIB)
        assert missing() == {}


def test_many_threads_put_and_use_weights_of_their_own(wide_server):
    with forwardpass_client.connect(wide_server.address) as client:
        model = client.model("wide_4k")

        def put_and_use(seed: int) -> bool:
            weights = zoo.wide_weights(4096, seed=seed)
            found = model.predict_on_batch(model.put_weights(weights), np.ones((1, 4), np.float32))
            # The server sums in another order.
            return bool(np.allclose(found, 4 * weights[0][0].sum(dtype=np.float64), rtol=1e-3, atol=1e-2))

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            assert all(pool.map(put_and_use, range(100, 140)))
