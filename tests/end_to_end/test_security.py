"""Who may call a real server, over what, and how much of it."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import pathlib
import queue
import shutil
import ssl
import time
from collections.abc import Iterator

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

import forwardpass_client
from forwardpass import v1
from forwardpass.wire import errors, messages
from forwardpass.wire.methods import MANAGEMENT_SERVICE, METHODS, MODEL_SERVICE, SERVICES
from forwardpass.wire.structures import Structure
from forwardpass_server.access import tokens
from forwardpass_server.access.tokens import Role
from support import zoo
from support.certificates import Signer
from support.servers import ServerProcess, wait_until

SLOW = ("--factory", "slow=support.zoo:slow")


def all_methods() -> list[tuple[str, bool, bool]]:
    """The path of every method that there is, and whether requests and responses are streams."""
    found = [
        (method.path, method.streams_requests, method.streams_responses)
        for methods in SERVICES.values()
        for method in methods.values()
    ]
    for file in (health_pb2.DESCRIPTOR, reflection_pb2.DESCRIPTOR):
        for service in file.services_by_name.values():
            for method in service.methods:
                path = f"/{service.full_name}/{method.name}"
                found.append((path, method.client_streaming, method.server_streaming))
    return found


def call(address: str, path: str, streams: tuple[bool, bool] = (False, False), token: str = "", request=b"", **more):
    """The answer to one call, whatever it is, by a client that checks nothing. Raises errors of the catalogue."""
    metadata = (("authorization", f"Bearer {token}"),) if token else ()
    with grpc.insecure_channel(address) as channel:
        kind = {
            (False, False): channel.unary_unary,
            (False, True): channel.unary_stream,
            (True, False): channel.stream_unary,
            (True, True): channel.stream_stream,
        }[streams]
        try:
            answer = kind(path)(iter([request]) if streams[0] else request, timeout=30, metadata=metadata, **more)
            return next(iter(answer), b"") if streams[1] else answer
        except grpc.RpcError as error:
            trailing = dict(error.trailing_metadata() or ())
            raise errors.decode(error.code().name, error.details(), trailing.get(errors.DETAIL_KEY)) from None


@dataclasses.dataclass
class Guarded:
    """A server that asks for tokens, and the file that it knows them from."""

    server: ServerProcess
    file: pathlib.Path
    alice: str
    bob: str
    operator: str
    manager: str
    expired: str

    def add(self, token: tokens.Token) -> None:
        self.file.write_text(self.file.read_text() + token.line() + "\n")

    def remove(self, token: tokens.Token) -> None:
        self.file.write_text(self.file.read_text().replace(token.line() + "\n", ""))


@pytest.fixture(scope="module")
def guarded(tmp_path_factory, repository):
    made = {
        "alice": tokens.create("alice", [Role.CALL], None),
        "bob": tokens.create("bob", [Role.CALL], time.time() + 3600),
        "operator": tokens.create("operator", [Role.CALL, Role.MANAGE], None),
        "manager": tokens.create("manager", [Role.MANAGE], None),
        "expired": tokens.create("late", [Role.CALL], time.time() - 1),
    }
    file = tmp_path_factory.mktemp("tokens") / "tokens"
    file.write_text("# who may call\n" + "".join(token.line() + "\n" for _, token in made.values()))
    factories = (*SLOW, "--factory", "wide=support.zoo:wide_1m")
    arguments = (*zoo.serving(repository), *factories, "--management-port", "0", "--tokens", str(file))
    limits = ("--max-concurrent-calls-per-principal", "1", "--weights-mib", "5")
    with ServerProcess(*arguments, *limits) as server:
        yield Guarded(server, file, **{name: secret for name, (secret, _) in made.items()})


def connect(guarded: Guarded, token, **more) -> forwardpass_client.Client:
    return forwardpass_client.connect(guarded.server.address, token=token, **more)


@pytest.mark.parametrize("path, streams_requests, streams_responses", all_methods())
def test_no_method_answers_without_credentials(guarded, path, streams_requests, streams_responses):
    streams = streams_requests, streams_responses
    for address in (guarded.server.address, guarded.server.management_address):
        with pytest.raises(errors.Unauthenticated, match="missing or invalid credentials: send a bearer token"):
            call(address, path, streams)
        for token in ("nonsense", guarded.alice[:-1], guarded.alice + "x"):
            with pytest.raises(errors.Unauthenticated, match="the server does not know this token: ask its operator"):
                call(address, path, streams, token)
        with pytest.raises(errors.Unauthenticated, match="the token of 'late' has expired"):
            call(address, path, streams, guarded.expired)


def test_a_caller_without_credentials_cannot_find_out_whether_a_method_exists(guarded):
    for path in (f"/{MODEL_SERVICE}/Nonsense", "/nonsense.Service/Nonsense"):
        with pytest.raises(errors.Unauthenticated):
            call(guarded.server.address, path)
        with pytest.raises(errors.MethodNotSupported):
            call(guarded.server.address, path, token=guarded.alice)
    assert not any("nonsense" in name.lower() for name in guarded.server.metrics())


def test_refused_calls_are_counted_like_others(guarded):
    labels = f'grpc_method="ListModels",grpc_service="{MODEL_SERVICE}",grpc_type="unary"'
    refused = f'grpc_server_handled_total{{grpc_code="Unauthenticated",{labels}}}'
    before = guarded.server.metrics().get(refused, 0)
    with pytest.raises(errors.Unauthenticated):
        call(guarded.server.address, METHODS["ListModels"].path)
    assert guarded.server.metrics()[refused] == before + 1
    assert guarded.server.metrics()[f"grpc_server_started_total{{{labels}}}"] >= before + 1


@pytest.mark.parametrize(
    "value", ["Basic {}", "{}", "Bearer", "Bearer ", "bearer{}", "Bearer {} "], ids=lambda value: value.strip("{} ")
)
def test_only_a_bearer_token_counts(guarded, value):
    with grpc.insecure_channel(guarded.server.address) as channel:
        metadata = (("authorization", value.format(guarded.alice)),)
        with pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary(METHODS["ListModels"].path)(b"", metadata=metadata, timeout=30)
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_a_request_without_credentials_is_refused_before_it_is_read(guarded):
    # 512 MiB are more than any message may have: what is read of it ends in RESOURCE_EXHAUSTED.
    with pytest.raises(errors.Unauthenticated):
        call(guarded.server.address, METHODS["ForwardPass"].path, request=bytes(2**29))


def test_every_way_of_calling_sends_the_token(guarded):
    asked = []

    def token() -> str:
        asked.append(1)
        return guarded.alice

    x = np.ones((2, 6, 6, 1), np.float32)
    with connect(guarded, token) as client:
        client.wait_until_ready()
        model = client.model("keras_cnn")
        handle = model.put_weights(model.initial_weights)
        expected = model.predict_on_batch(handle, x, training=False)
        model.get_weights(handle)
        with model.pipeline(handle) as pipeline:
            assert np.allclose(pipeline.predict_on_batch(x, training=False).result(), expected)
        # More than 8 MiB goes over a stream of its own.
        assert len(model.predict_on_batch(handle, np.ones((60_000, 6, 6, 1), np.float32), training=False)) == 60_000
    # At least for: health, model, initial weights, put, upload, put, predict, describe, 2 and more downloads, pipeline
    # and the long call.
    assert len(asked) >= 12


def test_the_async_client_sends_the_token(guarded):
    async def run() -> None:
        async with forwardpass_client.connect_async(guarded.server.address, token=lambda: guarded.bob) as client:
            model = await client.model("keras_cnn")
            handle = await model.put_weights(await model.initial_weights)
            await model.get_weights(handle)
            x = np.ones((60_000, 6, 6, 1), np.float32)
            assert len(await model.predict_on_batch(handle, x, training=False)) == 60_000
            async with await model.pipeline(handle) as pipeline:
                assert len(await pipeline.predict_on_batch(x[:3])) == 3

    asyncio.run(run())


def test_weights_of_one_principal_are_not_found_by_another(guarded):
    with connect(guarded, guarded.alice) as alice, connect(guarded, guarded.bob) as bob:
        ours = alice.model("keras_cnn").put_weights(alice.model("keras_cnn").initial_weights)
        theirs = bob.model("keras_cnn")
        theirs.weights_handle(ours.id).delete()
        with pytest.raises(errors.WeightsNotFound):
            theirs.get_weights(theirs.weights_handle(ours.id))
        assert alice.model("keras_cnn").get_weights(ours)


def requests_with(weights_id: bytes, ours: bytes) -> dict[str, tuple[str, bytes]]:
    """Requests that use a set of weights: the method, and the request. ours: a set that the caller may use."""
    model = v1.ModelSelector(name="keras_cnn")

    def train(**values) -> tuple[str, bytes]:
        start = v1.TrainingStart(model=model, optimizer="sgd", learning_rate=0.1, **values)
        return "Train", v1.TrainRequest(start=start, finish=True).SerializeToString()

    def combine(*ids: bytes) -> tuple[str, bytes]:
        terms = [v1.WeightsTerm(weights_id=one, coefficient=1) for one in ids]
        return "CombineWeights", v1.CombineWeightsRequest(terms=terms).SerializeToString()

    x = Structure.of(np.ones((2, 6, 6, 1), np.float32))
    labelled = {"batch_input.x": x, "batch_input.y": Structure.of(np.zeros(2, np.int64))}
    cotangents = {"x": x, "cotangents": Structure.of(np.ones((2, 4), np.float32))}
    forward_backward = v1.ForwardBackwardRequest(model=model, weights_id=weights_id)
    return {
        "train": train(weights_id=weights_id),
        "train from a start": train(weights_id=ours, start_weights_id=weights_id, proximal=1.0),
        "train with a state": train(weights_id=ours, optimizer_state_id=weights_id),
        "train from a checkpoint": train(weights_id=ours, optimizer_state_id=weights_id, checkpoint_sequence=1),
        "forward_backward": ("ForwardBackward", messages.encode(forward_backward, labelled)),
        "vjp": ("Vjp", messages.encode(v1.VjpRequest(model=model, weights_id=weights_id), cotangents)),
        "combine, first": combine(weights_id, ours),
        "combine, second": combine(ours, weights_id),
    }


@pytest.mark.parametrize("name", requests_with(b"", b""))
def test_sets_of_another_principal_do_not_exist_for_training_gradients_and_combinations(guarded, name):
    x, y = np.ones((2, 6, 6, 1), np.float32), np.zeros(2, np.int64)
    with connect(guarded, guarded.alice) as alice, connect(guarded, guarded.bob) as bob:
        model, other = alice.model("keras_cnn"), bob.model("keras_cnn")
        # Sets that bob does not have.
        result = model.train(model.initial_weights, [(x, y)] * 3, learning_rate=0.1, keep_optimizer_state=True)
        theirs = result.optimizer_state.id if "state" in name or "checkpoint" in name else result.weights.id
        ours = bytes.fromhex(other.put_weights(other.initial_weights).id)

        def refused(weights_id: bytes, token: str) -> str:
            method, request = requests_with(weights_id, ours)[name]
            streams = METHODS[method].streams_requests, METHODS[method].streams_responses
            with pytest.raises(errors.WeightsNotFound) as caught:
                call(guarded.server.address, METHODS[method].path, streams, token, request)
            return str(caught.value).replace(weights_id.hex(), "ID")

        assert refused(bytes.fromhex(theirs), guarded.bob) == refused(b"\x01" * 32, guarded.bob)
        # They still exist for their owner.
        model.get_weights(result.weights)


def test_tokens_are_added_and_revoked_without_a_restart(guarded):
    secret, token = tokens.create("carol", [Role.CALL], None)
    with connect(guarded, secret) as client:
        with pytest.raises(errors.Unauthenticated):
            client.models()
        guarded.add(token)
        wait_until(lambda: not fails(client.models, errors.Unauthenticated))
        with grpc.insecure_channel(guarded.server.address) as channel:
            # A stream that is open loses its token like any other call.
            metadata = (("authorization", f"Bearer {secret}"),)
            requests = Requests()
            answers = channel.stream_stream(METHODS["Pipeline"].path)(iter(requests), metadata=metadata, timeout=60)
            requests.put(call_frame(1))
            assert next(answers)
            guarded.remove(token)
            wait_until(lambda: fails(client.models, errors.Unauthenticated))
            requests.put(call_frame(2))
            with pytest.raises(grpc.RpcError) as caught:
                next(answers)
            requests.end()
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_a_broken_token_file_keeps_the_last_good_content(guarded):
    good = guarded.file.read_text()
    try:
        guarded.file.write_text("")
        guarded.server.wait_for_log("reload failed, the former contents stay in use")
        with connect(guarded, guarded.alice) as client:
            assert client.models()
    finally:
        guarded.file.write_text(good)


def test_a_call_beyond_a_principals_share_is_refused_and_another_principal_is_served(guarded):
    with connect(guarded, guarded.alice) as alice, connect(guarded, guarded.bob) as bob:
        model, other = alice.model("slow"), bob.model("slow")
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            running = pool.submit(model.predict_on_batch, ((), ()), [3_000_000])
            wait_until(lambda: fails(lambda: model.predict_on_batch(((), ()), [1]), errors.ServerOverloaded))
            with pytest.raises(errors.ServerOverloaded) as caught:
                model.predict_on_batch(((), ()), [1])
            assert other.predict_on_batch(((), ()), [1]).tolist() == [1]
            assert not running.done()
            running.result()
    assert "this principal's calls: expected at most 1 at once, got 2" in str(caught.value)
    assert caught.value.retry_after_s > 0


def test_trainings_at_once_end_although_a_principal_has_one_call(guarded):
    x, y = np.ones((2, 6, 6, 1), np.float32), np.zeros(2, np.int64)
    with connect(guarded, guarded.alice) as alice:
        model = alice.model("keras_cnn")
        clients = [([(x, y)] * 3, None)] * 4
        results = list(model.train_many(clients, weights=model.initial_weights, learning_rate=0.1, max_streams=4))
    assert [result.num_steps for result in results] == [3] * 4


def test_weights_beyond_a_principals_share_are_refused_and_another_principal_has_room(guarded):
    # A share is half of what there is, 2.5 MiB.
    with connect(guarded, guarded.alice) as alice, connect(guarded, guarded.bob) as bob:
        model, other = alice.model("wide"), bob.model("wide")
        held = [model.put_weights(zoo.wide_weights(2**20, seed)) for seed in range(2)]
        for handle in held:
            handle.lease(60)
        with pytest.raises(errors.WeightStoreFull, match="of this principal's 2621440, 2097152 are in use or under a"):
            model.put_weights(zoo.wide_weights(2**20, 2))
        theirs = [other.put_weights(zoo.wide_weights(2**20, seed)) for seed in range(2, 4)]
        held[0].lease(0)
        model.put_weights(zoo.wide_weights(2**20, 2))
        for handle in theirs:
            assert other.get_weights(other.weights_handle(handle.id))
            handle.delete()
        for handle in held:
            handle.delete()


def management(guarded: Guarded, method: str, token: str, name: str = "", version: int = 0):
    method = METHODS[method]
    more = {"model": v1.ModelSelector(name=name, version=version)} if name else {}
    request = method.request(**more).SerializeToString()
    return method.response.FromString(
        call(guarded.server.management_address, method.path, token=token, request=request)
    )


def test_management_requires_its_role_and_its_own_port(guarded):
    for method in SERVICES[MANAGEMENT_SERVICE].values():
        with pytest.raises(errors.PermissionDenied, match="'alice' lacks the role 'manage', which this port requires"):
            call(guarded.server.management_address, method.path, token=guarded.alice)
        with pytest.raises(errors.MethodNotSupported):
            call(guarded.server.address, method.path, token=guarded.operator)
    assert management(guarded, "DescribeModels", guarded.operator).models


@pytest.mark.parametrize(
    "method",
    [method for name, methods in SERVICES.items() if name != MANAGEMENT_SERVICE for method in methods.values()],
    ids=lambda method: method.path,
)
def test_every_other_method_requires_the_role_call(guarded, method):
    streams = method.streams_requests, method.streams_responses
    with pytest.raises(errors.PermissionDenied, match="'manager' lacks the role 'call', which this port requires"):
        call(guarded.server.address, method.path, streams, guarded.manager)


def test_versions_are_loaded_reloaded_and_unloaded_by_name(guarded, repository):
    operator = guarded.operator
    with connect(guarded, guarded.bob) as client:
        copied = repository / "managed" / "3"
        with pytest.raises(errors.ModelNotFound):
            management(guarded, "LoadModel", operator, "managed")
        shutil.copytree(repository / "no_metrics" / "1", copied)
        try:
            loaded = management(guarded, "LoadModel", operator, "managed").model
            assert (loaded.status.version, loaded.is_loadable, loaded.format) == (3, True, "tff-0.53")
            assert health(guarded, "model/managed/3") == "SERVING"
            model = client.model("managed")
            assert management(guarded, "LoadModel", operator, "managed", 3).model.status == loaded.status
            # What cannot be loaded does not take the place of what was.
            (copied / "saved_model.pb").rename(copied / "elsewhere")
            with pytest.raises(errors.ModelFailed, match="model managed/3 failed to load"):
                management(guarded, "ReloadModel", operator, "managed", 3)
            assert model.initial_weights
            (copied / "elsewhere").rename(copied / "saved_model.pb")
            assert management(guarded, "ReloadModel", operator, "managed", 3).model.status == loaded.status
            management(guarded, "UnloadModel", operator, "managed", 3)
            management(guarded, "UnloadModel", operator, "managed", 3)
            assert health(guarded, "model/managed/3") == "NOT_SERVING"
            with pytest.raises(errors.ModelNotFound):
                client.model("managed")
            detail = {one.status.name: one for one in management(guarded, "DescribeModels", operator).models}["managed"]
            assert detail.is_loadable
            assert detail.status.state == v1.ModelState.MODEL_STATE_UNSPECIFIED
        finally:
            shutil.rmtree(repository / "managed")


@pytest.mark.parametrize("name", ["../keras_cnn", "keras_cnn/1", "/etc", "a\0b", ".", "", "https://example.org/m"])
@pytest.mark.parametrize("method", ["LoadModel", "ReloadModel"])
def test_management_accepts_names_and_refuses_paths_and_urls(guarded, method, name):
    with pytest.raises(errors.ModelNotFound, match="model: expected the name of a model in the repository, got "):
        management(guarded, method, guarded.operator, name or " ", 1)


def test_unload_and_reload_require_a_version(guarded):
    for method in ("UnloadModel", "ReloadModel"):
        with pytest.raises(errors.InvalidRequest, match=r"model\.version: expected an integer from 1 on, got 0"):
            management(guarded, method, guarded.operator, "keras_cnn")


def health(guarded: Guarded, service: str) -> str:
    request = health_pb2.HealthCheckRequest(service=service).SerializeToString()
    answer = call(guarded.server.address, "/grpc.health.v1.Health/Check", token=guarded.bob, request=request)
    return health_pb2.HealthCheckResponse.ServingStatus.Name(health_pb2.HealthCheckResponse.FromString(answer).status)


def test_only_health_and_reflection_can_be_opened(tmp_path):
    file = tmp_path / "tokens"
    file.write_text("# nobody\n")
    with ServerProcess(*SLOW, "--tokens", str(file), "--open", "health", "--open", "reflection") as server:
        for path, *streams in all_methods():
            if path.startswith("/forwardpass."):
                with pytest.raises(errors.Unauthenticated):
                    call(server.address, path, tuple(streams))
            else:
                # A library's service need not answer each of its methods.
                with contextlib.suppress(errors.MethodNotSupported):
                    call(server.address, path, tuple(streams))


@pytest.fixture(scope="module")
def encrypted(tmp_path_factory):
    """A server with TLS that knows its clients by certificates, and some of them by tokens."""
    folder = tmp_path_factory.mktemp("encrypted")
    signer = Signer(folder)
    secret, token = tokens.create("by-token", [Role.CALL, Role.MANAGE], None)
    (folder / "tokens").write_text(token.line() + "\n")
    arguments = (*SLOW, *signer.arguments(mutual=True), "--tokens", str(folder / "tokens"), "--management-port", "0")
    with ServerProcess(*arguments) as server:
        yield server, signer, secret


def reach(address: str, tls, **more) -> list[str]:
    """The names of the models of a server, if it can be reached within some seconds."""
    with forwardpass_client.connect(address, tls=tls, timeout_s=20, **more) as client:
        return [found.name for found in client.models()]


def test_a_server_with_mutual_tls_accepts_callers_with_a_certificate(encrypted, tmp_path):
    server, signer, secret = encrypted
    assert reach(server.address, signer.tls("alice")) == ["slow"]
    assert reach(server.address, signer.tls(None, "alice@example.org")) == ["slow"]
    assert reach(server.address, signer.tls("alice"), token=secret) == ["slow"]
    with pytest.raises(errors.Unauthenticated, match="does not know this token"):
        reach(server.address, signer.tls("alice"), token=secret[:-1])
    stranger = Signer(tmp_path / "stranger")
    mixed = dataclasses.replace(stranger.tls("alice"), root_certificates=signer.ca.read_bytes())
    for tls in (signer.tls(), mixed, stranger.tls("alice"), True, False):
        with pytest.raises((errors.ServerUnavailable, errors.DeadlineExceeded)):
            reach(server.address, tls)


def test_a_tls_mismatch_between_client_and_server_says_which_side_uses_tls(encrypted, guarded):
    server, signer, _ = encrypted
    with pytest.raises(errors.ServerUnavailable, match=r"if the server uses TLS, connect with tls=True or tls=Tls"):
        reach(server.address, False)
    with pytest.raises(errors.ServerUnavailable, match="the server does not use TLS: connect without tls"):
        reach(guarded.server.address, signer.tls("alice"))


def test_a_certificate_gives_the_role_call_and_a_token_can_give_more(encrypted):
    server, signer, secret = encrypted
    tls = signer.tls("alice")
    credentials = grpc.ssl_channel_credentials(tls.root_certificates, tls.key, tls.certificate)
    with grpc.secure_channel(server.management_address, credentials) as channel:
        describe = channel.unary_unary(METHODS["DescribeModels"].path)
        with pytest.raises(grpc.RpcError) as caught:
            describe(b"", timeout=20)
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
        assert (
            caught.value.details()
            == "'alice' lacks the role 'manage', which this port requires: use a token with that role"
        )
        assert describe(b"", timeout=20, metadata=(("authorization", f"Bearer {secret}"),))


def test_a_server_certificate_with_another_name_is_refused(encrypted):
    server, signer, _ = encrypted
    port = server.address.rpartition(":")[2]
    tls = dataclasses.replace(signer.tls("alice"), server_name="elsewhere.example")
    with pytest.raises((errors.ServerUnavailable, errors.DeadlineExceeded)):
        reach(f"localhost:{port}", tls)
    assert reach(f"127.0.0.1:{port}", dataclasses.replace(tls, server_name="localhost")) == ["slow"]


def test_a_new_certificate_is_used_and_a_broken_one_is_not(encrypted):
    server, signer, _ = encrypted
    port = server.port
    first = served_certificate(port)
    key = signer.key.read_bytes()
    signer.key.write_bytes(b"-----BEGIN PRIVATE KEY-----\n")
    server.wait_for_log("reload failed, the former contents stay in use")
    assert served_certificate(port) == first
    signer.key.write_bytes(key)
    signer.renew()
    wait_until(lambda: served_certificate(port) != first)
    assert reach(server.address, signer.tls("alice")) == ["slow"]


def served_certificate(port: int) -> str:
    return ssl.get_server_certificate(("127.0.0.1", port))


def test_a_server_on_a_public_address_logs_which_protection_it_lacks(tmp_path):
    signer = Signer(tmp_path / "signer")
    with ServerProcess(*SLOW, "--host", "0.0.0.0", *signer.arguments()) as server:
        server.wait_for_log("everybody who can reach 0.0.0.0 may call this server")
        assert reach(f"localhost:{server.port}", signer.tls()) == ["slow"]
    with ServerProcess(*SLOW, "--host", "0.0.0.0", "--insecure") as server:
        server.wait_for_log("requests and responses on 0.0.0.0 are not encrypted by this server")


def fails(function, error: type[Exception]) -> bool:
    try:
        function()
    except error:
        return True
    return False


class Requests:
    """Requests of a stream, as a test comes up with them."""

    def __init__(self) -> None:
        self._queue = queue.Queue()

    def put(self, request: bytes) -> None:
        self._queue.put(request)

    def end(self) -> None:
        self._queue.put(None)

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._queue.get, None)


def call_frame(number: int) -> bytes:
    data = v1.ListModelsRequest().SerializeToString()
    frame = v1.CallFrame(call=number, method="ListModels", size_bytes=len(data), data=data)
    return v1.PipelineRequest(frames=[frame]).SerializeToString()
