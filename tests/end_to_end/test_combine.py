"""Arithmetic on weights by id: combined on the server, averaged, put again where they were dropped."""

from __future__ import annotations

import asyncio
import dataclasses
import math
from typing import Any

import grpc
import keras
import numpy as np
import pytest
import tensorflow as tf

import forwardpass_client
from forwardpass import v1
from forwardpass.wire import errors, manifests
from forwardpass.wire.methods import METHODS
from forwardpass.wire.structures import Structure
from forwardpass_server.access import tokens
from forwardpass_server.access.tokens import Role
from forwardpass_server.models.functional import FunctionalModel
from forwardpass_server.models.keras_models import functional_model_from_keras
from support import zoo
from support.servers import ServerProcess

KIB = 1024
FACTORIES = [
    *(f"--factory={name}=support.zoo:{name}" for name in ("wide_4k", "wide_1m", "structures")),
    "--factory=dropout=end_to_end.test_combine:dropout",
]
TERMS = [(seed, 1 / (seed + 3) - 0.1) for seed in range(9)]


@dataclasses.dataclass(frozen=True)
class Result:
    """As of a training."""

    weights: Any
    num_examples: int


def dropout() -> FunctionalModel:
    """A model whose non-trainable weights have moving statistics and the state of random numbers."""
    keras.utils.set_random_seed(1)
    network = keras.Sequential(
        [
            keras.Input((8,)),
            keras.layers.BatchNormalization(),
            keras.layers.Dropout(0.5, seed=2),
            keras.layers.Dense(3),
        ]
    )
    spec = tf.TensorSpec([None, 8], tf.float32), tf.TensorSpec([None], tf.int64)
    return functional_model_from_keras(network, keras.losses.SparseCategoricalCrossentropy(from_logits=True), spec)


@pytest.fixture(scope="module")
def combining(tmp_path_factory):
    file = tmp_path_factory.mktemp("tokens") / "tokens"
    roles = {"alice": Role.CALL, "bob": Role.CALL, "ops": Role.MANAGE}
    created = {name: tokens.create(name, [role], None) for name, role in roles.items()}
    file.write_text("".join(f"{token.line()}\n" for _, token in created.values()))
    with ServerProcess(*FACTORIES, "--tokens", str(file)) as server:
        yield server, {name: secret for name, (secret, _) in created.items()}


@pytest.fixture
def client(combining):
    server, secrets = combining
    with forwardpass_client.connect(server.address, token=secrets["alice"]) as client:
        yield client


@pytest.fixture
def model(client):
    return client.model("wide_4k")


def put_all(model, size_bytes: int = 4 * KIB) -> list[tuple[Any, float]]:
    return [(model.put_weights(zoo.wide_weights(size_bytes, seed)), number) for seed, number in TERMS]


def summed(size_bytes: int, dtype: type, terms=TERMS) -> list[list[np.ndarray]]:
    """The combination in NumPy: products and sums rounded to `dtype`, in the order of the terms."""
    sums: list[list[np.ndarray]] | None = None
    for seed, number in terms:
        parts = [[leaf.astype(dtype) * dtype(number) for leaf in part] for part in zoo.wide_weights(size_bytes, seed)]
        sums = parts if sums is None else [list(map(np.add, *pair)) for pair in zip(sums, parts, strict=True)]
    assert sums is not None
    return [[leaf.astype(np.float32) for leaf in part] for part in sums]


def assert_bits(found, expected) -> None:
    for part, wanted in zip(found, expected, strict=True):
        assert len(part) == len(wanted)
        assert all(np.array_equal(leaf, other) for leaf, other in zip(part, wanted, strict=True))


def test_a_combination_in_float64_is_that_of_numpy_to_the_last_bit(client, model):
    handle = client.combine(put_all(model), float64=True)
    assert_bits(model.get_weights(handle), summed(4 * KIB, np.float64))


def test_a_combination_in_float32_differs_from_the_exact_one_by_rounding_only(client, model):
    found = client.get_weights(client.combine(put_all(model)))
    # On a CPU it is NumPy's running sum to the last bit.
    assert_bits(found, summed(4 * KIB, np.float32))
    # 9 products and 8 sums are rounded, each by half a unit in the last place of at most the sum of the magnitudes.
    magnitudes = summed(4 * KIB, np.float64, [(seed, abs(number)) for seed, number in TERMS])
    bound = 17 * np.finfo(np.float32).eps / 2 * 4 * max(np.max(np.abs(leaf)) for part in magnitudes for leaf in part)
    for part, exact in zip(found, summed(4 * KIB, np.float64), strict=True):
        for leaf, other in zip(part, exact, strict=True):
            np.testing.assert_allclose(leaf, other, rtol=0, atol=bound)


