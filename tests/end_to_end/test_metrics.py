"""Metrics: the catalogue is what a server shows, and shows no more than is bounded."""

from __future__ import annotations

import time
import urllib.request

import grpc
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

import forwardpass_client
from forwardpass import v1
from forwardpass.wire.methods import METHODS
from forwardpass_server.telemetry import catalogue
from forwardpass_server.telemetry.machine import GPU_ONLY
from forwardpass_server.telemetry.metrics import Metrics
from support import traffic, zoo
from support.environments import ROOT
from support.servers import ServerProcess, wait_until


@pytest.fixture(scope="module")
def busy():
    """A server that was called in every way."""
    with ServerProcess(*traffic.ARGUMENTS) as server:
        traffic.send(server)
        yield server


def scraped(server):
    with urllib.request.urlopen(server.metrics_url) as response:
        return {
            family.name + ("_total" if family.type == "counter" else ""): family
            for family in text_string_to_metric_families(response.read().decode())
        }


def test_the_catalogue_is_current():
    assert (ROOT / "docs" / "metrics.md").read_text() == catalogue.markdown(), "make docs/metrics.md"


def test_the_catalogue_is_what_a_server_shows(busy):
    found = scraped(busy)
    families = {family.name: family for family in Metrics().families}
    on_gpu = set() if "CPU" in busy.ready_line else GPU_ONLY
    assert set(found) == set(families) - (GPU_ONLY - on_gpu)
    for name, shown in found.items():
        assert shown.type == families[name].kind, name
        assert shown.samples, f"nothing was counted in {name}"
        for sample in shown.samples:
            assert set(sample.labels) - {"le"} == set(families[name].labels), name


def test_each_part_of_a_call_is_timed():
    with ServerProcess("--factory", "slow=support.zoo:slow") as server:
        with forwardpass_client.connect(server.address) as client:
            model = client.model("slow")
            before = server.metrics()
            started = time.monotonic()
            for _ in range(3):
                model.predict_on_batch(((), ()), [2000])
            took = time.monotonic() - started
        after = server.metrics()
        call = '{function="predict_on_batch",model="slow"}'
        times = {
            name: after[f"forwardpass_{name}_seconds_sum{labels}"]
            - before.get(f"forwardpass_{name}_seconds_sum{labels}", 0)
            for name, labels in {"decode": "", "queue": call, "execute": call, "encode": ""}.items()
        }
        assert all(value > 0 for value in times.values())
        assert sum(times.values()) < took
        assert max(times, key=times.get) == "execute"
        for name in ("queue", "execute"):
            assert after[f"forwardpass_{name}_seconds_count{call}"] == 3


def test_a_call_that_was_given_up_in_the_queue_has_waited():
    with ServerProcess("--factory", "slow=support.zoo:slow", "--execution-threads", "1") as server:
        with forwardpass_client.connect(server.address) as client:
            model = client.model("slow")
            for timeout_s in (0.5, 0.2):
                with pytest.raises(forwardpass_client.errors.DeadlineExceeded):
                    model.predict_on_batch(((), ()), [10**6], timeout_s=timeout_s)
            queued = 'forwardpass_queue_seconds_{}{{function="predict_on_batch",model="slow"}}'
            wait_until(lambda: server.metrics().get(queued.format("count")) == 2)
            assert server.metrics()[queued.format("sum")] >= 0.1


def test_bytes_of_calls_and_of_streams_are_counted(busy):
    def counted(direction: str, method: str) -> float:
        found = scraped(busy)[f"forwardpass_{direction}_bytes_total"].samples
        return sum(sample.value for sample in found if sample.labels["grpc_method"] == method)

    request = v1.ListModelsRequest().SerializeToString()
    before = counted("sent", "ListModels")
    with grpc.insecure_channel(busy.address) as channel:
        answer = channel.unary_unary(METHODS["ListModels"].path)(request, timeout=10)
    assert counted("sent", "ListModels") - before == len(answer)
    # Three sets of 1 MiB.
    assert counted("received", "UploadTensors") >= 3 * 2**20
    assert counted("received", "Pipeline") > 32 * 2 * 4 * 4
    assert counted("sent", "Pipeline") > 32 * 2 * 4


def test_what_runs_is_told(busy):
    (name,) = [name for name in busy.metrics() if name.startswith("forwardpass_build_info")]
    assert 'device="CPU:0"' in name
    assert 'tensorflow="2.' in name


def test_loads_are_counted_by_what_came_of_them(busy):
    metrics = busy.metrics()
    assert metrics['forwardpass_model_loads_total{model="counting",outcome="loaded"}'] == 1
    assert metrics['forwardpass_model_loads_total{model="broken",outcome="failed"}'] == 1
    assert metrics['forwardpass_model_load_seconds_count{outcome="loaded"}'] == 4


def test_the_series_of_a_model_go_with_it_and_come_back():
    with ServerProcess("--factory", "counting=support.zoo:counting", "--management-port", "0") as server:

        def series() -> list[str]:
            return [name for name in server.metrics() if 'model="counting"' in name]

        def manage(method: str, request) -> None:
            with grpc.insecure_channel(server.management_address) as channel:
                channel.unary_unary(METHODS[method].path)(request.SerializeToString(), timeout=60)

        x, _ = zoo.counting_batch(1)
        with forwardpass_client.connect(server.address) as client:
            model = client.model("counting")
            weights = model.initial_weights
            model.predict_on_batch(weights, x)
            assert {name.partition("{")[0] for name in series()} >= {
                "forwardpass_queue_seconds_count",
                "forwardpass_execute_seconds_count",
                "forwardpass_batch_examples_count",
                "forwardpass_model_loads_total",
            }
            manage("UnloadModel", v1.UnloadModelRequest(model=v1.ModelSelector(name="counting", version=1)))
            assert series() == []
            manage("LoadModel", v1.LoadModelRequest(model=v1.ModelSelector(name="counting", version=1)))
            assert np.array_equal(client.model("counting").predict_on_batch(weights, x), weights[0][0][x])
            assert len(series()) > 20
