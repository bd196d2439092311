"""Arguments that a user writes by mistake are refused with what to write instead."""

from __future__ import annotations

import asyncio
import pathlib
import re

import numpy as np
import pytest

import forwardpass_client
from forwardpass_client import Tls, errors
from support import zoo

CONNECT = [
    (8500, TypeError, 'expected "host:port" such as "localhost:8500", got int'),
    (None, TypeError, 'expected "host:port" such as "localhost:8500", got NoneType'),
    (b"localhost:8500", TypeError, "got bytes: decode it with .decode()"),
    ([b"10.0.0.1:1"], TypeError, 'expected addresses such as "10.0.0.1:8500", got bytes'),
    ("http://models:8500", ValueError, 'write connect("models:8500")'),
    ("https://models:8500/", ValueError, 'write connect("models:8500", tls=True)'),
    ("grpc://models:8500", ValueError, 'write connect("models:8500")'),
    ("localhost", ValueError, 'give the port of the server, such as "localhost:8500"'),
    ("dns:///models", ValueError, 'give the port of the server, such as "models:8500"'),
    ("", ValueError, 'give the port of the server, such as "localhost:8500"'),
    ("::1", ValueError, 'write an IPv6 address in brackets, such as "[::1]:8500"'),
    ("localhost:http", ValueError, 'expected "host:port"'),
    ("localhost:0", ValueError, "expected a port from 1 to 65535, got 0"),
    ("localhost:85000", ValueError, "expected a port from 1 to 65535, got 85000"),
    ("10.0.0.1:1,10.0.0.2:2", ValueError, "pass several as a list, ['10.0.0.1:1', '10.0.0.2:2']"),
]


@pytest.mark.parametrize("target, error, sentence", CONNECT)
def test_an_invalid_target_is_refused_and_the_error_says_what_to_write(target, error, sentence):
    for connect in (forwardpass_client.connect, forwardpass_client.connect_async):
        with pytest.raises(error, match=f"^target: .*{re.escape(sentence)}"):
            connect(target)


@pytest.mark.parametrize(
    "target",
    [
        "localhost:1",
        "[::1]:1",
        "ipv6:[::1]:1",
        "ipv4:127.0.0.1:1,127.0.0.2:1",
        "dns:///models:1",
        "dns://10.0.0.1:53/models:1",
        "dns:models:1",
        "unix:/run/models.sock",
        "unix-abstract:models",
        "xds:///models",
        "ipv6:%5B::1%5D:1",
    ],
)
def test_other_grpc_targets_are_not_changed(target):
    forwardpass_client.connect(target).close()


@pytest.mark.parametrize(
    "options, error, sentence",
    [
        ({"tls": "ca.pem"}, TypeError, "tls: expected True, False or a forwardpass_client.Tls, got str"),
        ({"max_message_bytes": "1"}, TypeError, "max_message_bytes: expected an int, got '1'"),
        ({"max_message_bytes": 0}, ValueError, "max_message_bytes: expected 1 to "),
    ],
)
def test_options_of_another_kind_are_refused(options, error, sentence):
    with pytest.raises(error, match=re.escape(sentence)):
        forwardpass_client.connect("localhost:1", **options)


@pytest.mark.parametrize("path", ["ca.pem", pathlib.Path("ca.pem")])
def test_certificates_must_be_bytes_and_not_paths(path):
    with pytest.raises(TypeError, match=r"tls: expected root_certificates as bytes, .*read_bytes\(\), got"):
        Tls(root_certificates=path)


@pytest.fixture(scope="module")
def counting(server):
    with forwardpass_client.connect(server.address) as client:
        yield client.model("counting")


@pytest.mark.parametrize("version", ["1", 1.0, True, b"1"])
def test_a_version_that_is_not_an_int_is_refused(server, version):
    with forwardpass_client.connect(server.address) as client:
        with pytest.raises(TypeError, match="version: expected an int such as 1, or None for the highest version, got"):
            client.model("counting", version)
        assert client.model("counting", np.int64(1)).version == 1


def test_a_label_that_is_not_a_string_is_refused(server):
    with forwardpass_client.connect(server.address) as client:
        with pytest.raises(TypeError, match="label: expected a str such as 'stable', got int"):
            client.model("counting", label=1)


X, Y = zoo.counting_batch(1)

TRAINING = {
    "forward_pass": lambda m, training: m.forward_pass(m.initial_weights, (X, Y), training),
    "predict_on_batch": lambda m, training: m.predict_on_batch(m.initial_weights, X, training=training),
    "predict_many": lambda m, training: list(m.predict_many(m.initial_weights, [X], training)),
    "evaluate": lambda m, training: m.evaluate(m.initial_weights, [(X, Y)], training=training),
    "session": lambda m, training: m.metrics_session().forward_pass(m.initial_weights, (X, Y), training),
}


