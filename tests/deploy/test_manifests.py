"""The Kubernetes manifests: valid, and in step with the server that they start."""

from __future__ import annotations

import copy
import re
import shutil

import kubernetes_validate
import pytest
import tomllib
import yaml

from forwardpass_client.cli.commands import forwardpass
from forwardpass_server.app.cli import main
from forwardpass_server.app.settings import Settings
from forwardpass_server.calls.memory_budget import BASE_BYTES, MemoryBudget
from forwardpass_server.rpc.server import LIVE, READY, STARTUP
from support.environments import ROOT
from support.manifests import RENDERED, find, is_custom, render, render_folder, validate_custom

# The oldest with gRPC probes, matchLabelKeys and unhealthyPodEvictionPolicy switched on; the newest that there is.
VERSIONS = ("1.27", "1.37")

MIB = 2**20

# Of the models of a pod: some versions of a hundred MiB of weights in all.
MODELS_BYTES = 256 * MIB

each = pytest.mark.parametrize("name", RENDERED)


def pod_of(name: str):
    return find(name, "Deployment")["spec"]["template"]


def container_of(name: str):
    (container,) = pod_of(name)["spec"]["containers"]
    return container


def environment_of(name: str) -> dict[str, str]:
    return {entry["name"]: entry.get("value", "") for entry in container_of(name)["env"]}


def probes_of(name: str):
    return {kind: container_of(name)[kind] for kind in ("startupProbe", "readinessProbe", "livenessProbe")}


@each
@pytest.mark.parametrize("version", VERSIONS)
def test_every_object_is_valid_for_the_oldest_and_the_newest_kubernetes(name, version):
    for rendered in render(name):
        if not is_custom(rendered):
            kubernetes_validate.validate(copy.deepcopy(rendered), version, strict=True)


@each
def test_objects_of_extensions_are_as_these_define_them(name):
    validate_custom([rendered for rendered in render(name) if is_custom(rendered)])


@pytest.mark.parametrize(
    "kind, spec, lacks",
    [
        ("Certificate", {}, "secretName"),
        ("PodMonitor", {}, "selector"),
        ("PrometheusRule", {"groups": [{"name": "forwardpass", "rules": [{"alert": "Lost"}]}]}, "expr"),
    ],
)
def test_an_object_of_an_extension_that_lacks_something_is_noticed(kind, spec, lacks):
    with pytest.raises(AssertionError, match=f"must have required property {lacks}"):
        validate_custom([{**find("overlays/production", kind), "spec": spec}])


@each
def test_every_object_is_in_the_namespace(name):
    for rendered in render(name):
        place = "name" if rendered["kind"] == "Namespace" else "namespace"
        assert rendered["metadata"][place] == "forwardpass"


@each
def test_the_container_runs_serve_with_settings_that_it_has(name):
    known = {option.envvar for option in main.commands["serve"].params}
    assert container_of(name)["args"] == ["serve"]
    assert set(environment_of(name)) <= known