def test_the_handle_is_accepted_like_one_of_put_weights_and_has_the_same_id(client, model):
    one, two = (zoo.wide_weights(4 * KIB, seed) for seed in (1, 2))
    handle = client.combine([(model.put_weights(one), 1), (model.put_weights(two), np.float32(-1))])
    assert isinstance(handle, forwardpass_client.WeightsHandle)
    difference = tuple([a - b for a, b in zip(*parts, strict=True)] for parts in zip(one, two, strict=True))
    assert handle.id == model.put_weights(difference).id
    x = np.ones((2, 4), np.float32)
    assert np.array_equal(model.predict_on_batch(handle, x), model.predict_on_batch(difference, x))
    handle.lease(10)
    handle.delete()
    with pytest.raises(errors.WeightsNotFound):
        client.get_weights(client.weights_handle(handle.id))


def test_an_average_weights_each_result_by_its_examples(model):
    handles = [model.put_weights(zoo.wide_weights(4 * KIB, seed)) for seed in range(3)]
    results = [Result(handles[0], 10), (handles[1], 30), Result(handles[2], 0)]
    expected = summed(4 * KIB, np.float32, [(0, 0.25), (1, 0.75)])
    assert_bits(model.get_weights(model.average(results)), expected)
    assert model.average([(handles[2], 5)]).id == handles[2].id
    with pytest.raises(ValueError, match=r"^results: expected at least one example in total, got 0 in 2 results$"):
        model.average([(handles[0], 0), Result(handles[1], 0)])


def test_trained_weights_of_a_model_with_dropout_are_averaged(client):
    model = client.model("dropout")
    rng = np.random.default_rng(0)
    batches = [(rng.standard_normal((4, 8)).astype(np.float32), rng.integers(0, 3, 4)) for _ in range(5)]
    results = [model.train(model.initial_weights, part, learning_rate=0.1) for part in (batches[:2], batches[2:])]
    trained = [model.get_weights(result.weights) for result in results]
    average = model.get_weights(model.average(results))
    kinds = []
    for found, first, second in zip(*([*one[0], *one[1]] for one in (average, *trained)), strict=True):
        kinds.append(found.dtype.kind)
        is_float = found.dtype.kind == "f"
        expected = first * np.float32(0.4) + second * np.float32(0.6) if is_float else first
        assert np.array_equal(found, expected)
        assert not np.array_equal(first, second)
    assert kinds.count("i") == 1
    # `combine` names the leaf, and takes it from the first term on request.
    terms = [(result.weights, result.num_examples / 20) for result in results]
    with pytest.raises(
        errors.InvalidRequest, match=r"^terms\[1\]\.non_trainable\[\d\]: expected the same int64\[2\] as in terms"
    ):
        client.combine(terms)
    assert client.combine(terms, integers="first").id == model.average(results).id
    # The average can be trained again.
    assert model.train(model.average(results), batches, learning_rate=0.1).num_steps == 5


def test_kept_gradients_are_a_change_of_weights(client, model):
    weights = zoo.wide_weights(4 * KIB, 5)
    handle = model.put_weights(weights)
    x = np.float32([[1, 2, 3, 4], [5, 6, 7, 8]])
    _, gradients = model.forward_backward(handle, (x, np.zeros(2, np.float32)), keep=True)
    # The loss is the sum of x times the sum of the weights, so each derivative is the sum of x: 36, exactly.
    stepped = client.combine([(handle, 1.0), (gradients, -0.5)])
    assert_bits(model.get_weights(stepped), [[weights[0][0] - np.float32(18)], []])


def test_the_async_client_combines_too(combining):
    server, secrets = combining

    async def run():
        async with forwardpass_client.connect_async(server.address, token=secrets["alice"]) as client:
            model = await client.model("wide_4k")
            handles = [await model.put_weights(zoo.wide_weights(4 * KIB, seed)) for seed in range(2)]
            handle = await client.combine([(handles[0], 0.25), (handles[1], 0.75)])
            assert isinstance(handle, forwardpass_client.AsyncWeightsHandle)
            assert (await model.average([(handles[0], 1), (handles[1], 3)])).id == handle.id
            assert_bits(await client.get_weights(handle), summed(4 * KIB, np.float32, [(0, 0.25), (1, 0.75)]))

    asyncio.run(run())


def test_weights_that_the_server_dropped_are_put_again(client, model):
    handles = [model.put_weights(zoo.wide_weights(4 * KIB, seed)) for seed in range(3)]
    expected = client.combine([(one, 1.0) for one in handles])
    handles[0].delete()
    handles[2].delete()
    assert client.combine([(one, 1.0) for one in handles]).id == expected.id
    # A handle without arrays cannot be put again: the error names it.
    nameless = client.weights_handle(handles[1].id)
    handles[1].delete()
    handles[0].delete()
    with pytest.raises(errors.WeightsNotFound, match=handles[1].id):
        client.combine([(handles[0], 1.0), (nameless, 1.0)])
    with pytest.raises(errors.WeightsNotFound, match=f"{handles[1].id}, and this handle has no arrays"):
        client.combine([(nameless, 1.0)])


