"""Many calls over one stream."""

from __future__ import annotations

import asyncio
import concurrent.futures
import itertools
import threading
import time

import grpc
import numpy as np
import pytest

import forwardpass_client
from forwardpass import v1
from forwardpass.wire.methods import METHODS
from forwardpass_client import errors
from forwardpass_client.batches_in_flight import BatchesInFlight
from forwardpass_client.deadlines import Deadline
from support import zoo
from support.servers import ServerProcess


@pytest.fixture
def linear(client):
    return client.model("linear_regression")


def expected(model, x):
    (kernel, bias), _ = model.initial_weights
    return (x @ kernel[0] + bias[0])[:, None]


def inputs(count: int, examples: int = 2) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal((examples, 3)).astype(np.float32) for _ in range(count)]


def test_calls_that_need_not_be_exact_allow_rounding(linear):
    handle, x = linear.put_weights(linear.initial_weights), inputs(1)[0]
    for exact in (True, False):
        calls = {
            v1.PredictOnBatchRequest: linear._calls.predict_on_batch(handle, x, False, exact),
            v1.ForwardPassRequest: linear._calls.forward_pass(handle, (x, np.zeros((2, 1), np.float32)), False, exact),
        }
        for kind, call in calls.items():
            assert kind.FromString(call.request).allow_rounding is not exact
        flying = BatchesInFlight(linear._calls, [], False, not exact, None, Deadline(None))
        assert v1.EvaluateRequest.FromString(flying.next_message()).start.allow_rounding is not exact


def test_every_call_gets_its_own_answer(linear):
    xs = inputs(2000)
    with linear.pipeline(linear.initial_weights) as pipeline:
        futures = [pipeline.predict_on_batch(x, training=False) for x in xs]
        for future, x in zip(futures, xs, strict=True):
            assert np.allclose(future.result(), expected(linear, x), rtol=0, atol=1e-5)


def test_a_pipeline_accepts_forward_passes(client):
    model = client.model("keras_cnn")
    x, y = zoo.keras_batch(5)
    with model.pipeline(model.put_weights(model.initial_weights)) as pipeline:
        for training in (True, False):
            found = pipeline.forward_pass((x, y), training).result()
            zoo.assert_equal(found, model.forward_pass(model.initial_weights, (x, y), training), atol=2e-6)


def test_many_threads_may_share_a_pipeline(linear):
    with linear.pipeline(linear.initial_weights) as pipeline, concurrent.futures.ThreadPoolExecutor(8) as pool:

        def call(x) -> bool:
            return bool(np.allclose(pipeline.predict_on_batch(x).result(), expected(linear, x), rtol=0, atol=1e-5))

        assert all(pool.map(call, inputs(500)))


def test_predict_many_gives_predictions_in_order(linear, server):
    xs = inputs(700)
    found = list(linear.predict_many(linear.initial_weights, iter(xs), training=False))
    assert all(np.allclose(one, expected(linear, x), rtol=0, atol=1e-5) for one, x in zip(found, xs, strict=True))

    async def run() -> None:
        async with forwardpass_client.connect_async(server.address) as client:
            model = await client.model("linear_regression")
            weights = await model.initial_weights
            found = [one async for one in model.predict_many(weights, xs, training=False)]
            for one, x in zip(found, xs, strict=True):
                assert np.allclose(one, expected(linear, x), rtol=0, atol=1e-5)

    asyncio.run(run())


def shifted(linear, by: float):
    (kernel, bias), _ = linear.initial_weights
    return [kernel, bias + np.float32(by)], ()


def test_predict_each_gives_the_predictions_under_each_weights_in_order(linear, server):
    sets = [shifted(linear, by) for by in range(20)]
    handles = [linear.put_weights(one) for one in sets]
    xs = inputs(700)
    # By value and by id in turn.
    pairs = [(handles[index % 20] if index % 3 else sets[index % 20], x) for index, x in enumerate(xs)]

    def check(found) -> None:
        assert len(found) == len(xs)
        for index, (one, x) in enumerate(zip(found, xs, strict=True)):
            assert np.allclose(one, expected(linear, x) + index % 20, rtol=0, atol=1e-5)

    check(list(linear.predict_each(iter(pairs), training=False)))

    async def run() -> None:
        async with forwardpass_client.connect_async(server.address) as client:
            model = await client.model("linear_regression")

            async def one_by_one():
                for pair in pairs:
                    yield pair

            check([one async for one in model.predict_each(pairs, training=False)])
            check([one async for one in model.predict_each(one_by_one(), training=False)])

    asyncio.run(run())