@each
def test_ports_are_those_that_the_server_listens_on(name):
    ports = {port["name"]: port["containerPort"] for port in container_of(name)["ports"]}
    assert ports == {"grpc": Settings.port, "metrics": Settings.metrics_port}
    (service_port,) = find(name, "Service")["spec"]["ports"]
    assert (service_port["port"], service_port["targetPort"]) == (Settings.port, "grpc")
    (exposed,) = re.findall(r"^EXPOSE (.*)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert sorted(map(int, exposed.split())) == sorted(ports.values())
    opened = [
        port["port"] for rule in find(name, "NetworkPolicy", "forwardpass")["spec"]["ingress"] for port in rule["ports"]
    ]
    assert opened == ["grpc", "metrics"]


@each
def test_the_service_is_headless_so_that_callers_see_every_replica(name):
    assert find(name, "Service")["spec"]["clusterIP"] == "None"


@each
def test_probes_ask_the_server_for_startup_ready_and_live(name):
    asked = []
    options = {option for parameter in forwardpass.commands["health"].params for option in parameter.opts}
    for probe in probes_of(name).values():
        if "grpc" in probe:
            assert probe["grpc"]["port"] == Settings.port
            asked.append(probe["grpc"]["service"])
        else:
            command, subcommand, host, *arguments = probe["exec"]["command"]
            assert (command, subcommand, host) == ("forwardpass", "health", f"localhost:{Settings.port}")
            values = dict(argument.split("=") for argument in arguments)
            assert set(values) <= options
            asked.append(values["--service"])
    assert asked == [STARTUP, READY, LIVE]


@each
def test_the_grace_period_is_longer_than_the_drain(name):
    environment = environment_of(name)
    drain_s = float(environment["FORWARDPASS_DRAIN_DELAY"]) + float(environment["FORWARDPASS_DRAIN_TIMEOUT"])
    # The rest is for sessions to be committed and Python to end.
    assert pod_of(name)["spec"]["terminationGracePeriodSeconds"] >= drain_s + 5


@each
def test_the_probes_allow_an_hour_for_the_start_and_a_minute_without_liveness(name):
    patience_s = {kind: probe["periodSeconds"] * probe["failureThreshold"] for kind, probe in probes_of(name).items()}
    assert patience_s["startupProbe"] == 3600
    assert patience_s["livenessProbe"] == 60


@each
def test_a_rollout_gives_callers_time_to_find_the_new_replica_and_reports_a_wrong_image_soon(name):
    spec = find(name, "Deployment")["spec"]
    assert spec["minReadySeconds"] > float(environment_of(name)["FORWARDPASS_DRAIN_DELAY"])
    # Kubernetes refuses a deadline that is not longer. Beyond it, it only reports: a slow start goes on.
    assert spec["minReadySeconds"] < spec["progressDeadlineSeconds"] <= 900


@each
def test_a_node_can_be_drained_with_any_number_of_pods(name):
    budget = find(name, "PodDisruptionBudget")["spec"]
    assert (budget["maxUnavailable"], budget["unhealthyPodEvictionPolicy"]) == (1, "AlwaysAllow")
    assert "minAvailable" not in budget


@each
def test_the_limits_of_the_manifests_fit_into_the_memory_limit(name):
    environment = environment_of(name)
    limit = container_of(name)["resources"]["limits"]["memory"]
    assert limit.endswith("Gi")
    # The server computes the same of its control group.
    assert "FORWARDPASS_MAX_CONCURRENT_MIB" not in environment
    budget = MemoryBudget(
        memory_bytes=int(limit.removesuffix("Gi")) * 1024 * MIB,
        base_bytes=BASE_BYTES,
        weights_bytes=int(environment.get("FORWARDPASS_WEIGHTS_MIB", 0)) * MIB,
    )
    # One alone is always taken, however long it is: it must fit.
    longest_bytes = int(environment.get("FORWARDPASS_MAX_MESSAGE_MIB", Settings.max_message_bytes // MIB)) * MIB
    assert budget.messages_bytes(MODELS_BYTES) >= longest_bytes
    assert container_of(name)["resources"]["requests"]["memory"] == limit
    assert environment["FORWARDPASS_EXECUTION_THREADS"] == container_of(name)["resources"]["requests"]["cpu"]


@each
def test_the_pod_has_no_capabilities_and_few_writable_folders(name):
    pod, container = pod_of(name)["spec"], container_of(name)
    assert not pod["automountServiceAccountToken"]
    assert pod["securityContext"]["runAsNonRoot"]
    assert (
        f"USER {pod['securityContext']['runAsUser']}:{pod['securityContext']['runAsGroup']}\n"
        in (ROOT / "Dockerfile").read_text()
    )
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    writable = {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
    # With a bucket the models are copies, which the server writes.
    assert writable == {"/tmp", "/data"} | ({"/models"} if name == "overlays/bucket" else set())
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


@each
def test_everything_that_selects_pods_selects_these(name):
    labels = pod_of(name)["metadata"]["labels"]
    selectors = [
        find(name, "Deployment")["spec"]["selector"]["matchLabels"],
        find(name, "Service")["spec"]["selector"],
        find(name, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
        *(found["spec"]["podSelector"]["matchLabels"] for found in render(name) if found["kind"] == "NetworkPolicy"),
        *(spread["labelSelector"]["matchLabels"] for spread in pod_of(name)["spec"]["topologySpreadConstraints"]),
        *(found["spec"]["selector"]["matchLabels"] for found in render(name) if found["kind"] == "PodMonitor"),
    ]
    assert all(selector and selector.items() <= labels.items() for selector in selectors)


@each
def test_the_image_is_of_this_version(name):
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert container_of(name)["image"].removesuffix("-gpu") == f"forwardpass:{version}"
    assert f"\nARG VERSION={version}\n" in (ROOT / "Dockerfile").read_text()
    put_models = yaml.safe_load((ROOT / "deploy" / "kubernetes" / "put-models.yaml").read_text())
    assert put_models["spec"]["containers"][0]["image"] == f"forwardpass:{version}"


def test_a_pod_puts_models_into_the_volume_that_the_server_reads():
    put_models = yaml.safe_load((ROOT / "deploy" / "kubernetes" / "put-models.yaml").read_text())
    for version in VERSIONS:
        kubernetes_validate.validate(copy.deepcopy(put_models), version, strict=True)
    claim = find("base", "PersistentVolumeClaim")["metadata"]["name"]
    for spec in (put_models["spec"], pod_of("base")["spec"]):
        (models,) = (volume for volume in spec["volumes"] if volume["name"] == "models")
        assert models["persistentVolumeClaim"]["claimName"] == claim
    assert put_models["spec"]["securityContext"] == pod_of("base")["spec"]["securityContext"]


def test_the_overlay_that_the_readme_shows_is_rendered(tmp_path):
    (shown,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "deploy" / "README.md").read_text(), re.DOTALL)
    (tmp_path / "cluster").mkdir()
    (tmp_path / "cluster" / "kustomization.yaml").write_text(shown)
    shutil.copytree(ROOT / "deploy", tmp_path / "deploy")
    rendered = render_folder(tmp_path / "cluster")
    # A cluster without extensions takes it.
    assert not any(map(is_custom, rendered))
    deployments = [found for found in rendered if found["kind"] == "Deployment"]
    (container,) = deployments[0]["spec"]["template"]["spec"]["containers"]
    assert container["image"].startswith("registry.example.com/forwardpass:")


def test_an_update_succeeds_on_a_node_without_a_spare_gpu():
    assert container_of("overlays/gpu")["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert container_of("overlays/gpu")["image"].endswith("-gpu")
    assert find("overlays/gpu", "Deployment")["spec"]["strategy"]["rollingUpdate"]["maxSurge"] == 0
    # By default half of the GPU's memory: that of the host is of no concern.
    assert "FORWARDPASS_WEIGHTS_MIB" not in environment_of("overlays/gpu")


@pytest.mark.parametrize("name", ["overlays/redis", "overlays/production"])
def test_the_address_of_redis_comes_from_a_secret(name):
    (store,) = (entry for entry in container_of(name)["env"] if entry["name"] == "FORWARDPASS_SESSION_STORE")
    assert store["valueFrom"]["secretKeyRef"] == {"name": "forwardpass-sessions", "key": "url"}


def test_a_bucket_replaces_the_volume_of_models():
    entries = {entry["name"]: entry for entry in container_of("overlays/bucket")["env"]}
    for name, key in (("FORWARDPASS_MODEL_REPOSITORY", "models"), ("FORWARDPASS_WEIGHTS_FOLDER", "weights")):
        assert entries[name] == {
            "name": name,
            "valueFrom": {"secretKeyRef": {"name": "forwardpass-bucket", "key": key}},
        }
    assert not [found for found in render("overlays/bucket") if found["kind"] == "PersistentVolumeClaim"]
    (volume,) = (volume for volume in pod_of("overlays/bucket")["spec"]["volumes"] if volume["name"] == "models")
    (mount,) = (mount for mount in container_of("overlays/bucket")["volumeMounts"] if mount["name"] == "models")
    assert volume.keys() == {"name", "emptyDir"}
    assert mount["mountPath"] == entries["FORWARDPASS_REPOSITORY_CACHE"]["value"]
    assert not mount.get("readOnly")


@each
def test_the_network_policies_allow_only_the_configured_connections_of_the_server(name):
    policies = [found["spec"] for found in render(name) if found["kind"] == "NetworkPolicy"]
    assert all("Egress" in policy["policyTypes"] for policy in policies)
    # The API server drops an empty list, so that `kubectl diff` would always show it.
    assert all(policy.get("egress") != [] for policy in policies)
    opened = [port["port"] for policy in policies for rule in policy.get("egress", []) for port in rule["ports"]]
    called = []
    environment = environment_of(name)
    if "FORWARDPASS_SESSION_STORE" in environment:
        called += [53, 53, 6379]
    if "FORWARDPASS_WEIGHTS_FOLDER" in environment and name == "overlays/bucket":
        called += [53, 53, 443]
    if "FORWARDPASS_TRACE_ENDPOINT" in environment:
        called += [53, 53, int(environment["FORWARDPASS_TRACE_ENDPOINT"].rpartition(":")[2])]
    assert sorted(opened) == sorted(called)


@each
def test_sessions_of_replicas_are_shared_or_on_the_volume_of_a_single_replica(name):
    spec = find(name, "Deployment")["spec"]
    (data,) = (volume for volume in pod_of(name)["spec"]["volumes"] if volume["name"] == "data")
    shared = "FORWARDPASS_SESSION_STORE" in environment_of(name)
    kept = "persistentVolumeClaim" in data
    # Two pods must not write one file.
    assert (spec.get("replicas"), spec["strategy"]) == (1, {"type": "Recreate"}) or not kept
    assert not (shared and kept)
    assert shared or name != "overlays/production"


def test_the_base_says_beside_replicas_what_happens_to_sessions():
    text = (ROOT / "deploy" / "kubernetes" / "base" / "deployment.yaml").read_text()
    comment = text[: text.index("  replicas:")].rpartition("spec:")[2]
    assert "SessionNotFound" in comment
    assert "ForwardpassSessionsApart" in comment


@pytest.mark.parametrize("components", [["volume"], ["gpu", "volume"]])
def test_one_replica_keeps_sessions_and_weights_on_a_volume_of_its_own(tmp_path, components):
    shutil.copytree(ROOT / "deploy", tmp_path / "deploy")
    overlay = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": ["../deploy/kubernetes/base"],
        "components": [f"../deploy/kubernetes/components/{name}" for name in components],
    }
    (tmp_path / "cluster").mkdir()
    (tmp_path / "cluster" / "kustomization.yaml").write_text(yaml.safe_dump(overlay))
    found = {
        (one["kind"], one["metadata"]["name"]): one["spec"]
        for one in render_folder(tmp_path / "cluster")
        if "spec" in one
    }
    deployment = found["Deployment", "forwardpass"]
    assert (deployment["replicas"], deployment["strategy"]) == (1, {"type": "Recreate"})
    pod = deployment["template"]["spec"]
    (data,) = (volume for volume in pod["volumes"] if volume["name"] == "data")
    assert data == {"name": "data", "persistentVolumeClaim": {"claimName": "forwardpass-data"}}
    claim = found["PersistentVolumeClaim", "forwardpass-data"]
    # SQLite's log wants a disk of one machine's own.
    assert claim["accessModes"] == ["ReadWriteOnce"]
    (container,) = pod["containers"]
    environment = {entry["name"]: entry.get("value", "") for entry in container["env"]}
    (mount,) = (mount for mount in container["volumeMounts"] if mount["name"] == "data")
    assert environment["FORWARDPASS_WEIGHTS_FOLDER"].startswith(f"{mount['mountPath']}/")
    assert f"FORWARDPASS_SESSION_STORE=sqlite://{mount['mountPath']}/" in (ROOT / "Dockerfile").read_text()
    size = claim["resources"]["requests"]["storage"]
    # The sessions of a few principals beside.
    assert int(environment["FORWARDPASS_WEIGHTS_DISK_MIB"]) + 2048 <= int(size.removesuffix("Gi")) * 1024


def test_the_readme_describes_every_component():
    listed = re.findall(r"^\| `(\w+)` \|.*\|.*\|$", (ROOT / "deploy" / "README.md").read_text(), re.MULTILINE)
    folders = {path.name for path in (ROOT / "deploy" / "kubernetes" / "components").iterdir()}
    assert folders <= set(listed)


@pytest.mark.parametrize("name", ["overlays/tls", "overlays/production"])
def test_with_tls_the_server_reads_the_files_of_cert_manager_and_is_not_insecure(name):
    environment = environment_of(name)
    assert "FORWARDPASS_INSECURE" not in environment
    certificate = find(name, "Certificate")["spec"]
    (volume,) = (volume for volume in pod_of(name)["spec"]["volumes"] if volume["name"] == "tls")
    (mount,) = (mount for mount in container_of(name)["volumeMounts"] if mount["name"] == "tls")
    assert volume["secret"]["secretName"] == certificate["secretName"]
    files = {value for key, value in environment.items() if key.startswith("FORWARDPASS_TLS_")}
    assert files == {f"{mount['mountPath']}/{key}" for key in ("tls.crt", "tls.key", "ca.crt")}
    # The kubelet's own gRPC probes know no TLS. Ours call by this name, and with this certificate.
    assert all("grpc" not in probe for probe in probes_of(name).values())
    assert "localhost" in certificate["dnsNames"]
    assert certificate["usages"] == ["server auth", "client auth"]


@pytest.mark.parametrize("name", ["overlays/autoscaling", "overlays/production"])
def test_replicas_follow_a_metric_that_the_adapter_serves(name):
    scaler = find(name, "HorizontalPodAutoscaler")["spec"]
    assert scaler["scaleTargetRef"]["name"] == find(name, "Deployment")["metadata"]["name"]
    assert "replicas" not in find(name, "Deployment")["spec"]
    (metric,) = scaler["metrics"]
    adapter = yaml.safe_load((ROOT / "deploy" / "prometheus" / "adapter.yaml").read_text())
    assert [rule["name"]["as"] for rule in adapter["rules"]["custom"]] == [metric["pods"]["metric"]["name"]]


@pytest.mark.parametrize("name", ["overlays/monitoring", "overlays/production"])
def test_prometheus_and_grafana_get_what_lies_in_their_folders(name):
    rules = yaml.safe_load((ROOT / "deploy" / "prometheus" / "rules.yml").read_text())
    assert find(name, "PrometheusRule")["spec"] == rules
    dashboards = {path.name: path.read_text() for path in (ROOT / "deploy" / "grafana").glob("*.json")}
    assert find(name, "ConfigMap")["data"] == dashboards
    (endpoint,) = find(name, "PodMonitor")["spec"]["podMetricsEndpoints"]
    assert endpoint["port"] in {port["name"] for port in container_of(name)["ports"]}
