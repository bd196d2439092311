"""Metrics: the catalogue is what a server shows, and shows no more than is bounded."""

from __future__ import annotations

import math
import time
import urllib.request

import grpc
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

import forwardpass_client
from forwardpass import v1
from forwardpass.wire.methods import METHODS
from forwardpass_server.access.tokens import Role, Tokens
from forwardpass_server.telemetry import catalogue
from forwardpass_server.telemetry.files import OF_WATCHED_FILES, WITH_TLS, WITH_TOKENS
from forwardpass_server.telemetry.machine import ON_A_GPU
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
            if family.samples
        }


def test_the_catalogue_is_current():
    assert (ROOT / "docs" / "metrics.md").read_text() == catalogue.markdown(), "make docs/metrics.md"


def test_a_server_exposes_the_metrics_of_the_catalogue(busy):
    found = scraped(busy)
    families = {family.name: family for family in Metrics().families}
    conditions = {""} if "CPU" in busy.ready_line else {"", ON_A_GPU}
    assert set(found) == {family.name for family in families.values() if family.condition in conditions}
    for name, shown in found.items():
        assert shown.type == families[name].kind, name
        for sample in shown.samples:
            assert set(sample.labels) - {"le"} == set(families[name].labels), name


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """A server that watches files of every kind, and their folder."""
    folder = tmp_path_factory.mktemp("watched")
    with ServerProcess(*traffic.watching_files(folder)) as server:
        # The watch of the repository begins once the server is ready.
        wait_until(lambda: good("models") in server.metrics())
        yield server, folder


def good(files: str) -> str:
    return f'forwardpass_last_reload_successful{{files="{files}"}}'


def test_a_server_that_watches_files_exposes_the_metrics_of_the_catalogue(watched):
    server, folder = watched
    conditions = (OF_WATCHED_FILES, WITH_TLS, WITH_TOKENS)
    assert {family.name for family in Metrics().families if family.condition in conditions} <= set(scraped(server))
    metrics = server.metrics()
    assert [metrics[good(files)] for files in ("certificates", "tokens", "models")] == [1, 1, 1]
    assert metrics['forwardpass_token_expiry_timestamp_seconds{role="call"}'] == Tokens(folder / "tokens").expire_s(
        Role.CALL
    )
    assert metrics['forwardpass_token_expiry_timestamp_seconds{role="manage"}'] == math.inf
    for name in ("server", "client_ca"):
        assert metrics[f'forwardpass_certificate_expiry_timestamp_seconds{{certificate="{name}"}}'] > time.time()


@pytest.mark.parametrize(
    "files, path, text",
    [
        ("certificates", "signer/server.key", "no key"),
        ("tokens", "tokens", "no token\n"),
        ("models", "models/m/forwardpass-versions.json", "{"),
    ],
)
def test_the_metrics_show_a_failed_reload_until_the_files_can_be_used(watched, files, path, text):
    server, folder = watched
    former = (folder / path).read_text()
    (folder / path).write_text(text)
    wait_until(lambda: server.metrics()[good(files)] == 0)
    (folder / path).write_text(former)
    wait_until(lambda: server.metrics()[good(files)] == 1)


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


def test_a_call_that_is_cancelled_in_the_queue_counts_in_the_queue_time():
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


def test_build_info_names_tensorflow_and_the_device(busy):
    (name,) = [name for name in busy.metrics() if name.startswith("forwardpass_build_info")]
    assert 'device="CPU:0"' in name
    assert 'tensorflow="2.' in name


def test_loads_are_counted_by_outcome(busy):
    metrics = busy.metrics()
    assert metrics['forwardpass_model_loads_total{model="counting",outcome="loaded"}'] == 1
    assert metrics['forwardpass_model_loads_total{model="broken",outcome="failed"}'] == 1
    assert metrics['forwardpass_model_load_seconds_count{outcome="loaded"}'] == 4


def test_the_series_of_a_model_are_removed_and_created_with_it():
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