def test_an_error_of_one_pair_names_it_and_comes_after_the_results_before_it(linear, server):
    handle, unknown = linear.put_weights(linear.initial_weights), linear.weights_handle("12" * 32)
    good = handle, inputs(1)[0]
    lists = {
        errors.ShapeMismatch: (handle, np.zeros((2, 4), np.float32)),
        errors.WeightsNotFound: (unknown, good[1]),
        TypeError: [handle, good[1]],
    }

    def check(found, error, kind) -> None:
        assert len(found) == 3, error
        assert str(error).startswith("pairs[3]: ")
        if isinstance(error, errors.ForwardPassError):
            assert error.place.startswith("pairs[3]")
        assert type(error) is kind

    for kind, bad in lists.items():
        results = linear.predict_each([good, good, good, bad, good])
        found = list(itertools.islice(results, 3))
        with pytest.raises(kind) as caught:
            next(results)
        check(found, caught.value, kind)

    async def run() -> None:
        async with forwardpass_client.connect_async(server.address) as client:
            model = await client.model("linear_regression")
            for kind, bad in lists.items():
                results = model.predict_each([good, good, good, bad, good])
                found = [await anext(results) for _ in range(3)]
                with pytest.raises(kind) as caught:
                    await anext(results)
                check(found, caught.value, kind)

    asyncio.run(run())


def test_a_pipeline_without_weights_takes_them_with_each_call(linear, server):
    x, handles = inputs(1)[0], [linear.put_weights(shifted(linear, by)) for by in (1, 2)]
    with linear.pipeline() as pipeline:
        futures = [pipeline.predict_on_batch(handle, x, training=False) for handle in handles]
        by_value = pipeline.predict_on_batch(linear.initial_weights, x, training=False)
        for by, future in zip((1, 2, 0), (*futures, by_value), strict=True):
            assert np.allclose(future.result(), expected(linear, x) + by, rtol=0, atol=1e-5)
        with pytest.raises(TypeError, match="missing 1 required positional argument: 'x'"):
            pipeline.predict_on_batch(x)
        with pytest.raises(errors.ShapeMismatch, match="x: expected"):
            pipeline.predict_on_batch(x, False)
        with pytest.raises(errors.StructureMismatch, match="model_weights"):
            pipeline.predict_on_batch(x, x)
    with pytest.raises(errors.StructureMismatch, match="model_weights"):
        linear.pipeline(None)

    async def run() -> None:
        async with forwardpass_client.connect_async(server.address) as client:
            model = await client.model("linear_regression")
            async with model.pipeline() as pipeline:
                for by, handle in enumerate(handles, 1):
                    found = await pipeline.predict_on_batch(handle, x, training=False)
                    assert np.allclose(found, expected(linear, x) + by, rtol=0, atol=1e-5)
            with pytest.raises(errors.StructureMismatch, match="model_weights"):
                await model.pipeline(model_weights=None)

    asyncio.run(run())


def test_batches_are_read_only_as_answers_arrive(linear):
    taken = []

    def batches():
        for x in inputs(5000):
            taken.append(1)
            yield x

    found = linear.predict_many(linear.initial_weights, batches())
    next(found)
    assert len(taken) < 1000
    found.close()


def test_the_async_pipeline_answers_many_callers(server):
    async def run() -> None:
        async with forwardpass_client.connect_async(server.address) as client:
            model = await client.model("linear_regression")
            (kernel, bias), _ = weights = await model.initial_weights
            async with await model.pipeline(weights) as pipeline:

                async def call(x) -> None:
                    found = await pipeline.predict_on_batch(x, training=False)
                    assert np.allclose(found, (x @ kernel[0] + bias[0])[:, None], rtol=0, atol=1e-5)

                await asyncio.gather(*map(call, inputs(2000)))

    asyncio.run(run())


