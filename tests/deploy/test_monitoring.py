"""Rules and dashboard: what they ask for is there, and each alert comes when it should, and only then."""

from __future__ import annotations

import json
import re
import subprocess

import pytest
import yaml

import forwardpass_client
from forwardpass_server.telemetry.machine import ON_A_GPU
from forwardpass_server.telemetry.metrics import Metrics
from support import traffic, zoo
from support.environments import ROOT
from support.prometheus_servers import PrometheusProcess
from support.servers import ServerProcess, wait_until

RULES = ROOT / "deploy" / "prometheus" / "rules.yml"
RULE_TESTS = ROOT / "tests" / "deploy" / "data" / "rules_test.yml"
DASHBOARD = json.loads((ROOT / "deploy" / "grafana" / "forwardpass.json").read_text())

GPU_ONLY = {family.name for family in Metrics().families if family.condition == ON_A_GPU}

# What Grafana puts in their places.
# Long enough for all tests of this module: a panel shows nothing once the calls are longer ago.
VARIABLES = {"$__rate_interval": "1h", "$job": ".*", "$instance": ".*"}

ALERTS = {
    rule["alert"]: rule
    for group in yaml.safe_load(RULES.read_text())["groups"]
    for rule in group["rules"]
    if "alert" in rule
}

METRIC = r"\b(?:forwardpass[_:]|grpc_server_|process_|up\b)[a-z0-9_:]*(?=[{\[ ]|$)"

EXPRESSIONS = [
    (f"{panel['title']} {target['refId']}", target["expr"])
    for panel in DASHBOARD["panels"]
    for target in panel.get("targets", ())
]


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory):
    """A Prometheus with the rules that has scraped a server before and after it was called in every way.

    And another one, that watches files, and one that keeps weights in a tier.
    """
    watching = traffic.watching_files(tmp_path_factory.mktemp("watched"))
    tier = ("--factory", "wide_4k=support.zoo:wide_4k", "--weights-folder", tmp_path_factory.mktemp("tier").as_uri())
    with (
        ServerProcess(*traffic.ARGUMENTS) as server,
        ServerProcess(*watching) as other,
        ServerProcess(*tier) as sharing,
        forwardpass_client.connect(sharing.address) as client,
    ):
        urls = [server.metrics_url, other.metrics_url, sharing.metrics_url]
        with PrometheusProcess(tmp_path_factory.mktemp("prometheus"), urls, [RULES]) as found:
            wait_until(lambda: len(found.query("up == 1")) == 3)
            written = 'forwardpass_weights_tier_seconds_count{operation="write"}'
            pipelined = 'forwardpass_pipeline_calls_total{code="OK",method="PredictOnBatch"}'
            failed = 'forwardpass_pipeline_calls_total{code!="OK"}'
            # A series that is seen for the first time has not grown.
            for seed in range(2):
                client.model("wide_4k").put_weights(zoo.wide_weights(4096, seed))
                wait_until(lambda seed=seed: found.query(f"{written} == {seed + 1}") != [])
                traffic.send(server)
                calls = server.metrics()[pipelined]
                wait_until(lambda calls=calls: found.query(f"{pipelined} == {calls}") != [])
                # The last call of `send`: a rate needs two samples of it.
                wait_until(lambda: found.query(failed) != [])
            yield found


def promtool(*arguments: str) -> None:
    done = subprocess.run(["promtool", *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout


def test_promtool_accepts_the_rules():
    promtool("check", "rules", str(RULES))


def test_alerts_fire_when_they_should():
    promtool("test", "rules", str(RULE_TESTS))


def test_every_alert_is_tested_and_explained():
    tests = yaml.safe_load(RULE_TESTS.read_text())["tests"]
    raised = {case["alertname"] for test in tests for case in test.get("alert_rule_test", ()) if case["exp_alerts"]}
    explained = re.findall(r"^## (\w+)$", (ROOT / "docs" / "runbook.md").read_text(), re.MULTILINE)
    assert raised == set(ALERTS)
    assert explained == list(ALERTS)


def test_a_real_prometheus_evaluates_every_rule(prometheus):
    wait_until(lambda: all(rule["health"] != "unknown" for rule in prometheus.rules()))
    for rule in prometheus.rules():
        assert rule["health"] == "ok", rule
    recorded = [rule["name"] for rule in prometheus.rules() if rule["type"] == "recording"]
    assert len(recorded) == 5
    for name in recorded:
        wait_until(lambda name=name: prometheus.query(name) != [])


def test_alerts_use_existing_metrics(prometheus):
    """A misspelt one would be silent for ever."""
    for name, alert in ALERTS.items():
        metrics = set(re.findall(METRIC, alert["expr"]))
        assert metrics, name
        for metric in metrics - GPU_ONLY:
            assert prometheus.query(metric), f"{name} asks for {metric}"


@pytest.mark.parametrize("title, expression", EXPRESSIONS, ids=[title for title, _ in EXPRESSIONS])
def test_every_panel_shows_something(prometheus, title, expression):
    for name, value in VARIABLES.items():
        expression = expression.replace(name, value)
    found = prometheus.query(expression)
    if any(name in expression for name in GPU_ONLY):
        # Where there is none, the panels say so by being empty.
        return
    assert found, expression
    assert any(series["value"][1] != "NaN" for series in found), expression


def test_every_metric_of_the_service_is_on_the_dashboard():
    shown = " ".join(expression for _, expression in EXPRESSIONS)
    absent = {family.name for family in Metrics().families if family.name not in shown}
    assert absent == {"process_virtual_memory_bytes"}
