"""Functional models for training under the caller's own autodiff, each as a factory of the server."""

from __future__ import annotations

import collections
from typing import Any

import numpy as np
import tensorflow as tf

from forwardpass.wire.description import BatchOutput
from forwardpass_server import FunctionalModel

RNG_SEED = 11


def perceptron() -> FunctionalModel:
    """Two layers, weights in a dict with an integer leaf, non-trainable weights, and inputs of every kind."""

    @tf.function
    def predict_on_batch(model_weights: Any, x: Any, training: bool) -> Any:
        trainable, (offset,) = model_weights
        hidden = tf.nn.tanh(x["wide"] @ trainable["first"] + tf.gather(trainable["embedding"], x["category"]))
        logits = hidden @ trainable["second"] + offset * tf.cast(trainable["step"], tf.float32)
        return logits * 1.5 if training else logits

    def loss(output: Any, label: Any, sample_weight: Any = None) -> Any:
        squares = tf.reduce_sum((output - label) ** 2, 1)
        return tf.reduce_mean(squares if sample_weight is None else squares * sample_weight)

    @tf.function
    def initialize() -> Any:
        return collections.OrderedDict(error=tf.constant(0.0), examples=tf.constant(0))

    @tf.function
    def update(state: Any, labels: Any, batch_output: Any, sample_weight: Any = None) -> Any:
        error = tf.reduce_sum(tf.abs(batch_output.predictions - labels))
        return collections.OrderedDict(error=state["error"] + error, examples=state["examples"] + tf.shape(labels)[0])

    @tf.function
    def finalize(state: Any) -> Any:
        return collections.OrderedDict(mean_error=state["error"] / tf.cast(state["examples"], tf.float32))

    rng = np.random.default_rng(RNG_SEED)
    return FunctionalModel(
        initial_weights=(
            collections.OrderedDict(
                second=rng.normal(size=(6, 3)).astype(np.float32),
                first=rng.normal(size=(4, 6)).astype(np.float32),
                step=np.int32(2),
                embedding=rng.normal(size=(5, 6)).astype(np.float32),
            ),
            [rng.normal(size=3).astype(np.float32)],
        ),
        predict_on_batch_fn=predict_on_batch,
        loss_fn=loss,
        metrics_fns=(initialize, update, finalize),
        input_spec=(
            collections.OrderedDict(
                wide=tf.TensorSpec([None, 4], tf.float32),
                category=tf.TensorSpec([None], tf.int32),
                name=tf.TensorSpec([None], tf.string),
            ),
            tf.TensorSpec([None, 3], tf.float32),
        ),
    )


def perceptron_batch(examples: int, seed: int = 0) -> Any:
    """A batch for `perceptron`."""
    rng = np.random.default_rng(seed)
    x = collections.OrderedDict(
        wide=rng.normal(size=(examples, 4)).astype(np.float32),
        category=rng.integers(0, 5, examples).astype(np.int32),
        name=np.array([b"n"] * examples, object),
    )
    return x, rng.normal(size=(examples, 3)).astype(np.float32)


def sequence() -> FunctionalModel:
    """Sequences of any length: predictions have two free dimensions. No strings, two losses of different meaning."""

    @tf.function
    def predict_on_batch(model_weights: Any, x: Any, training: bool) -> Any:
        ((kernel, bias),), _ = model_weights
        return {"scores": x @ kernel + bias, "longest": tf.reduce_max(tf.abs(x), [1, 2])}

    def loss(output: Any, label: Any, sample_weight: Any = None) -> Any:
        return {
            "fit": tf.reduce_mean((output["scores"] - label[:, None, :]) ** 2),
            "size": tf.reduce_mean(output["longest"]) * tf.reduce_sum(output["scores"] ** 2),
        }

    rng = np.random.default_rng(RNG_SEED)
    return FunctionalModel(
        initial_weights=(
            ((rng.normal(size=(3, 2)).astype(np.float32), rng.normal(size=2).astype(np.float32)),),
            (),
        ),
        predict_on_batch_fn=predict_on_batch,
        loss_fn=loss,
        input_spec=(tf.TensorSpec([None, None, 3], tf.float32), tf.TensorSpec([None, 2], tf.float32)),
    )