def test_errors_are_raised_by_the_call_that_caused_them(client):
    model = client.model("keras_cnn")
    x, y = zoo.keras_batch(4)
    with model.pipeline(model.initial_weights) as pipeline:
        with pytest.raises(errors.ShapeMismatch, match=r"batch_input\.x"):
            pipeline.forward_pass((x[0], y))
        good, bad = pipeline.forward_pass((x, y)), pipeline.forward_pass((x, y + 77))
        with pytest.raises(errors.ModelRefusedInput, match="Received a label value of #"):
            bad.result()
        assert good.result().num_examples == 4
    with pytest.raises(errors.CallCancelled, match="the pipeline is closed"):
        pipeline.forward_pass((x, y))


def test_weights_that_the_server_lacks_are_sent_once_for_all_calls(linear, server):
    handle = linear.put_weights(([linear.initial_weights[0][0] + 1, linear.initial_weights[0][1]], ()))
    handle.delete()
    upload = 'grpc_server_started_total{grpc_method="UploadTensors",'
    upload += 'grpc_service="forwardpass.v1.WeightsService",grpc_type="client_stream"}'
    before = server.metrics().get(upload, 0)
    with linear.pipeline(handle) as pipeline:
        futures = [pipeline.predict_on_batch(x) for x in inputs(100)]
        assert all(future.result().shape == (2, 1) for future in futures)
    assert server.metrics()[upload] - before == 1
    handle.delete()
    with linear.pipeline(linear.weights_handle(handle.id)) as pipeline:
        with pytest.raises(errors.WeightsNotFound):
            pipeline.predict_on_batch(inputs(1)[0]).result()


SLOW = ("--factory", "slow=support.zoo:slow")


def test_each_call_has_a_deadline_of_its_own():
    with ServerProcess(*SLOW) as server, forwardpass_client.connect(server.address) as client:
        model = client.model("slow")
        with model.pipeline(((), ())) as pipeline:
            long = pipeline.predict_on_batch([10**8], timeout_s=0.5)
            short = pipeline.predict_on_batch([1])
            assert short.result().tolist() == [1]
            started = time.monotonic()
            with pytest.raises(errors.DeadlineExceeded):
                long.result()
            assert time.monotonic() - started < 20
            assert pipeline.predict_on_batch([2]).result().tolist() == [2]


def test_a_long_call_does_not_delay_later_calls():
    with ServerProcess(*SLOW) as server, forwardpass_client.connect(server.address) as client:
        model = client.model("slow")
        with model.pipeline(((), ())) as pipeline:
            order = []
            long = pipeline.predict_on_batch([300_000])
            long.add_done_callback(lambda _: order.append("long"))
            short = pipeline.predict_on_batch([1])
            short.add_done_callback(lambda _: order.append("short"))
            assert (long.result().tolist(), short.result().tolist()) == ([300_000], [1])
            assert order == ["short", "long"]


def test_calls_of_many_megabytes_are_sent_in_pieces(linear):
    large = np.random.default_rng(0).standard_normal((2_000_000, 3)).astype(np.float32)
    small = inputs(1)[0]
    with linear.pipeline(linear.initial_weights) as pipeline:
        futures = [pipeline.predict_on_batch(x, training=False) for x in (large, small, large[::-1])]
        for future, x in zip(futures, (large, small, large[::-1]), strict=True):
            assert np.allclose(future.result(), expected(linear, x), rtol=0, atol=1e-5)


