"""The models of the workloads: factories for `forwardpass-server serve --factory`."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf
import workloads

from forwardpass_server import FunctionalModel


def _model(name: str, shape: list[int], labels: tf.TensorSpec, predict: Any, loss: Any) -> FunctionalModel:
    return FunctionalModel(
        initial_weights=workloads.weights(name),
        predict_on_batch_fn=tf.function(predict),
        loss_fn=loss,
        metrics_fns=_ACCURACY if labels.dtype == tf.int64 else None,
        input_spec=(tf.TensorSpec([None, *shape], tf.float32), labels),
    )


@tf.function
def _no_examples() -> Any:
    return {"right": tf.constant(0), "examples": tf.constant(0)}


@tf.function
def _count(state: Any, labels: Any, batch_output: Any, sample_weight: Any = None) -> Any:
    right = tf.cast(tf.argmax(batch_output.predictions, 1) == labels, tf.int32)
    return {"right": state["right"] + tf.reduce_sum(right), "examples": state["examples"] + tf.size(labels)}


@tf.function
def _ratio(state: Any) -> Any:
    return {"accuracy": state["right"] / state["examples"]}


_ACCURACY = (_no_examples, _count, _ratio)


def _cross_entropy(output: Any, label: Any, sample_weight: Any = None) -> Any:
    return tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(label, output))


def mlp(name: str = "mlp") -> FunctionalModel:
    def predict(model_weights: Any, x: Any, training: bool) -> Any:
        (w1, b1, w2, b2), _ = model_weights
        return tf.nn.relu(x @ w1 + b1) @ w2 + b2

    return _model(name, [784], tf.TensorSpec([None], tf.int64), predict, _cross_entropy)


def mlp_100() -> FunctionalModel:
    return mlp("mlp_100")


def corner_1() -> FunctionalModel:
    return _corner("corner_1")


def corner_100() -> FunctionalModel:
    return _corner("corner_100")


def _corner(name: str) -> FunctionalModel:
    """Reads ten rows of its weights, however many there are: costs the same whatever they take."""

    def predict(model_weights: Any, x: Any, training: bool) -> Any:
        return tf.matmul(x, model_weights[0][0][:10], transpose_b=True)

    return _model(name, [784], tf.TensorSpec([None], tf.int64), predict, _cross_entropy)


def cnn() -> FunctionalModel:
    def predict(model_weights: Any, x: Any, training: bool) -> Any:
        (k1, b1, k2, b2, w1, c1, w2, c2), _ = model_weights
        hidden = tf.nn.max_pool2d(tf.nn.relu(tf.nn.conv2d(x, k1, 1, "SAME") + b1), 2, 2, "SAME")
        hidden = tf.nn.max_pool2d(tf.nn.relu(tf.nn.conv2d(hidden, k2, 1, "SAME") + b2), 2, 2, "SAME")
        hidden = tf.nn.relu(tf.reshape(hidden, [-1, 1568]) @ w1 + c1)
        return hidden @ w2 + c2

    return _model("cnn", [28, 28, 1], tf.TensorSpec([None], tf.int64), predict, _cross_entropy)


def scale() -> FunctionalModel:
    def predict(model_weights: Any, x: Any, training: bool) -> Any:
        return x * model_weights[0][0]

    def loss(output: Any, label: Any, sample_weight: Any = None) -> Any:
        return tf.reduce_mean(output) - tf.reduce_mean(label)

    return _model("scale", [1024], tf.TensorSpec([None], tf.float32), predict, loss)


def total() -> FunctionalModel:
    """As `scale`, with one number for each example in its response."""

    def predict(model_weights: Any, x: Any, training: bool) -> Any:
        return tf.reduce_sum(x, 1) * model_weights[0][0]

    def loss(output: Any, label: Any, sample_weight: Any = None) -> Any:
        return tf.reduce_mean(output) - tf.reduce_mean(label)

    return _model("scale", [1024], tf.TensorSpec([None], tf.float32), predict, loss)


# Five to ten milliseconds of one core for each call.
_TURNS = 64


def turns() -> FunctionalModel:
    """Multiplies x by its weights, slowly: by as many turns of a wheel as bring every element back to its place.

    The numbers are exact, so each caller can check the answer.
    """

    @tf.function
    def predict(model_weights: Any, x: Any, training: bool) -> Any:
        scale = model_weights[0][0]
        turned = tf.eye(2 * _TURNS) * scale
        wheel = tf.roll(tf.eye(2 * _TURNS), 2, 1)
        for _ in range(_TURNS):
            turned = turned @ wheel
        return x @ turned

    return FunctionalModel(
        initial_weights=((np.float32([1]),), ()),
        predict_on_batch_fn=predict,
        loss_fn=lambda output, label, sample_weight=None: tf.reduce_sum(output),
        input_spec=(tf.TensorSpec([None, 2 * _TURNS], tf.float32), tf.TensorSpec([None], tf.int64)),
    )
