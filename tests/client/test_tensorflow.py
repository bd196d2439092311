"""A remote model under TensorFlow's autodiff gives what the same local model does."""

from __future__ import annotations

import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import forwardpass_client
import forwardpass_client.tensorflow
from forwardpass_client import errors
from support import masked_models, trainable_models
from support.servers import ServerProcess
from support.trainable_models import linear_batch, perceptron_batch, sequence_batch

# Numbers of up to some tens in float32; sums are made in another order where a gradient is scaled after it was summed.
TOLERANCE = 1e-5

X, Y = perceptron_batch(5)


@pytest.fixture(scope="module")
def client():
    factories = [*trainable_models.FACTORIES, "two_outputs=support.masked_models:two_outputs"]
    arguments = [argument for factory in factories for argument in ("--factory", factory)]
    with ServerProcess(*arguments) as server, forwardpass_client.connect(server.address) as connected:
        yield connected


@pytest.fixture(scope="module")
def local():
    return trainable_models.perceptron()


@pytest.fixture(scope="module")
def remote(client):
    return forwardpass_client.tensorflow.functional_model(client.model("perceptron"))


class Counted:
    """A model whose RPCs are counted by name."""

    NAMES = ("forward_pass", "forward_backward", "predict_on_batch", "vjp", "loss")

    def __init__(self, model):
        self.calls = []
        for name in self.NAMES:
            setattr(model, name, self._counted(name, getattr(model, name)))
        self.remote = forwardpass_client.tensorflow.functional_model(model)

    def _counted(self, name, method):
        def counted(*arguments, **keywords):
            self.calls.append(name)
            return method(*arguments, **keywords)

        return counted

    def since(self):
        """The calls since the last time."""
        calls, self.calls[:] = list(self.calls), []
        return calls


@pytest.fixture
def counted(client):
    return Counted(client.model("perceptron"))


def eagerly(function, arguments):
    with tf.GradientTape() as tape:
        tape.watch(arguments)
        value = function(arguments)
    return value, tape.gradient(value, arguments)


def with_the_tape_inside(function, arguments):
    return tf.function(lambda arguments: eagerly(function, arguments), autograph=False)(arguments)


def with_the_tape_outside(function, arguments):
    return eagerly(tf.function(function, autograph=False), arguments)


WAYS = [eagerly, with_the_tape_inside, with_the_tape_outside]


def tensors(weights):
    """The weights that have derivatives, and x."""
    trainable, _ = weights
    kept = {name: tf.constant(trainable[name]) for name in ("first", "second", "embedding")}
    return kept | {"wide": tf.constant(X["wide"])}


def arguments_of(values, local):
    """The weights and x of `tensors`, whole again."""
    trainable, fixed = local.initial_weights
    weights = type(trainable)((name, values.get(name, leaf)) for name, leaf in trainable.items()), fixed
    return weights, type(X)((name, values.get(name, leaf)) for name, leaf in X.items())


def assert_same(function, way, local, remote, names=("first", "second", "embedding"), tolerance=TOLERANCE):
    """The value and the gradients of a function of (model, weights, x) are those of the local model."""
    given = {name: value for name, value in tensors(local.initial_weights).items() if name in names}
    found = way(lambda values: function(remote, *arguments_of(values, local)), given)
    expected = way(lambda values: function(local, *arguments_of(values, local)), given)
    np.testing.assert_allclose(found[0], expected[0], rtol=tolerance)
    for name in names:
        one, other = map(tf.convert_to_tensor, (found[1][name], expected[1][name]))
        assert one.dtype == other.dtype
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance, err_msg=name)


WEIGHTS_AND_X = ("first", "second", "embedding", "wide")


def own(predictions):
    return tf.reduce_sum(tf.sin(predictions))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("training", [True, False])
def test_the_gradient_of_a_forward_pass_is_that_of_the_local_model(local, remote, way, training):
    assert_same(lambda model, w, x: 3.0 * model.forward_pass(w, (x, Y), training).loss, way, local, remote)


