"""The SDK apart from the models it calls."""

from __future__ import annotations

import asyncio
import select
import socket
import subprocess
import sys
import textwrap
import time

import grpc
import numpy as np
import pytest

import forwardpass_client
from forwardpass import v1
from forwardpass.wire import description
from forwardpass_client import calls, errors


def python(script: str) -> str:
    return subprocess.check_output([sys.executable, "-c", textwrap.dedent(script)], text=True)


def test_the_sdk_imports_neither_tensorflow_nor_the_server():
    script = """
        import sys
        import forwardpass_client
        unwanted = ("tensorflow", "keras", "forwardpass_server", "click")
        print([name for name in sys.modules if name.split(".")[0] in unwanted])
    """
    assert python(script).strip() == "[]"


def test_the_sdk_works_without_ml_dtypes():
    script = """
        import sys
        sys.modules["ml_dtypes"] = None
        import numpy as np
        from forwardpass.wire import conform, dtypes, specs, structures
        assert not dtypes.HAS_NATIVE_BFLOAT16
        spec = specs.StructureSpec.of(specs.TensorSpec((None,), dtypes.BFLOAT16))
        sent = conform.conform([1.0, 1 + 2**-8, 1 + 3 * 2**-8, np.nan], spec, "x")
        pieces, _ = structures.encode(sent)
        data = b"".join(pieces)
        (back,) = structures.decode(data, 0, len(data)).leaves
        print(back.dtype, back.tolist(), data.hex()[-16:], back.flags.writeable)
    """
    # Rounded to nearest even: 1, 1, 1 + 2**-6.
    assert python(script).split(" ", 1) == ["float32", "[1.0, 1.0, 1.015625, nan] 803f803f823fc07f False\n"]


def test_the_library_is_silent():
    assert (
        python("import forwardpass_client, logging; print(logging.getLogger('forwardpass_client').handlers)") == "[]\n"
    )


def test_nothing_is_sent_before_the_first_call():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        with forwardpass_client.connect(f"127.0.0.1:{silent.getsockname()[1]}") as client:
            connecting, _, _ = select.select([silent], [], [], 0.3)
            assert connecting == []
            # The first call connects.
            with pytest.raises(errors.DeadlineExceeded):
                client.wait_until_ready(0.3)
            connecting, _, _ = select.select([silent], [], [], 10)
            assert connecting == [silent]


def test_an_unreachable_server_raises_server_unavailable():
    with forwardpass_client.connect("127.0.0.1:1") as client:
        with pytest.raises(errors.ServerUnavailable, match=r"127\.0\.0\.1:1"):
            client.models()
        with pytest.raises(
            errors.DeadlineExceeded, match=r"not ready within 0\.1 s; its last answer was Server"
        ) as caught:
            client.wait_until_ready(0.1)
        assert str(caught.value).count("not ready") == 1
    with forwardpass_client.connect("127.0.0.1:1", timeout_s=0.1) as client:
        with pytest.raises(errors.DeadlineExceeded, match=r"not ready within 0\.1 s"):
            client.wait_until_ready(None)

    async def run() -> None:
        async with forwardpass_client.connect_async("127.0.0.1:1") as client:
            with pytest.raises(errors.ServerUnavailable):
                await client.models()
            with pytest.raises(errors.DeadlineExceeded):
                await client.wait_until_ready(0.1)

    asyncio.run(run())


def test_a_name_that_is_not_a_string_is_refused(client):
    with pytest.raises(TypeError, match="name: expected a str, got int"):
        client.model(3)


def test_the_clients_timeout_applies_to_every_call_and_a_calls_own_overrides_it(server):
    with forwardpass_client.connect(server.address, timeout_s=0.3) as client:
        model = client.model("slow")
        with pytest.raises(errors.DeadlineExceeded):
            model.predict_on_batch(((), ()), [10**6])
        assert model.predict_on_batch(((), ()), [20_000], timeout_s=30).tolist() == [20_000]