def test_sets_that_do_not_fit_together_are_refused_by_leaf(client, model):
    small = model.put_weights(zoo.wide_weights(4 * KIB, 1))
    large = client.model("wide_1m").put_weights(zoo.wide_weights(KIB * KIB, 1))
    with pytest.raises(errors.ShapeMismatch, match=r"^terms\[1\]\.trainable\[0\]: expected float32\[.*\], got float32"):
        client.combine([(small, 1.0), (large, 1.0)])
    other = client.model("structures")
    with pytest.raises(errors.StructureMismatch, match=r"^terms\[1\]\.trainable: expected tuple of 1, got "):
        client.combine([(small, 1.0), (other.put_weights(other.initial_weights), 1.0)])
    with pytest.raises(errors.InvalidRequest, match=r"^terms\[0\]\.coefficient: expected a number that float32 can"):
        client.combine([(small, 1e300)])


def test_weights_of_another_principal_are_not_found(combining, client, model):
    server, secrets = combining
    own = model.put_weights(zoo.wide_weights(4 * KIB, 11))
    with forwardpass_client.connect(server.address, token=secrets["bob"]) as other:
        found = []
        for weights_id in (own.id, "ab" * 32):
            with pytest.raises(errors.WeightsNotFound) as raised:
                other.combine([(other.weights_handle(weights_id), 1.0)])
            found.append(str(raised.value).replace(weights_id, "ID"))
        assert found[0] == found[1]
        # The result of a combination belongs to its principal too.
        with pytest.raises(errors.WeightsNotFound):
            other.get_weights(other.weights_handle(client.combine([(own, 2.0)]).id))
    with forwardpass_client.connect(server.address, token=secrets["ops"]) as operator:
        with pytest.raises(errors.PermissionDenied):
            operator.combine([(operator.weights_handle(own.id), 1.0)])


def test_calls_are_counted_like_others(combining, client, model):
    server, _ = combining

    def handled(code: str) -> float:
        named = (f'grpc_code="{code}"', 'grpc_method="CombineWeights"')
        return sum(
            value
            for name, value in server.metrics().items()
            if name.startswith("grpc_server_handled_total{") and all(label in name for label in named)
        )

    before = handled("OK"), handled("InvalidArgument")
    handle = model.put_weights(zoo.wide_weights(4 * KIB, 1))
    client.combine([(handle, 1.0)])
    with pytest.raises(errors.InvalidRequest):
        client.combine([(handle, 1e300)])
    assert (handled("OK"), handled("InvalidArgument")) == (before[0] + 1, before[1] + 1)


def test_hostile_requests_are_refused(combining):
    server, secrets = combining
    one = v1.WeightsTerm(weights_id=b"\0" * 32, coefficient=1)
    with grpc.insecure_channel(server.address) as channel:
        call = channel.unary_unary(METHODS["CombineWeights"].path)

        def refusal(request: bytes, token: str = secrets["alice"]) -> tuple[grpc.StatusCode, str]:
            with pytest.raises(grpc.RpcError) as raised:
                call(request, timeout=60, metadata=[("authorization", f"Bearer {token}")])
            return raised.value.code(), raised.value.details()

        def terms(*terms: v1.WeightsTerm) -> bytes:
            return v1.CombineWeightsRequest(terms=terms).SerializeToString()

        invalid = grpc.StatusCode.INVALID_ARGUMENT
        assert refusal(b"") == (invalid, "terms: expected 1 to 16384 terms, got 0")
        assert refusal(terms(*[one] * 200_000)) == (invalid, "terms: expected 1 to 16384 terms, got 200000")
        assert refusal(b"\xff")[0] is invalid
        for wrong in (math.nan, math.inf):
            coefficient = v1.WeightsTerm(weights_id=b"\0" * 32, coefficient=wrong)
            assert refusal(terms(one, coefficient)) == (
                invalid,
                f"terms[1].coefficient: expected a finite number, got {wrong}",
            )
        assert refusal(terms(one, v1.WeightsTerm(coefficient=1))) == (
            invalid,
            "terms[1].weights_id: expected 32 bytes, got 0",
        )
        assert refusal(terms(one))[0] is grpc.StatusCode.NOT_FOUND
        assert refusal(terms(one), "wrong")[0] is grpc.StatusCode.UNAUTHENTICATED


def test_a_thousand_sets_are_combined_in_one_call(client, model):
    one = model.put_weights(zoo.wide_weights(4 * KIB, 1))
    two = model.put_weights(zoo.wide_weights(4 * KIB, 2))
    terms = [(one, 0.001), (two, -0.001)] * 1000
    found = client.combine(terms, float64=True)
    expected = summed(4 * KIB, np.float64, [(1, 0.001), (2, -0.001)] * 1000)
    assert_bits(client.get_weights(found), expected)
    assert found.id == manifests.of_structure(Structure.of(client.get_weights(found)), "w").weights_id.hex()