def sequence_batch(examples: int, length: int, seed: int = 0) -> Any:
    """A batch for `sequence`."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(examples, length, 3)).astype(np.float32)
    return x, rng.normal(size=(examples, 2)).astype(np.float32)


def linear() -> FunctionalModel:
    """One layer on plain arrays."""

    @tf.function
    def predict_on_batch(model_weights: Any, x: Any, training: bool) -> Any:
        (kernel, bias), (scale,) = model_weights
        return (x @ kernel + bias) * scale

    rng = np.random.default_rng(RNG_SEED)
    return FunctionalModel(
        initial_weights=(
            (rng.normal(size=(4, 3)).astype(np.float32), np.zeros(3, np.float32)),
            (np.float32(1.5),),
        ),
        predict_on_batch_fn=predict_on_batch,
        loss_fn=_cross_entropy,
        input_spec=(tf.TensorSpec([None, 4], tf.float32), tf.TensorSpec([None], tf.int64)),
    )


def _cross_entropy(output: Any, label: Any, sample_weight: Any = None) -> Any:
    losses = tf.nn.sparse_softmax_cross_entropy_with_logits(label, output)
    return tf.reduce_mean(losses if sample_weight is None else losses * sample_weight)


def linear_batch(examples: int, seed: int = 0) -> Any:
    """A batch for `linear`, whose labels a linear model can learn."""
    x = np.random.default_rng(seed).normal(size=(examples, 4)).astype(np.float32)
    return x, np.argmax(x[:, :3], 1)


def penalised() -> FunctionalModel:
    """A linear model whose forward pass is a function of its own: it adds a penalty to the loss."""
    plain = linear()

    @tf.function
    def forward_pass(model_weights: Any, batch_input: Any, training: bool) -> Any:
        x, y = batch_input
        output = plain.predict_on_batch(model_weights, x, training)
        penalty = tf.reduce_sum(model_weights[0][0] ** 2)
        return BatchOutput(loss=_cross_entropy(output, y) + penalty, predictions=output, num_examples=tf.shape(x)[0])

    return FunctionalModel(
        initial_weights=plain.initial_weights,
        predict_on_batch_fn=tf.function(plain.predict_on_batch),
        loss_fn=_cross_entropy,
        input_spec=plain.input_spec,
        forward_pass_fn=forward_pass,
    )


# More than a server handles on its event loop. A load prepares three optimizers: some 50 ms for each leaf.
MANY_LEAVES = 264


def many_leaves() -> FunctionalModel:
    """Predicts multiples of x. Its trainable weights are many numbers."""

    @tf.function
    def predict_on_batch(model_weights: Any, x: Any, training: bool) -> Any:
        return x * tf.add_n(list(model_weights[0]))

    return FunctionalModel(
        initial_weights=(tuple(np.float32(index) / MANY_LEAVES for index in range(MANY_LEAVES)), ()),
        predict_on_batch_fn=predict_on_batch,
        loss_fn=lambda output, label, sample_weight=None: tf.reduce_mean((output - label) ** 2),
        metrics_fns=None,
        input_spec=(tf.TensorSpec([None], tf.float32), tf.TensorSpec([None], tf.float32)),
    )


def without_metrics() -> FunctionalModel:
    """`linear` as TFF saves it: without its metrics."""
    plain = linear()
    return FunctionalModel(
        initial_weights=plain.initial_weights,
        predict_on_batch_fn=tf.function(plain.predict_on_batch),
        loss_fn=_cross_entropy,
        metrics_fns=None,
        input_spec=plain.input_spec,
    )


FACTORIES = tuple(
    f"{name}=support.trainable_models:{name}"
    for name in ("perceptron", "sequence", "linear", "penalised", "without_metrics")
)