def test_a_long_call_is_answered_by_either_client(linear, server):
    large = np.random.default_rng(0).standard_normal((1_000_000, 3)).astype(np.float32)
    weights = linear.initial_weights
    found = linear.predict_on_batch(weights, large, training=False)
    assert np.allclose(found, expected(linear, large), rtol=0, atol=1e-5)
    with pytest.raises(errors.DeadlineExceeded):
        linear.predict_on_batch(weights, large, timeout_s=1e-4)

    async def run() -> None:
        async with forwardpass_client.connect_async(server.address) as client:
            model = await client.model("linear_regression")
            x = large.copy()
            call = model.predict_on_batch(weights, x, training=False)
            # What is not awaited yet is made of what the arrays held then.
            x[:] = 0
            assert np.array_equal(await call, found)
            with pytest.raises(errors.WeightsNotFound):
                await model.predict_on_batch(model.weights_handle("12" * 32), large)

    asyncio.run(run())


def free_port() -> int:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_pipeline_continues_after_its_server_is_killed_and_restarted(repository, tmp_path, kind):
    port = free_port()
    (tmp_path / "linear_regression").symlink_to(repository / "linear_regression")
    arguments = ("--model-repository", str(tmp_path))
    first = ServerProcess(*arguments, port=port)
    second: list[ServerProcess] = []
    xs = inputs(4000)

    def restart() -> None:
        first.process.kill()
        first.process.wait()
        second.append(ServerProcess(*arguments, port=port))

    restarting = threading.Timer(0.2, restart)
    try:
        if kind == "sync":
            with forwardpass_client.connect(first.address) as client:
                model = client.model("linear_regression")
                weights = model.initial_weights
                restarting.start()
                found = run_until(lambda: list(model.predict_many(weights, xs)), second)
        else:

            async def run():
                async with forwardpass_client.connect_async(first.address) as client:
                    model = await client.model("linear_regression")
                    weights = await model.initial_weights
                    restarting.start()
                    while True:
                        found = [one async for one in model.predict_many(weights, xs)]
                        if second:
                            return weights, found

            weights, found = asyncio.run(run())
        (kernel, bias), _ = weights
        for one, x in zip(found, xs, strict=True):
            assert np.allclose(one, (x @ kernel[0] + bias[0])[:, None], rtol=0, atol=1e-5)
    finally:
        restarting.join()
        for server in (first, *second):
            server.__exit__()


def run_until(work, done):
    while True:
        found = work()
        if done:
            return found


def test_calls_without_an_answer_fail_when_the_server_stays_unavailable():
    with ServerProcess(*SLOW) as server, forwardpass_client.connect(server.address) as client:
        model = client.model("slow")
        with model.pipeline(((), ())) as pipeline:
            assert pipeline.predict_on_batch([1]).result().tolist() == [1]
            server.process.kill()
            server.process.wait()
            with pytest.raises(errors.DeadlineExceeded, match="The last attempt failed with ServerUnavailable: "):
                pipeline.predict_on_batch([1], timeout_s=2).result(60)
            with pytest.raises(errors.ServerUnavailable):
                pipeline.predict_on_batch([1]).result(60)


def test_an_error_in_the_block_cancels_calls_without_an_answer():
    with ServerProcess(*SLOW) as server, forwardpass_client.connect(server.address) as client:
        model = client.model("slow")
        futures = []

        def leave() -> None:
            with model.pipeline(((), ())) as pipeline:
                futures.append(pipeline.predict_on_batch([10**8]))
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            leave()
        with pytest.raises(errors.CallCancelled):
            futures[0].result(10)
        # The server has given it up too.
        assert model.predict_on_batch(((), ()), [1]).tolist() == [1]


def test_an_error_in_the_block_does_not_wait_for_answers():
    with ServerProcess(*SLOW) as server, forwardpass_client.connect(server.address) as client:
        model = client.model("slow")

        def leave() -> None:
            with model.pipeline(((), ())) as pipeline:
                pipeline.predict_on_batch([10**9])
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            leave()
        # The server would compute for hours.
        assert client.is_ready()


def test_a_callback_may_submit_more_calls_than_the_pipeline_has_room_for():
    with ServerProcess(*SLOW) as server, forwardpass_client.connect(server.address) as client:
        model = client.model("slow")
        done = []
        with model.pipeline(((), ())) as pipeline:

            def again(_) -> None:
                for _ in range(2):
                    pipeline.predict_on_batch([1]).add_done_callback(lambda _: done.append(1))

            for _ in range(300):
                pipeline.predict_on_batch([1]).add_done_callback(again)
            deadline = time.monotonic() + 60
            while len(done) < 600:
                assert time.monotonic() < deadline
                time.sleep(0.01)


