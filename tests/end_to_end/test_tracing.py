"""Spans of calls, as a real collector receives them."""

from __future__ import annotations

import subprocess
import sys

import grpc
import numpy as np
import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from opentelemetry.sdk.trace import TracerProvider

import forwardpass_client
from forwardpass import v1
from forwardpass.wire.methods import METHODS, MODEL_SERVICE
from forwardpass_client import errors
from forwardpass_server.app.settings import Settings
from forwardpass_server.errors import SettingsError
from support import zoo
from support.collectors import SpanCollector
from support.servers import ServerProcess

FACTORIES = ("--factory", "counting=support.zoo:counting", "--factory", "crashing=support.zoo:crashing")
TRACER = TracerProvider().get_tracer("test")
PREDICT = f"{MODEL_SERVICE}/PredictOnBatch"


def attributes(span: Span) -> dict[str, str]:
    return {item.key: item.value.string_value for item in span.attributes}


@pytest.fixture(scope="module")
def traced():
    """What a server sent after calls of each kind, with the ids of the spans below which they were made."""
    parents = {}
    x, _ = zoo.counting_batch(1)
    with SpanCollector() as collector:
        # The collector is on this machine: no proxy of the environment is for it.
        proxy = {"http_proxy": "http://127.0.0.1:1"}
        with ServerProcess(*FACTORIES, "--trace-endpoint", collector.url, environment=proxy) as server:
            with forwardpass_client.connect(server.address) as client:
                model = client.model("counting")
                weights = model.initial_weights
                with TRACER.start_as_current_span("unary") as span:
                    parents["unary"] = span.get_span_context()
                    model.predict_on_batch(weights, x)
                with TRACER.start_as_current_span("pipeline") as span:
                    parents["pipeline"] = span.get_span_context()
                    assert len(list(model.predict_many(weights, [x] * 3))) == 3
                with TRACER.start_as_current_span("failing") as span:
                    parents["failing"] = span.get_span_context()
                    with pytest.raises(errors.InternalError):
                        client.model("crashing").predict_on_batch(((), ()), np.float32([1234567]))
                with TRACER.start_as_current_span("refused") as span:
                    parents["refused"] = span.get_span_context()
                    with pytest.raises(errors.ModelNotFound):
                        client.model("nonsense")
                model.loss(model.predict_on_batch(weights, x), x.astype(np.int64))
            # What has not been sent is sent before it ends.
            assert server.terminate() == 0
        yield collector.spans, parents


def below(spans: list[Span], span_id: bytes) -> list[Span]:
    return [span for span in spans if span.parent_span_id == span_id]


def test_a_call_is_a_span_of_its_callers_trace_with_its_parts(traced):
    spans, parents = traced
    parent = parents["unary"]
    (call,) = below(spans, parent.span_id.to_bytes(8, "big"))
    assert call.trace_id == parent.trace_id.to_bytes(16, "big")
    assert call.name == PREDICT
    assert call.kind == Span.SPAN_KIND_SERVER
    assert attributes(call) == {
        "rpc.system": "grpc",
        "rpc.grpc.status": "OK",
        "forwardpass.model": "counting",
        "forwardpass.function": "predict_on_batch",
    }
    queue, execute = sorted(below(spans, call.span_id), key=lambda span: span.name != "queue")
    assert (queue.name, execute.name) == ("queue", "execute")
    # The clocks of two threads are read one after another.
    slack = 10**6
    assert call.start_time_unix_nano <= queue.start_time_unix_nano + slack
    assert queue.start_time_unix_nano <= queue.end_time_unix_nano
    assert abs(queue.end_time_unix_nano - execute.start_time_unix_nano) <= slack
    assert execute.end_time_unix_nano <= call.end_time_unix_nano + slack


def test_calls_of_a_pipeline_are_spans_below_it(traced):
    spans, parents = traced
    made = below(spans, parents["pipeline"].span_id.to_bytes(8, "big"))
    (pipeline,) = [span for span in made if span.name.endswith("/Pipeline")]
    calls = below(spans, pipeline.span_id)
    assert [span.name for span in calls] == ["pipeline/PredictOnBatch"] * 3
    for call in calls:
        assert {span.name for span in below(spans, call.span_id)} == {"queue", "execute"}


def test_a_failed_span_is_marked_and_contains_no_data(traced):
    spans, parents = traced
    (call,) = [one for one in below(spans, parents["failing"].span_id.to_bytes(8, "big")) if one.name == PREDICT]
    assert call.status.code == Status.STATUS_CODE_ERROR
    assert attributes(call)["rpc.grpc.status"] == "INTERNAL"
    for span in spans:
        assert not span.events
        assert "1234567" not in str(span)
        assert "secret" not in str(span)


def test_the_span_of_a_callers_error_has_no_error_status(traced):
    spans, parents = traced
    (call,) = below(spans, parents["refused"].span_id.to_bytes(8, "big"))
    assert attributes(call)["rpc.grpc.status"] == "NOT_FOUND"
    assert call.status.code == Status.STATUS_CODE_UNSET


def test_a_call_without_a_trace_begins_one(traced):
    spans, _ = traced
    (loss,) = [span for span in spans if span.name == f"{MODEL_SERVICE}/Loss"]
    assert not loss.parent_span_id


# gRPC refuses metadata of more than 8 KiB by itself: now and then, and the more often the longer they are.
@pytest.mark.parametrize("context", ["nonsense", "00-" + "0" * 32 + "-" + "0" * 16 + "-01", "00-" + "f" * 7000])
def test_an_invalid_trace_context_is_ignored(context):
    with SpanCollector() as collector, ServerProcess(*FACTORIES, "--trace-endpoint", collector.url) as server:
        with grpc.insecure_channel(server.address) as channel:
            call = channel.unary_unary(METHODS["ListModels"].path)
            request = v1.ListModelsRequest().SerializeToString()
            assert call(request, timeout=10, metadata=(("traceparent", context),))


def test_an_unreachable_collector_delays_neither_calls_nor_the_shutdown():
    with ServerProcess(*FACTORIES, "--trace-endpoint", "http://127.0.0.1:1") as server:
        with forwardpass_client.connect(server.address) as client:
            model = client.model("counting")
            x, _ = zoo.counting_batch(1)
            for _ in range(20):
                model.predict_on_batch(model.initial_weights, x, timeout_s=10)
        assert server.terminate() == 0


def test_without_an_endpoint_opentelemetry_is_not_imported():
    program = (
        "import sys, forwardpass_client, forwardpass_server.app.serve, forwardpass_server.rpc.server;"
        "assert not any(name.startswith('opentelemetry') for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("endpoint", ["localhost:4317", "http://localhost", "grpc://localhost:4317", ""])
def test_an_invalid_trace_endpoint_is_refused_by_flag(endpoint):
    with pytest.raises(SettingsError, match="--trace-endpoint: expected http://HOST:PORT"):
        Settings(factories={"counting": "support.zoo:counting"}, trace_endpoint=endpoint)