@pytest.mark.parametrize("method", TRAINING)
def test_training_is_true_or_false(counting, method):
    for wrong in ("False", None, 2, 0.0, []):
        with pytest.raises(TypeError, match=f"training: expected True or False, got {re.escape(repr(wrong))}"):
            TRAINING[method](counting, wrong)
    for right in (True, np.bool_(False), 0):
        TRAINING[method](counting, right)


EXACT = {
    "forward_pass": lambda m, exact: m.forward_pass(m.initial_weights, (X, Y), exact=exact),
    "predict_on_batch": lambda m, exact: m.predict_on_batch(m.initial_weights, X, exact=exact),
    "predict_many": lambda m, exact: list(m.predict_many(m.initial_weights, [X], exact=exact)),
    "predict_each": lambda m, exact: list(m.predict_each([(m.initial_weights, X)], exact=exact)),
    "evaluate": lambda m, exact: m.evaluate(m.initial_weights, [(X, Y)], exact=exact),
    "evaluate_many": lambda m, exact: m.evaluate_many([m.initial_weights], [(X, Y)], exact=exact),
}


@pytest.mark.parametrize("method", EXACT)
def test_exact_is_true_or_false(counting, method):
    for wrong in ("False", None, 2, []):
        with pytest.raises(TypeError, match=f"exact: expected True or False, got {re.escape(repr(wrong))}"):
            EXACT[method](counting, wrong)
    for right in (True, np.bool_(False), 0):
        EXACT[method](counting, right)


WEIGHTS = {
    "forward_pass": lambda m, weights: m.forward_pass(weights, (X, Y)),
    "predict_on_batch": lambda m, weights: m.predict_on_batch(weights, X),
    "put_weights": lambda m, weights: m.put_weights(weights),
    "pipeline": lambda m, weights: m.pipeline(weights),
    "predict_each": lambda m, weights: list(m.predict_each([(weights, X)])),
    "evaluate": lambda m, weights: m.evaluate(weights, [(X, Y)]),
    "evaluate_many": lambda m, weights: m.evaluate_many([weights], [(X, Y)]),
    "session": lambda m, weights: m.metrics_session().forward_pass(weights, (X, Y)),
}


@pytest.mark.parametrize("method", WEIGHTS)
def test_an_id_passed_as_weights_is_refused_and_the_error_names_weights_handle(counting, method):
    handle = counting.put_weights(counting.initial_weights)
    with pytest.raises(errors.StructureMismatch, match=r"got str: .*pass model\.weights_handle\(id\)"):
        WEIGHTS[method](counting, handle.id)


@pytest.mark.parametrize("method", WEIGHTS)
def test_several_handles_passed_to_evaluate_are_refused_and_the_error_names_evaluate_many(counting, method):
    handle = counting.put_weights(counting.initial_weights)
    with pytest.raises(errors.StructureMismatch, match="several handles: evaluate_many takes a list of weights"):
        WEIGHTS[method](counting, [handle, handle])


def test_one_handle_passed_to_evaluate_many_is_refused_and_the_error_names_evaluate(counting):
    handle = counting.put_weights(counting.initial_weights)
    with pytest.raises(
        TypeError, match=r"expected a list with one entry for each set of weights, got WeightsHandle.*evaluate"
    ):
        counting.evaluate_many(handle, [(X, Y)])


def test_an_argument_that_is_not_a_handle_is_refused(counting):
    handle = counting.put_weights(counting.initial_weights)
    with pytest.raises(errors.StructureMismatch, match=r"handle: .*pass model\.weights_handle\(id\)"):
        counting.get_weights(handle.id)
    with pytest.raises(TypeError, match="handle: expected a handle of put_weights or weights_handle, got a tuple of 2"):
        counting.get_weights(counting.initial_weights)
    for wrong in (1, None, b"0" * 64):
        with pytest.raises(TypeError, match="weights_id: expected a str of 64 hexadecimal digits, got"):
            counting.weights_handle(wrong)
    for wrong in ("5", True):
        with pytest.raises(TypeError, match="ttl_s: expected seconds as a number"):
            handle.lease(wrong)


def test_an_argument_that_is_not_a_session_is_refused(counting, server):
    with counting.metrics_session() as session:
        with pytest.raises(TypeError, match="session_id: expected a str of 32 hexadecimal digits, got int"):
            counting.metrics_session(5)
        with pytest.raises(TypeError, match=r"session: expected a MetricsSession of metrics_session, got str"):
            counting.evaluate(counting.initial_weights, [(X, Y)], session=session.id)
        with pytest.raises(TypeError, match=r"for the id of a session, pass model\.metrics_session\(id\)"):
            session.merge(session.id)
        assert session.updates == 0

    async def run() -> None:
        async with forwardpass_client.connect_async(server.address) as client:
            async with (await client.model("counting")).metrics_session() as other:
                with pytest.raises(TypeError, match="got AsyncMetricsSession"):
                    counting.evaluate(counting.initial_weights, [(X, Y)], session=other)

    asyncio.run(run())