def test_a_call_of_a_closed_client_raises_an_error_that_says_so(server):
    client = forwardpass_client.connect(server.address)
    model = client.model("no_metrics")
    client.close()
    for call in (client.models, lambda: model.predict_on_batch(model.initial_weights, np.zeros((1, 4), np.float32))):
        with pytest.raises(errors.CallCancelled, match="the client is closed"):
            call()

    async def call_closed() -> None:
        client = forwardpass_client.connect_async(server.address)
        await client.close()
        with pytest.raises(errors.CallCancelled, match="the client is closed"):
            await client.models()

    asyncio.run(call_closed())


def test_waiting_for_a_silent_server_ends_at_the_timeout():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        started = time.monotonic()
        with forwardpass_client.connect(address) as client, pytest.raises(errors.DeadlineExceeded, match="not ready"):
            client.wait_until_ready(0.3)
        # Far below the client's own deadline of a minute.
        assert time.monotonic() - started < 20


def test_errors_about_arguments_are_raised_by_the_async_call_itself(server):
    async def run() -> None:
        async with forwardpass_client.connect_async(server.address) as client:
            model = await client.model("slow")
            with pytest.raises(errors.ShapeMismatch):
                model.predict_on_batch(((), ()), [[1]])
            with pytest.raises(errors.DeadlineExceeded):
                await model.predict_on_batch(((), ()), [10**6], timeout_s=0.2)

    asyncio.run(run())


def test_an_answer_of_another_model_is_refused(client):
    model = client.model("no_metrics")
    reader = (
        calls.ModelCalls(model.description, 2**20, None).loss(np.zeros((1, 3), np.float32), np.int32([0]), None).read
    )
    other = v1.ModelIdentity(name="no_metrics", version=1, content_hash=b"other")
    with pytest.raises(
        errors.ModelChanged, match=r"expected model no_metrics/1 of content .*, got no_metrics/1 of 6f74686572"
    ):
        reader(v1.LossResponse(model=other).SerializeToString())


def test_the_input_spec_can_be_read_like_the_originals(client):
    x, y = client.model("dict_inputs").input_spec
    assert list(x) == ["dense", "cat"]
    assert x["dense"].shape == (None, 4)
    assert x["dense"].dtype == np.float32
    assert repr(y) == "TensorSpec(shape=(None, 1), dtype=float32)"


def test_the_repr_of_a_model_shows_its_identity(client):
    model = client.model("no_metrics")
    assert repr(model) == f"<RemoteFunctionalModel no_metrics/1 {model.content_hash[:12]}>"
    assert len(model.content_hash) == 64


def test_initial_weights_are_fetched_once(client):
    model = client.model("no_metrics")
    assert model.initial_weights is model.initial_weights


def test_initial_weights_are_fetched_once_by_the_async_client_too(server):
    async def fetch() -> bool:
        async with forwardpass_client.connect_async(server.address) as client:
            model = await client.model("no_metrics")
            return await model.initial_weights is await model.initial_weights

    assert asyncio.run(fetch())


def test_any_protobuf_client_can_read_what_the_server_writes(server):
    # A foreign client knows the .proto files and nothing of our codec.
    from forwardpass.v1 import service_pb2_grpc

    with grpc.insecure_channel(server.address) as channel:
        stub = service_pb2_grpc.FunctionalModelServiceStub(channel)
        selector = v1.ModelSelector(name="linear_regression")
        described = description.decode(stub.GetModel(v1.GetModelRequest(model=selector)).model)
        assert described.spec.x.leaves[0].shape == (None, 3)
        weights = stub.GetInitialWeights(v1.GetInitialWeightsRequest(model=selector)).model_weights
        leaf = v1.TreeDef(leaf=v1.TreeDef.Leaf())
        x = v1.Structure(
            tree=leaf, leaves=[v1.Tensor(data_type=2, shape=[1, 3], data=np.ones((1, 3), np.float32).tobytes())]
        )
        response = stub.PredictOnBatch(v1.PredictOnBatchRequest(model=selector, model_weights=weights, x=x))
    (tensor,) = response.predictions.leaves
    assert list(tensor.shape) == [1, 1]
    kernel, bias = (np.frombuffer(leaf.data, np.float32) for leaf in weights.trainable.leaves)
    assert np.allclose(np.frombuffer(tensor.data, np.float32), kernel.sum() + bias, rtol=1e-6)
