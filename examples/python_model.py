"""A functional model written in Python: logistic regression, with metrics that take sample weights.

forwardpass-server serve --factory logistic=examples.python_model:logistic_regression
forwardpass-server export examples.python_model:logistic_regression models logistic
"""

import collections

import numpy as np
import tensorflow as tf

from forwardpass_server import FunctionalModel


@tf.function
def predict_on_batch(model_weights, x, training):
    (kernel, bias), _ = model_weights
    return tf.sigmoid(tf.linalg.matvec(x, kernel) + bias)


def loss(output, label, sample_weight=None):
    per_example = tf.keras.losses.binary_crossentropy(label[:, None], output[:, None])
    return tf.reduce_mean(per_example if sample_weight is None else per_example * sample_weight)


@tf.function
def initialize():
    return collections.OrderedDict(correct=tf.constant(0.0), seen=tf.constant(0.0))


@tf.function
def update(state, labels, batch_output, sample_weight=None):
    weight = tf.ones_like(labels) if sample_weight is None else sample_weight
    correct = tf.cast(tf.round(batch_output.predictions) == labels, tf.float32)
    return collections.OrderedDict(
        correct=state["correct"] + tf.reduce_sum(correct * weight), seen=state["seen"] + tf.reduce_sum(weight)
    )


@tf.function
def finalize(state):
    return collections.OrderedDict(accuracy=tf.math.divide_no_nan(state["correct"], state["seen"]))


def logistic_regression() -> FunctionalModel:
    return FunctionalModel(
        initial_weights=((np.zeros(4, np.float32), np.float32(0)), ()),
        predict_on_batch_fn=predict_on_batch,
        loss_fn=loss,
        metrics_fns=(initialize, update, finalize),
        input_spec=(tf.TensorSpec([None, 4], tf.float32), tf.TensorSpec([None], tf.float32)),
    )
