"""Keras losses, in the forms that `keras.Model.compile` takes, as one function of labels and predictions."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

# The public `Model.compile` would change the caller's model and build an optimizer.
from forwardpass_server.models.private_keras import CompileLoss, compute_output_spec

LossFn = Callable[..., Any]
"""(y_true, y_pred, sample_weight) -> loss."""

# The names that TensorFlow accepts at the root of a graph.
_SCOPE_NAME = re.compile(r"[A-Za-z0-9.][A-Za-z0-9_.\\/>-]*")


class InvalidCompileArgument(ValueError):
    """Keras refuses a loss or a metric for this model. The message begins with the argument's name."""


def loss_function(loss: Any, loss_weights: Any, output_names: Any, y_spec: Any, predictions_spec: Any) -> LossFn:
    """The total of the losses of all outputs, without the losses that layers add.

    loss, loss_weights: as `keras.Model.compile` takes them; a loss may also be a Keras configuration. A Loss whose
      class overrides `__call__` gets the whole structures of labels and predictions, not one output after another.
    output_names: the model's, in the order of its outputs; None where it has none.
    y_spec, predictions_spec: structures of tf.TensorSpec.

    A plain function gets labels as floats, as in Keras; one that cannot be traced with floats gets integer labels as
    integers. Those have passed through float32, which is exact up to 2**24.
    Raises InvalidCompileArgument.
    """
    if isinstance(loss, keras.losses.Loss) and type(loss).__call__ is not keras.losses.Loss.__call__:
        return loss
    try:
        leaves = _resolved(loss, None)
        try:
            return _traced(leaves, loss_weights, output_names, y_spec, predictions_spec)
        except TypeError:
            dtypes = {leaf.dtype for leaf in tf.nest.flatten(y_spec) if leaf.dtype.is_integer}
            if len(dtypes) != 1:
                raise
            return _traced(_resolved(loss, dtypes.pop()), loss_weights, output_names, y_spec, predictions_spec)
    except (ValueError, TypeError, KeyError) as error:
        raise InvalidCompileArgument(f"loss: {first_sentence(error)}") from error


def _traced(loss: Any, loss_weights: Any, output_names: Any, y_spec: Any, predictions_spec: Any) -> LossFn:
    """Keras's own container of losses, built for these specs."""
    compiled = CompileLoss(loss, loss_weights, output_names=output_names)
    if compute_output_spec(compiled, as_keras_tensors(y_spec), as_keras_tensors(predictions_spec)) is None:
        raise ValueError("expected a loss for at least one output, got None for all of them")

    def of(y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        # Keras counts the mean loss of each output in variables; a scope with values for them keeps them untouched.
        counted = [(variable, tf.zeros(variable.shape, variable.dtype)) for variable in compiled.variables]
        with keras.StatelessScope(state_mapping=counted):
            return compiled(y_true, y_pred, sample_weight)

    return of


def _resolved(loss: Any, label_dtype: tf.DType | None) -> Any:
    """A structure of losses in which configurations are objects and functions have names that TensorFlow admits."""
    if isinstance(loss, Mapping) and "class_name" not in loss:
        return {name: _resolved(item, label_dtype) for name, item in loss.items()}
    if isinstance(loss, Sequence) and not isinstance(loss, str):
        return [_resolved(item, label_dtype) for item in loss]
    if loss is None or isinstance(loss, str):
        return loss
    found = keras.losses.get(dict(loss) if isinstance(loss, Mapping) else loss)
    if not isinstance(found, keras.losses.Loss):
        return _function(found, label_dtype)
    if _SCOPE_NAME.fullmatch(found.name):
        return found
    # A copy: the object is the caller's. copy.copy would serialize it, which works for registered classes only.
    renamed = object.__new__(type(found))
    renamed.__dict__.update(found.__dict__, name=_scope_name(found.name))
    return renamed


def _function(function: Callable[..., Any], label_dtype: tf.DType | None) -> Callable[..., Any]:
    def named(y_true: Any, y_pred: Any) -> Any:
        return function(y_true if label_dtype is None else tf.cast(y_true, label_dtype), y_pred)

    named.__name__ = _scope_name(getattr(function, "__name__", type(function).__name__))
    return named


def _scope_name(name: str) -> str:
    return "loss_" + re.sub(r"[^A-Za-z0-9_]", "_", name)


def as_keras_tensors(spec: Any) -> Any:
    """Symbolic tensors for a structure of tf.TensorSpec."""
    return tf.nest.map_structure(lambda leaf: keras.KerasTensor(leaf.shape.as_list(), leaf.dtype.name), spec)


def first_sentence(error: BaseException) -> str:
    """The message of an error of Keras or TensorFlow, without the traceback and the help that they add."""
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    if text.startswith("in user code:"):
        # TensorFlow repeats the traceback; the error itself is the last line.
        text = text.rstrip().splitlines()[-1].strip()
    return text.strip().splitlines()[0] if text.strip() else type(error).__name__