@pytest.mark.parametrize("way", WAYS)
def test_predictions_have_gradients_with_respect_to_weights_and_x(local, remote, way):
    assert_same(lambda model, w, x: own(model.predict_on_batch(w, x)), way, local, remote, WEIGHTS_AND_X)
    assert_same(
        lambda model, w, x: own(model.forward_pass(w, {"x": x, "y": Y}).predictions), way, local, remote, WEIGHTS_AND_X
    )


@pytest.mark.parametrize("way", WAYS)
def test_loss_and_predictions_of_one_forward_pass_add_their_gradients(local, remote, way):
    def both(model, w, x):
        output = model.forward_pass(w, (x, Y))
        return output.loss + own(output.predictions)

    assert_same(both, way, local, remote)


@pytest.mark.parametrize("way", WAYS)
def test_the_loss_of_unchanged_predictions_has_a_gradient(local, remote, way):
    assert_same(lambda model, w, x: model.loss(model.predict_on_batch(w, x), Y), way, local, remote)
    assert_same(lambda model, w, x: model.loss(model.forward_pass(w, (x, Y)).predictions, Y), way, local, remote)
    rows = np.arange(5, dtype=np.float32)
    assert_same(lambda model, w, x: model.loss(model.predict_on_batch(w, x), Y, rows), way, local, remote)

    def with_a_penalty(model, w, x):
        predictions = model.predict_on_batch(w, x)
        return model.loss(predictions, Y) + own(predictions)

    assert_same(with_a_penalty, way, local, remote)


def test_a_forward_pass_makes_one_call_and_computes_gradients_only_for_a_tape(local, counted):
    weights, x = local.initial_weights, X
    value = tensors(weights)["first"]

    def loss(first):
        return counted.remote.forward_pass(arguments_of({"first": first}, local)[0], (x, Y)).loss

    loss(value)
    with tf.GradientTape():  # It does not watch the weights.
        loss(value)
    assert counted.since() == ["forward_pass", "forward_pass"]
    eagerly(loss, value)
    assert counted.since() == ["forward_backward"]
    tf.function(loss, autograph=False)(value)
    assert counted.since() == ["forward_pass"]
    with_the_tape_inside(loss, value)
    with_the_tape_outside(loss, value)
    assert counted.since() == ["forward_backward", "forward_backward"]


def test_predictions_that_no_gradient_uses_cost_no_call(local, counted):
    def loss(first):
        weights, x = arguments_of({"first": first}, local)
        predictions = counted.remote.predict_on_batch(weights, x)
        return counted.remote.loss(predictions, Y)

    for way in WAYS:
        way(loss, tensors(local.initial_weights)["first"])
        assert counted.since() == ["predict_on_batch", "forward_backward"]


def through_a_jacobian(model, kernel, rest):
    with tf.GradientTape() as tape:
        tape.watch(kernel)
        predictions = model.predict_on_batch(((kernel, rest[0]), rest[1]), linear_batch(4)[0])
    return tape.jacobian(predictions, kernel)


def through_a_loop(model, kernel, rest):
    def step(number, total):
        weights = (kernel * tf.cast(number + 1, tf.float32), rest[0]), rest[1]
        return number + 1, total + model.forward_pass(weights, linear_batch(4)).loss

    def loop(kernel):
        return tf.while_loop(lambda number, _: number < 3, step, (tf.constant(0), tf.constant(0.0)))[1]

    with tf.GradientTape() as tape:
        tape.watch(kernel)
        total = loop(kernel)
    return tape.gradient(total, kernel)


def through_a_persistent_tape(model, kernel, rest):
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(kernel)
        output = model.forward_pass(((kernel, rest[0]), rest[1]), linear_batch(4))
    return tape.gradient(output.loss, kernel) + tape.gradient(output.predictions, kernel)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("through", [through_a_jacobian, through_a_loop, through_a_persistent_tape])