def test_a_task_that_is_cancelled_while_its_pipeline_closes_is_cancelled():
    with ServerProcess(*SLOW) as server:

        async def run() -> None:
            async with forwardpass_client.connect_async(server.address) as client:
                model = await client.model("slow")
                submitted = asyncio.get_running_loop().create_future()

                async def use() -> None:
                    async with await model.pipeline(((), ())) as pipeline:
                        submitted.set_result(pipeline.predict_on_batch([10**9]))

                task = asyncio.ensure_future(use())
                future = await submitted
                await asyncio.sleep(0.1)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                with pytest.raises(errors.CallCancelled):
                    await future

        asyncio.run(run())


def test_a_deadline_applies_to_calls_that_wait_for_room():
    with ServerProcess(*SLOW) as server:

        async def run() -> None:
            async with forwardpass_client.connect_async(server.address) as client:
                model = await client.model("slow")
                async with await model.pipeline(((), ())) as pipeline:
                    started = time.monotonic()
                    futures = [pipeline.predict_on_batch([10**9], timeout_s=0.5) for _ in range(600)]
                    found = await asyncio.gather(*futures, return_exceptions=True)
                    assert all(isinstance(one, errors.DeadlineExceeded) for one in found)
                    # One after another they would take three times as long.
                    assert time.monotonic() - started < 1.4

        asyncio.run(run())


def test_few_answers_are_computed_for_a_caller_that_does_not_read_them(repository):
    with ServerProcess("--factory", "wide_24m=support.zoo:wide_24m") as server:
        request = v1.GetInitialWeightsRequest(model=v1.ModelSelector(name="wide_24m")).SerializeToString()
        many = v1.PipelineRequest(frames=[frame(call, "GetInitialWeights", request) for call in range(1, 401)])
        before = server.resident_bytes()
        with grpc.insecure_channel(server.address) as channel:
            responses = channel.stream_stream(METHODS["Pipeline"].path)(iter([many.SerializeToString()]))
            with forwardpass_client.connect(server.address) as client:
                for _ in range(20):
                    assert client.is_ready()
                    time.sleep(0.05)
            # 400 answers of 24 MiB would be ten gigabytes.
            assert server.resident_bytes() - before < 500 * 2**20
            responses.cancel()


def test_a_pipeline_that_is_never_used_is_closed_at_once(linear):
    with linear.pipeline(linear.initial_weights):
        pass


def stream(server, *requests: v1.PipelineRequest) -> list[v1.AnswerFrame]:
    with grpc.insecure_channel(server.address) as channel:
        responses = channel.stream_stream(METHODS["Pipeline"].path)(
            iter([one if isinstance(one, bytes) else one.SerializeToString() for one in requests]), timeout=30
        )
        return [frame for one in responses for frame in v1.PipelineResponse.FromString(one).frames]


def frame(call: int, method: str = "ListModels", data: bytes = b"", **changes) -> v1.CallFrame:
    return v1.CallFrame(**{"call": call, "method": method, "size_bytes": len(data), "data": data, **changes})


def test_any_protobuf_client_can_use_a_pipeline(server):
    request = v1.GetModelRequest(model=v1.ModelSelector(name="no_metrics")).SerializeToString()
    half = len(request) // 2
    answers = stream(
        server,
        v1.PipelineRequest(
            frames=[
                frame(1),
                frame(2, "GetModel", request[:half], size_bytes=len(request)),
                frame(3, "Nonsense"),
                frame(4, "Pipeline"),
                frame(5, "PredictOnBatch", b"\xff"),
                frame(6, size_bytes=2**40),
            ]
        ),
        v1.PipelineRequest(frames=[frame(2, "", request[half:])]),
    )
    found = {answer.call: answer for answer in answers}
    assert "no_metrics" in {model.name for model in v1.ListModelsResponse.FromString(found[1].data).models}
    assert v1.GetModelResponse.FromString(found[2].data).model.identity.name == "no_metrics"
    codes = {call: answer.status for call, answer in found.items()}
    names = {code.value[0]: code.name for code in grpc.StatusCode}
    assert {call: names[code] for call, code in codes.items()} == {
        1: "OK",
        2: "OK",
        3: "UNIMPLEMENTED",
        4: "UNIMPLEMENTED",
        5: "INVALID_ARGUMENT",
        6: "RESOURCE_EXHAUSTED",
    }
    reasons = {call: v1.ErrorDetail.FromString(answer.error_detail).reason for call, answer in found.items()}
    assert reasons[3] == "MethodNotSupported"
    assert reasons[6] == "MessageTooLarge"


