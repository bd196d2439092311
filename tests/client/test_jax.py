"""A remote model under JAX's autodiff gives what the same model does in JAX."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import forwardpass_client
import forwardpass_client.jax
from forwardpass_client import errors
from support import trainable_models
from support.servers import ServerProcess
from support.trainable_models import linear_batch, sequence_batch

# Numbers of order 1 in float32, summed in another order by XLA than by TensorFlow.
TOLERANCE = 2e-6

X, Y = linear_batch(6)


@pytest.fixture(scope="module")
def client():
    factories = [*trainable_models.FACTORIES, "wide=support.zoo:wide_24m"]
    arguments = [argument for factory in factories for argument in ("--factory", factory)]
    with ServerProcess(*arguments) as server, forwardpass_client.connect(server.address) as connected:
        yield connected


@pytest.fixture(scope="module")
def remote(client):
    return forwardpass_client.jax.functional_model(client.model("linear"))


@pytest.fixture(scope="module")
def weights(remote):
    return remote.initial_weights


def predict(weights, x):
    """`support.trainable_models.linear` in JAX."""
    (kernel, bias), (scale,) = weights
    return (x @ kernel + bias) * scale


def loss(weights, x, y=Y):
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(predict(weights, x)), y[:, None], 1))


def assert_close(found, expected, tolerance=TOLERANCE):
    assert jax.tree_util.tree_structure(found) == jax.tree_util.tree_structure(expected)
    for one, other in zip(jax.tree_util.tree_leaves(found), jax.tree_util.tree_leaves(expected), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance)


TRANSFORMATIONS = {
    "grad": jax.grad,
    "jit of grad": lambda function: jax.jit(jax.grad(function)),
    "grad of jit": lambda function: jax.grad(jax.jit(function)),
}


@pytest.mark.parametrize("differentiate", TRANSFORMATIONS.values(), ids=TRANSFORMATIONS)
def test_the_gradient_of_the_loss_is_that_of_the_local_model(remote, weights, differentiate):
    trainable, fixed = weights
    found = differentiate(lambda trainable: remote.forward_pass((trainable, fixed), (X, Y)).loss * 3)(trainable)
    assert_close(found, jax.grad(lambda trainable: loss((trainable, fixed), X) * 3)(trainable))


@pytest.mark.parametrize("differentiate", TRANSFORMATIONS.values(), ids=TRANSFORMATIONS)
@pytest.mark.parametrize("method", ["predict_on_batch", "forward_pass"])
def test_predictions_have_gradients_with_respect_to_weights_and_x(remote, weights, differentiate, method):
    def own(predictions):
        return jnp.sum(jnp.sin(predictions))

    def theirs(arguments):
        trainable, x = arguments
        if method == "predict_on_batch":
            return own(remote.predict_on_batch((trainable, weights[1]), x))
        return own(remote.forward_pass((trainable, weights[1]), {"x": x, "y": Y}).predictions)

    found = differentiate(theirs)((weights[0], X))
    expected = jax.grad(lambda arguments: own(predict((arguments[0], weights[1]), arguments[1])))((weights[0], X))
    assert_close(found, expected)


def test_loss_and_predictions_of_one_forward_pass_add_their_gradients(remote, weights):
    def theirs(trainable):
        output = remote.forward_pass((trainable, weights[1]), (X, Y))
        return output.loss + jnp.sum(output.predictions**2)

    def ours(trainable):
        return loss((trainable, weights[1]), X) + jnp.sum(predict((trainable, weights[1]), X) ** 2)

    assert_close(jax.jit(jax.grad(theirs))(weights[0]), jax.grad(ours)(weights[0]), 1e-5)


def test_results_are_those_of_the_sdk(client, remote, weights):
    expected = client.model("linear").forward_pass(weights, (X, Y), training=False)
    found = jax.jit(functools.partial(remote.forward_pass, training=False))(weights, (X, Y))
    assert isinstance(found, forwardpass_client.BatchOutput)
    assert_close(found, expected, 0)
    assert remote.loss(expected.predictions, Y, np.ones(6, np.float32)) == pytest.approx(expected.loss, rel=1e-6)


def test_each_gradient_of_a_forward_pass_is_one_call(client, remote, weights):
    calls = []
    model = client.model("linear")
    for name in ("forward_pass", "forward_backward", "predict_on_batch", "vjp"):
        method = getattr(model, name)
        setattr(model, name, lambda *a, _name=name, _method=method, **k: calls.append(_name) or _method(*a, **k))
    counted = forwardpass_client.jax.functional_model(model)
    step = jax.jit(jax.value_and_grad(lambda trainable: counted.forward_pass((trainable, weights[1]), (X, Y)).loss))
    jax.block_until_ready(step(weights[0]))
    # The first is on zeros, and tells the shapes of the results.
    assert calls == ["forward_pass", "forward_backward"]
    jax.block_until_ready(step(weights[0]))
    assert calls[2:] == ["forward_backward"]
    jax.block_until_ready(jax.jit(counted.forward_pass)(weights, (X, Y)))
    assert calls[3:] == ["forward_pass"]


def test_training_is_that_of_the_local_model(remote, weights):
    def train(one_loss):
        trainable, losses = weights[0], []
        step = jax.jit(jax.value_and_grad(one_loss))
        for number in range(20):
            x, y = linear_batch(16, number)
            value, gradient = step(trainable, x, y)
            trainable = jax.tree_util.tree_map(lambda weight, change: weight - 0.3 * change, trainable, gradient)
            losses.append(float(value))
        return trainable, losses

    found, losses = train(lambda trainable, x, y: remote.forward_pass((trainable, weights[1]), (x, y)).loss)
    expected, expected_losses = train(lambda trainable, x, y: loss((trainable, weights[1]), x, y))
    assert losses[-1] < losses[0] / 2
    # Rounding differences add up over the steps.
    assert_close(found, expected, 1e-5)
    assert losses == pytest.approx(expected_losses, abs=1e-5)


def test_a_handle_has_gradients_with_respect_to_x_only(client, remote, weights):
    handle = client.model("linear").put_weights(weights)
    found = jax.jit(jax.grad(lambda x: jnp.sum(remote.predict_on_batch(handle, x) ** 2)))(X)
    assert_close(found, jax.grad(lambda x: jnp.sum(predict(weights, x) ** 2))(X), 1e-5)


def test_vmap_makes_one_call_after_another(remote, weights):
    stacked = jax.tree_util.tree_map(lambda leaf: jnp.stack([leaf, 2 * leaf]), weights[0])
    found = jax.vmap(jax.grad(lambda trainable: remote.forward_pass((trainable, weights[1]), (X, Y)).loss))(stacked)
    assert_close(found, jax.vmap(jax.grad(lambda trainable: loss((trainable, weights[1]), X)))(stacked))


def test_shapes_with_other_free_dimensions_are_found(client):
    remote = forwardpass_client.jax.functional_model(client.model("sequence"))
    trainable, _ = remote.initial_weights
    for length in (4, 5):
        x, y = sequence_batch(2, length)

        def total(trainable, x=x, y=y):
            return sum(remote.forward_pass((trainable, ()), (x, y)).loss.values())

        def local(trainable, x=x, y=y):
            ((kernel, bias),) = trainable
            scores = x @ kernel + bias
            size = jnp.mean(jnp.max(jnp.abs(x), (1, 2))) * jnp.sum(scores**2)
            return jnp.mean((scores - y[:, None, :]) ** 2) + size

        assert_close(jax.jit(jax.grad(total))(trainable), jax.grad(local)(trainable), 1e-5)


def test_losses_of_several_values_that_are_scaled_differently_are_refused(client):
    remote = forwardpass_client.jax.functional_model(client.model("sequence"))
    batch = sequence_batch(2, 4)
    with pytest.raises(errors.FunctionNotAvailable, match="sum of a loss's values"):
        jax.grad(lambda trainable: remote.forward_pass((trainable, ()), batch).loss["fit"])(remote.initial_weights[0])


@pytest.mark.parametrize("differentiate", TRANSFORMATIONS.values(), ids=TRANSFORMATIONS)
def test_derivatives_that_the_server_does_not_give_are_refused(remote, weights, differentiate):
    message = "derivatives of the loss with respect to the trainable weights only"
    with pytest.raises(errors.FunctionNotAvailable, match=message):
        differentiate(lambda x: remote.forward_pass(weights, (x, Y)).loss)(X)
    with pytest.raises(errors.FunctionNotAvailable, match=message):
        differentiate(lambda fixed: remote.forward_pass((weights[0], fixed), (X, Y)).loss)(weights[1])
    with pytest.raises(errors.FunctionNotAvailable, match=message):
        differentiate(lambda output: remote.loss(output, Y))(predict(weights, X))
    with pytest.raises(errors.FunctionNotAvailable, match="predictions with respect to the trainable weights and x"):
        differentiate(lambda fixed: jnp.sum(remote.predict_on_batch((weights[0], fixed), X)))(weights[1])


def test_predictions_of_a_forward_pass_of_its_own_have_no_gradient(client, weights):
    remote = forwardpass_client.jax.functional_model(client.model("penalised"))
    found = jax.grad(lambda trainable: remote.forward_pass((trainable, weights[1]), (X, Y)).loss)(weights[0])
    expected = jax.grad(lambda trainable: loss((trainable, weights[1]), X) + jnp.sum(trainable[0] ** 2))(weights[0])
    assert_close(found, expected, 1e-5)
    with pytest.raises(errors.FunctionNotAvailable, match="a function of its own"):
        jax.grad(lambda trainable: jnp.sum(remote.forward_pass((trainable, weights[1]), (X, Y)).predictions))(
            weights[0]
        )


def test_second_derivatives_raise_the_error_of_jax(remote, weights):
    def total(trainable):
        return remote.forward_pass((trainable, weights[1]), (X, Y)).loss

    with pytest.raises(ValueError, match="do not support JVP"):
        jax.grad(lambda trainable: jnp.sum(jax.grad(total)(trainable)[0]))(weights[0])


def test_arrays_that_do_not_fit_are_refused_while_tracing(remote, weights):
    with pytest.raises(errors.ShapeMismatch, match=r"x: expected float32\[None,4\], got float32\[6,2\]"):
        jax.jit(remote.predict_on_batch)(weights, X[:, :2])
    with pytest.raises(errors.StructureMismatch, match="model_weights"):
        remote.predict_on_batch((weights[0],), X)
    with pytest.raises(errors.DTypeMismatch, match="y: expected int64"):
        remote.forward_pass(weights, (X, Y + 0.5))


def test_models_with_strings_and_other_objects_are_refused(client):
    with pytest.raises(errors.DTypeMismatch, match=r"x\['name'\]: expected numbers: JAX has no strings"):
        forwardpass_client.jax.functional_model(client.model("perceptron"))
    with pytest.raises(TypeError, match="expected a RemoteFunctionalModel"):
        forwardpass_client.jax.functional_model("linear")


def test_large_weights_do_not_block_a_compiled_program(client):
    remote = forwardpass_client.jax.functional_model(client.model("wide"))
    vector = jnp.ones(6 * 2**20, jnp.float32)
    x = np.full((2, 4), 0.5, np.float32)
    step = jax.jit(jax.grad(lambda vector: jnp.sum(remote.predict_on_batch(((vector * 2.0,), ()), x))))
    for _ in range(3):
        # The sum of x, times 2 for the scaling of the vector: exact in float32.
        assert np.array_equal(step(vector), np.full(vector.shape, 8, np.float32))