def test_other_uses_of_a_tape_give_the_gradients_of_the_local_model(client, through, compiled):
    local = trainable_models.linear()
    remote = forwardpass_client.tensorflow.functional_model(client.model("linear"))
    (kernel, bias), fixed = local.initial_weights
    kernel = tf.constant(kernel)

    def differentiate(model):
        return through(model, kernel, (bias, fixed))

    run = tf.function(differentiate, autograph=False) if compiled else differentiate
    np.testing.assert_allclose(run(remote), run(local), rtol=TOLERANCE, atol=TOLERANCE)


def train(model, compile_step):
    """20 steps of SGD on variables: the weights and losses."""
    trainable, fixed = model.initial_weights
    variables = [tf.Variable(leaf) for leaf in trainable]

    def step(x, y):
        with tf.GradientTape() as tape:
            loss = model.forward_pass((tuple(variables), fixed), (x, y)).loss
        for variable, gradient in zip(variables, tape.gradient(loss, variables), strict=True):
            variable.assign_sub(0.3 * gradient)
        return loss

    compiled = tf.function(step, autograph=False, reduce_retracing=True) if compile_step else step
    losses = [float(compiled(*map(tf.constant, linear_batch(16, number)))) for number in range(20)]
    return [variable.numpy() for variable in variables], losses


class OnTensors:
    """A local model that reads variables itself: its graphs would hold them."""

    def __init__(self, model):
        self._model = model
        self.initial_weights = model.initial_weights

    def forward_pass(self, weights, batch):
        return self._model.forward_pass(tf.nest.map_structure(tf.convert_to_tensor, weights), batch)


@pytest.mark.parametrize("compile_step", [False, True])
def test_training_variables_is_that_of_the_local_model(client, compile_step):
    remote = forwardpass_client.tensorflow.functional_model(client.model("linear"))
    found, losses = train(remote, compile_step)
    expected, expected_losses = train(OnTensors(trainable_models.linear()), compile_step)
    assert losses[-1] < losses[0] / 2
    # Rounding differences add up over the steps.
    np.testing.assert_allclose(losses, expected_losses, atol=TOLERANCE)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=TOLERANCE)


def test_keras_variables_are_weights(client):
    remote = forwardpass_client.tensorflow.functional_model(client.model("linear"))
    trainable, fixed = remote.initial_weights
    variables = [keras.Variable(leaf) for leaf in trainable]
    with tf.GradientTape() as tape:
        loss = remote.forward_pass((tuple(variables), fixed), linear_batch(4)).loss
    gradients = tape.gradient(loss, [variable.value for variable in variables])
    _, expected = client.model("linear").forward_backward(remote.initial_weights, linear_batch(4))
    for one, other in zip(gradients, expected, strict=True):
        assert np.array_equal(one, other)


def test_losses_of_several_values_have_the_gradient_of_their_sum_only(client):
    local = trainable_models.sequence()
    remote = forwardpass_client.tensorflow.functional_model(client.model("sequence"))
    batch = sequence_batch(2, 4)
    kernel, bias = map(tf.constant, local.initial_weights[0][0])

    def losses(model, kernel):
        return model.forward_pass((((kernel, bias),), ()), batch).loss

    for way in WAYS:
        found = way(lambda kernel: tf.add_n(tf.nest.flatten(losses(remote, kernel))), kernel)
        expected = way(lambda kernel: tf.add_n(tf.nest.flatten(losses(local, kernel))), kernel)
        np.testing.assert_allclose(found[1], expected[1], rtol=TOLERANCE)
    with pytest.raises(errors.FunctionNotAvailable, match="sum of a loss's values"):
        eagerly(lambda kernel: losses(remote, kernel)["fit"], kernel)
    with pytest.raises(tf.errors.UnimplementedError, match="sum of a loss's values"):
        with_the_tape_inside(lambda kernel: losses(remote, kernel)["fit"], kernel)


