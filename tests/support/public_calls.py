"""Every public method of the SDK that calls a server, with a call of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

import forwardpass_client
from forwardpass_client import BatchOutput
from forwardpass_client.pipeline import AsyncMultiWeightsPipeline, AsyncPipeline, MultiWeightsPipeline, Pipeline

TIMEOUT_S = 1.0

PUBLIC = {
    "Client": (forwardpass_client.Client, forwardpass_client.AsyncClient),
    "Model": (forwardpass_client.RemoteFunctionalModel, forwardpass_client.AsyncRemoteFunctionalModel),
    "Handle": (forwardpass_client.WeightsHandle, forwardpass_client.AsyncWeightsHandle),
    "Session": (forwardpass_client.MetricsSession, forwardpass_client.AsyncMetricsSession),
    "Pipeline": (Pipeline, AsyncPipeline),
    "MultiWeightsPipeline": (MultiWeightsPipeline, AsyncMultiWeightsPipeline),
}

BATCH = np.arange(3, dtype=np.int32), np.full(3, 1, np.int64)


class World(NamedTuple):
    """What a call is made on. `handle`: of `weights`. `many`: a pipeline without weights.

    `more`: its timeout, where it is given with the call.
    """

    client: Any
    model: Any
    weights: Any
    handle: Any
    session: Any
    other: Any
    pipeline: Any
    many: Any
    state: Any
    more: dict[str, float]


class Row(NamedTuple):
    """call: makes the call, and returns its result or an awaitable. needs_weights: whether it fails without weights."""

    call: Callable[[World], Any]
    needs_weights: bool = False


def wait_until_ready(world: World) -> Any:
    return world.client.wait_until_ready(TIMEOUT_S)


CALLS: dict[str, Row] = {
    "Client.model": Row(lambda w: w.client.model("counting", **w.more)),
    "Client.models": Row(lambda w: w.client.models(**w.more)),
    "Client.is_ready": Row(lambda w: w.client.is_ready(**w.more)),
    "Client.unready_reasons": Row(lambda w: w.client.unready_reasons(**w.more)),
    "Client.is_serving": Row(lambda w: w.client.is_serving("model/counting", **w.more)),
    "Client.get_weights": Row(lambda w: w.client.get_weights(w.handle, **w.more)),
    "Client.combine": Row(lambda w: w.client.combine([(w.handle, 1.0)], **w.more), needs_weights=True),
    "Client.wait_until_ready": Row(wait_until_ready),
    "Model.initial_weights": Row(lambda w: w.model.initial_weights),
    "Model.forward_pass": Row(lambda w: w.model.forward_pass(w.handle, BATCH, **w.more), needs_weights=True),
    "Model.predict_on_batch": Row(lambda w: w.model.predict_on_batch(w.handle, BATCH[0], **w.more), needs_weights=True),
    "Model.forward_backward": Row(lambda w: w.model.forward_backward(w.handle, BATCH, **w.more), needs_weights=True),
    "Model.vjp": Row(lambda w: w.model.vjp(w.handle, BATCH[0], np.ones(3, np.float32), **w.more), needs_weights=True),
    "Model.loss": Row(lambda w: w.model.loss(np.float32([1]), np.int64([1]), **w.more)),
    "Model.initialize_metrics_state": Row(lambda w: w.model.initialize_metrics_state(**w.more)),
    "Model.update_metrics_state": Row(
        lambda w: w.model.update_metrics_state(w.state, BATCH[1], BatchOutput(), **w.more)
    ),
    "Model.finalize_metrics": Row(lambda w: w.model.finalize_metrics(w.state, **w.more)),
    "Model.put_weights": Row(lambda w: w.model.put_weights(w.weights, **w.more), needs_weights=True),
    "Model.get_weights": Row(lambda w: w.model.get_weights(w.handle, **w.more)),
    "Model.average": Row(lambda w: w.model.average([(w.handle, 3)], **w.more), needs_weights=True),
    "Model.metrics_session": Row(lambda w: w.model.metrics_session(**w.more)),
    "Model.evaluate": Row(lambda w: w.model.evaluate(w.handle, [BATCH] * 3, **w.more), needs_weights=True),
    "Model.evaluate_many": Row(
        lambda w: w.model.evaluate_many([w.handle], [BATCH], sessions=[w.session], **w.more), needs_weights=True
    ),
    "Model.train": Row(lambda w: w.model.train(w.handle, [BATCH] * 3, learning_rate=0.1, **w.more), needs_weights=True),
    "Model.train_many": Row(
        lambda w: w.model.train_many([([BATCH] * 3, None)], weights=w.handle, learning_rate=0.1, **w.more),
        needs_weights=True,
    ),
    "Model.pipeline": Row(lambda w: w.model.pipeline(w.weights), needs_weights=True),
    "Model.predict_many": Row(lambda w: w.model.predict_many(w.handle, [BATCH[0]] * 3, **w.more), needs_weights=True),
    "Model.predict_each": Row(lambda w: w.model.predict_each([(w.handle, BATCH[0])] * 3, **w.more), needs_weights=True),
    "Handle.lease": Row(lambda w: w.handle.lease(10, **w.more), needs_weights=True),
    "Handle.delete": Row(lambda w: w.handle.delete(**w.more)),
    "Session.update": Row(lambda w: w.session.update(BATCH[1], BatchOutput(), **w.more)),
    "Session.forward_pass": Row(lambda w: w.session.forward_pass(w.handle, BATCH, **w.more), needs_weights=True),
    "Session.merge": Row(lambda w: w.session.merge(w.other, **w.more)),
    "Session.result": Row(lambda w: w.session.result(**w.more)),
    "Session.state": Row(lambda w: w.session.state(**w.more)),
    "Session.close": Row(lambda w: w.session.close(**w.more)),
    "Pipeline.predict_on_batch": Row(lambda w: w.pipeline.predict_on_batch(BATCH[0], **w.more), needs_weights=True),
    "Pipeline.forward_pass": Row(lambda w: w.pipeline.forward_pass(BATCH, **w.more), needs_weights=True),
    "Pipeline.forward_backward": Row(lambda w: w.pipeline.forward_backward(BATCH, **w.more), needs_weights=True),
    "Pipeline.vjp": Row(lambda w: w.pipeline.vjp(BATCH[0], np.ones(3, np.float32), **w.more), needs_weights=True),
    "MultiWeightsPipeline.predict_on_batch": Row(
        lambda w: w.many.predict_on_batch(w.handle, BATCH[0], **w.more), needs_weights=True
    ),
    "MultiWeightsPipeline.forward_pass": Row(
        lambda w: w.many.forward_pass(w.handle, BATCH, **w.more), needs_weights=True
    ),
    "MultiWeightsPipeline.forward_backward": Row(
        lambda w: w.many.forward_backward(w.handle, BATCH, **w.more), needs_weights=True
    ),
    "MultiWeightsPipeline.vjp": Row(
        lambda w: w.many.vjp(w.handle, BATCH[0], np.ones(3, np.float32), **w.more), needs_weights=True
    ),
}

ENDS = {
    "Pipeline.close": lambda w: (w.pipeline.predict_on_batch(BATCH[0], **w.more), w.pipeline.close())[1],
    "MultiWeightsPipeline.close": lambda w: (
        w.many.predict_on_batch(w.handle, BATCH[0], **w.more),
        w.many.close(),
    )[1],
}
"""Calls that end in time without an error of their own: the futures have it."""

LOCAL = {
    *("Client.close", "Handle.id", "Session.id", "Session.updates", "Session.note_counted", "Session.open"),
    *(f"Model.{name}" for name in ("name", "version", "versions", "content_hash", "description", "input_spec")),
    *("Client.weights_handle", "Model.weights_handle"),
}
"""What calls no server, and what only the SDK calls."""

WITHOUT_TIMEOUT = {"Model.initial_weights", "Model.pipeline"}
"""Calls that have no timeout of their own, only the client's."""


def public(index: int) -> set[str]:
    """The public names of the classes, as `CALLS` names them. index: 0 for threads, 1 for asyncio."""
    return {
        f"{owner}.{name}"
        for owner, classes in PUBLIC.items()
        for name in dir(classes[index])
        if not name.startswith("_")
    }