def test_garbage_on_a_stream_ends_the_stream_with_its_error(server):
    with pytest.raises(grpc.RpcError) as caught:
        stream(server, b"\xff\xfe")
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_the_server_answers_and_stops_normally_after_a_cancelled_stream():
    with ServerProcess(*SLOW) as server, grpc.insecure_channel(server.address) as channel:
        responses = channel.stream_stream(METHODS["Pipeline"].path)(
            iter([v1.PipelineRequest(frames=[frame(1, data=b"x", size_bytes=2**20)]).SerializeToString()])
        )
        responses.cancel()
        with forwardpass_client.connect(server.address) as client:
            assert client.model("slow").predict_on_batch(((), ()), [1]).tolist() == [1]
        assert server.terminate() == 0


def test_calls_on_a_pipeline_are_counted_by_method_and_code():
    with ServerProcess(*SLOW) as server:
        before = {name for name in server.metrics() if name.startswith("forwardpass_pipeline_call")}
        assert before == set()
        with forwardpass_client.connect(server.address) as client:
            model = client.model("slow")
            with model.pipeline(((), ())) as pipeline:
                for _ in range(3):
                    pipeline.predict_on_batch([1]).result()
                with pytest.raises(errors.DeadlineExceeded):
                    pipeline.predict_on_batch([10**8], timeout_s=0.5).result()
        stream(server, v1.PipelineRequest(frames=[frame(1, "MadeUp"), frame(2, "MadeUpToo"), frame(3, "GetModel")]))
        with grpc.insecure_channel(server.address) as channel:
            request = v1.PipelineRequest(frames=[frame(1), frame(2, size_bytes=2**40)])
            answers = channel.stream_stream(METHODS["Pipeline"].path)(iter([request.SerializeToString()]), timeout=30)
            assert len([one for answer in answers for one in v1.PipelineResponse.FromString(answer).frames]) == 2
        metrics = server.metrics()
        start = "forwardpass_pipeline_calls_total"
        assert {name.removeprefix(start): count for name, count in metrics.items() if name.startswith(start)} == {
            '{code="OK",method="PredictOnBatch"}': 3,
            '{code="DeadlineExceeded",method="PredictOnBatch"}': 1,
            '{code="Unimplemented",method="unknown"}': 2,
            '{code="NotFound",method="GetModel"}': 1,
            '{code="OK",method="ListModels"}': 1,
            '{code="ResourceExhausted",method="ListModels"}': 1,
        }
        seconds = 'forwardpass_pipeline_call_seconds_{}{{method="PredictOnBatch"}}'
        assert metrics[seconds.format("count")] == 4
        assert metrics[seconds.format("sum")] >= 0.5


def test_calls_whose_caller_disconnects_are_counted_as_cancelled():
    with ServerProcess(*SLOW) as server:
        left = 'forwardpass_pipeline_calls_total{code="Canceled",method="PredictOnBatch"}'
        with forwardpass_client.connect(server.address) as client:
            model = client.model("slow")

            def leave() -> None:
                with model.pipeline(((), ())) as pipeline:
                    pipeline.predict_on_batch([10**9])
                    # What is answered behind it shows that it has come.
                    pipeline.predict_on_batch([]).result()
                    raise ZeroDivisionError

            with pytest.raises(ZeroDivisionError):
                leave()
            deadline = time.monotonic() + 60
            while server.metrics().get(left) != 1:
                assert time.monotonic() < deadline
                time.sleep(0.01)
