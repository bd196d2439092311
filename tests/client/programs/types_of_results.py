"""What mypy knows of the SDK's results: `test_types.py` compares it with the comment behind each `reveal_type`.

Never run: mypy reads it.
"""

import forwardpass_client
from forwardpass_client import BatchOutput


def call(client: forwardpass_client.Client) -> None:
    model = client.model("digits")
    reveal_type(model)  # RemoteFunctionalModel
    reveal_type(client.models())  # list[ModelVersion]
    reveal_type(client.is_ready())  # bool
    reveal_type(client.is_serving("model/digits"))  # bool
    reveal_type(client.unready_reasons())  # list[str]
    reveal_type(model.initial_weights)  # tuple[Any, Any]
    output = model.forward_pass(model.initial_weights, ([1.0], [1]), training=False, timeout_s=1)
    reveal_type(output)  # BatchOutput
    reveal_type(model.predict_on_batch(model.initial_weights, [1.0]))  # Any
    state = model.update_metrics_state(model.initialize_metrics_state(), [1], output)
    reveal_type(model.finalize_metrics(state))  # Mapping[str, ndarray[Any, Any]]
    handle = model.put_weights(model.initial_weights, progress=lambda done, total: None)
    reveal_type(handle)  # WeightsHandle
    reveal_type(handle.id)  # str
    reveal_type(model.get_weights(handle))  # tuple[Any, Any]
    reveal_type(model.evaluate(handle, [([1.0], [1])]))  # Mapping[str, ndarray[Any, Any]]
    reveal_type(model.evaluate_many([handle], [([1.0], [1])]))  # list[Mapping[str, ndarray[Any, Any]]]
    handle.lease(1.0)
    with model.pipeline(handle) as pipeline:
        reveal_type(pipeline)  # Pipeline
        reveal_type(pipeline.forward_pass(([1.0], [1])))  # Future[BatchOutput]
        reveal_type(pipeline.predict_on_batch([1.0]).result())  # Any
    reveal_type(model.pipeline(model.initial_weights))  # Pipeline
    with model.pipeline() as many:
        reveal_type(many)  # MultiWeightsPipeline
        reveal_type(many.forward_pass(handle, ([1.0], [1]), exact=False))  # Future[BatchOutput]
        reveal_type(many.predict_on_batch(handle, [1.0]))  # Future[Any]
    reveal_type(model.predict_each([(handle, [1.0])], exact=False))  # Iterator[Any]
    with model.metrics_session() as session:
        reveal_type(session)  # MetricsSession
        reveal_type(session.forward_pass(handle, ([1.0], [1])))  # BatchOutput
        session.update([1], BatchOutput())
        reveal_type(session.result())  # Mapping[str, ndarray[Any, Any]]
    reveal_type(forwardpass_client.__version__)  # str


async def call_async(client: forwardpass_client.AsyncClient) -> None:
    model = await client.model("digits")
    reveal_type(model)  # AsyncRemoteFunctionalModel
    reveal_type(await client.models())  # list[ModelVersion]
    reveal_type(await client.is_ready())  # bool
    weights = await model.initial_weights
    reveal_type(weights)  # tuple[Any, Any]
    output = await model.forward_pass(weights, ([1.0], [1]))
    reveal_type(output)  # BatchOutput
    handle = await model.put_weights(weights)
    reveal_type(handle)  # AsyncWeightsHandle
    await handle.lease(1.0)
    reveal_type(await model.get_weights(handle))  # tuple[Any, Any]
    reveal_type(await model.evaluate(handle, [([1.0], [1])]))  # Mapping[str, ndarray[Any, Any]]
    reveal_type(await model.evaluate_many([handle], []))  # list[Mapping[str, ndarray[Any, Any]]]
    async with model.pipeline(handle) as pipeline:
        reveal_type(pipeline)  # AsyncPipeline
        reveal_type(pipeline.forward_pass(([1.0], [1])))  # Future[BatchOutput]
        reveal_type(await pipeline.forward_pass(([1.0], [1])))  # BatchOutput
    async with model.pipeline() as many:
        reveal_type(many)  # AsyncMultiWeightsPipeline
        reveal_type(await many.forward_pass(handle, ([1.0], [1])))  # BatchOutput
    reveal_type(model.predict_each([(handle, [1.0])]))  # AsyncIterator[Any]
    async with model.metrics_session() as session:
        reveal_type(session)  # AsyncMetricsSession
        reveal_type(await session.forward_pass(handle, ([1.0], [1])))  # BatchOutput
    reveal_type(await model.metrics_session())  # AsyncMetricsSession