REFUSED = {
    "x of a loss": ("wide", lambda model, w, x: model.forward_pass(w, (x, Y)).loss),
    "x of the loss of predictions": ("wide", lambda model, w, x: model.loss(model.predict_on_batch(w, x), Y)),
    "changed predictions": ("first", lambda model, w, x: model.loss(model.predict_on_batch(w, x) * 2.0, Y)),
}


@pytest.mark.parametrize("name, function", REFUSED.values(), ids=REFUSED)
def test_a_derivative_that_the_server_does_not_give_is_never_zero_or_none(local, remote, name, function):
    given = tensors(local.initial_weights)[name]

    def call(value):
        return function(remote, *arguments_of({name: value}, local))

    message = "derivatives of the loss with respect to the trainable weights only"
    with pytest.raises(errors.FunctionNotAvailable, match=message):
        eagerly(call, given)
    with pytest.raises(tf.errors.UnimplementedError, match=message):
        with_the_tape_inside(call, given)
    _, gradient = with_the_tape_outside(call, given)
    assert np.isnan(gradient).all()


def test_the_loss_of_predictions_that_a_tape_watches_has_no_gradient(local, remote):
    predictions = remote.predict_on_batch(local.initial_weights, X)
    with pytest.raises(errors.FunctionNotAvailable, match="not to x, labels, predictions"):
        eagerly(lambda predictions: remote.loss(predictions, Y), predictions)


def test_second_derivatives_are_refused(local, remote):
    def slope(first):
        def loss(first):
            return remote.forward_pass(arguments_of({"first": first}, local)[0], (X, Y)).loss

        return tf.reduce_sum(eagerly(loss, first)[1])

    first = tensors(local.initial_weights)["first"]
    with pytest.raises(errors.FunctionNotAvailable, match="first derivatives only"):
        eagerly(slope, first)
    _, gradient = eagerly(lambda first: slope(tf.stop_gradient(first)) * tf.reduce_sum(first), first)
    assert np.isfinite(gradient).all()


def test_predictions_of_a_forward_pass_of_its_own_have_no_gradient(client):
    local = trainable_models.penalised()
    remote = forwardpass_client.tensorflow.functional_model(client.model("penalised"))
    (kernel, bias), fixed = local.initial_weights

    def output(model, kernel):
        return model.forward_pass(((kernel, bias), fixed), linear_batch(4))

    kernel = tf.constant(kernel)
    found, expected = (eagerly(lambda k, m=m: output(m, k).loss, kernel)[1] for m in (remote, local))
    np.testing.assert_allclose(found, expected, rtol=TOLERANCE)
    with pytest.raises(errors.FunctionNotAvailable, match="a function of its own"):
        eagerly(lambda kernel: tf.reduce_sum(output(remote, kernel).predictions), kernel)


@pytest.mark.parametrize("compiled", [False, True])
def test_metrics_of_a_model_without_metrics_are_refused(client, compiled):
    remote = forwardpass_client.tensorflow.functional_model(client.model("without_metrics"))
    initialize = remote.initialize_metrics_state
    with pytest.raises(errors.FunctionNotAvailable, match="written without metrics"):
        tf.function(initialize, autograph=False)() if compiled else initialize()


def test_a_handle_has_gradients_with_respect_to_x_only(client, local, remote):
    handle = client.model("perceptron").put_weights(local.initial_weights)

    def of_x(weights, model):
        return lambda wide: own(model.predict_on_batch(weights, arguments_of({"wide": wide}, local)[1]))

    for way in WAYS:
        found = way(of_x(handle, remote), tf.constant(X["wide"]))
        expected = way(of_x(local.initial_weights, local), tf.constant(X["wide"]))
        np.testing.assert_allclose(found[1], expected[1], rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("compiled", [False, True])
def test_metrics_are_those_of_the_sdk(client, local, remote, compiled):
    def evaluate(model):
        output = model.forward_pass(local.initial_weights, (X, Y), False)
        state = model.update_metrics_state(model.initialize_metrics_state(), Y, output)
        return model.finalize_metrics(state)

    found = tf.function(lambda: evaluate(remote), autograph=False)() if compiled else evaluate(remote)
    expected = evaluate(client.model("perceptron"))
    assert list(found) == list(expected)
    assert float(found["mean_error"]) == float(expected["mean_error"])


@pytest.mark.parametrize("compiled", [False, True])
def test_predictions_carry_their_keras_masks(client, compiled):
    model = client.model("two_outputs")
    remote = forwardpass_client.tensorflow.functional_model(model)
    x, y = masked_models.two_outputs_batch(4, 0)

    def evaluate():
        predictions = remote.predict_on_batch(remote.initial_weights, x, False)
        masks = [leaf._keras_mask for leaf in tf.nest.flatten(predictions) if hasattr(leaf, "_keras_mask")]
        return masks, remote.loss(predictions, y)

    masks, loss = tf.function(evaluate, autograph=False)() if compiled else evaluate()
    expected = model.predict_on_batch(model.initial_weights, x, False)
    carried = [leaf.mask for leaf in tf.nest.flatten(expected) if getattr(leaf, "mask", None) is not None]
    assert len(masks) == len(carried) > 0
    assert all(np.array_equal(one, other) for one, other in zip(masks, carried, strict=True))
    assert float(loss) == float(model.loss(expected, y))


def test_specs_are_those_of_tff(local, remote):
    assert remote.input_spec == local.input_spec
    tf.nest.assert_same_structure(remote.initial_weights, local.initial_weights)


def test_arguments_that_do_not_fit_are_refused(local, remote):
    weights = local.initial_weights
    with pytest.raises(errors.ShapeMismatch, match=r"x\['wide'\]: expected float32\[None,4\], got float32\[5,2\]"):
        remote.predict_on_batch(weights, X | {"wide": tf.zeros((5, 2))})
    with pytest.raises(errors.DTypeMismatch, match=r"x\['wide'\]: expected float32\[None,4\], got string"):
        remote.predict_on_batch(weights, X | {"wide": tf.fill((5, 4), "a")})
    with pytest.raises(errors.DTypeMismatch, match=r"x\['category'\]"):
        remote.predict_on_batch(weights, X | {"category": tf.fill([5], 2**40)})
    with pytest.raises(errors.StructureMismatch, match="model_weights"):
        remote.predict_on_batch((weights[0],), X)
    with pytest.raises(TypeError, match="weights_handle"):
        remote.predict_on_batch("0" * 64, X)
    with pytest.raises(TypeError, match="expected a RemoteFunctionalModel"):
        forwardpass_client.tensorflow.functional_model(local)


def test_an_error_of_the_server_in_a_graph_keeps_its_text(local, remote):
    wrong = tf.constant(X["category"] + 10)
    predict = tf.function(lambda category: remote.predict_on_batch(local.initial_weights, X | {"category": category}))
    with pytest.raises(tf.errors.InvalidArgumentError, match="ModelRefusedInput"):
        predict(wrong)
    with pytest.raises(errors.ModelRefusedInput):
        remote.predict_on_batch(local.initial_weights, X | {"category": wrong})


def test_the_client_imports_no_autodiff_library():
    program = (
        "import sys, pkgutil, importlib, forwardpass_client\n"
        "names = [m.name for m in pkgutil.walk_packages(forwardpass_client.__path__, 'forwardpass_client.')]\n"
        "others = {'forwardpass_client.tensorflow', 'forwardpass_client.jax'}\n"
        "assert others < set(names)\n"
        "for name in names:\n"
        "    if name not in others and not name.endswith('__main__'):\n"
        "        importlib.import_module(name)\n"
        "print(sorted({'tensorflow', 'keras', 'jax', 'tensorflow_federated'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
