"""Keras metrics, in the forms that `keras.Model.compile` and TFF take, as three pure functions of a state."""

from __future__ import annotations

import collections
import inspect
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from forwardpass_server.models import keras_names, masks
from forwardpass_server.models.functional import MetricsFns
from forwardpass_server.models.keras_losses import InvalidCompileArgument, as_keras_tensors, first_sentence
from forwardpass_server.models.private_keras import CompileMetrics, compute_output_spec

_LOGGER = logging.getLogger(__name__)


def functional_metrics(
    metrics: Any, weighted_metrics: Any, output_names: Any, y_spec: Any, predictions_spec: Any
) -> MetricsFns:
    """Keras metrics as (initialize, update, finalize), for `FunctionalModel`.

    metrics: what tff.learning.metrics.create_functional_metric_fns takes: a callable that returns a Metric or an
      OrderedDict of them, or an OrderedDict of such callables. Also a Metric, a name, a configuration, a sequence of
      these (named as the metrics are) or a mapping from names to them. These metrics count sample weights.
      For several outputs, or beside `weighted_metrics`: what `keras.Model.compile` takes, with Keras's names and
      numbers, in which only weighted metrics count sample weights. A sequence of names and configurations of another
      length than there are outputs is for each output.
    weighted_metrics: as `keras.Model.compile` takes them; not None makes `metrics` what `compile` takes, too.
    output_names: the model's, in the order of its outputs; None where it has none.
    y_spec, predictions_spec: structures of tf.TensorSpec.

    The state is a tuple of variables for each metric. Names count from the beginning for each model.
    Raises InvalidCompileArgument.
    """
    outputs = _Outputs(output_names, as_keras_tensors(y_spec), as_keras_tensors(predictions_spec))
    try:
        with keras_names.fresh():
            made = metrics() if _is_constructor(metrics) else metrics
            by_output = made if weighted_metrics is not None else outputs.as_compile_takes(made)
            if by_output is not None or weighted_metrics is not None:
                return _of_compiled(by_output, weighted_metrics, outputs)
            return _of_metrics(_resolved(made, outputs), outputs)
    except (ValueError, TypeError, KeyError) as error:
        raise InvalidCompileArgument(f"metrics: {first_sentence(error)}") from error


class _Outputs:
    """The outputs of a model, as symbolic tensors."""

    def __init__(self, names: Any, labels: Any, predictions: Any) -> None:
        self.names, self.labels, self.predictions = names, labels, predictions
        self.count = len(keras.tree.flatten(predictions))

    def as_compile_takes(self, metrics: Any) -> Any:
        """The metrics of several outputs in the form of `keras.Model.compile`; None where they have another form."""
        if isinstance(metrics, Mapping) and "class_name" not in metrics:
            nested = any(not _is_one(item) for item in metrics.values())
            if self.count == 1:
                return metrics if nested else None
            names = {*(self.names or ()), *(self.predictions if isinstance(self.predictions, Mapping) else ())}
            is_tffs = not nested and names.isdisjoint(metrics) and all(map(_is_object, metrics.values()))
            return None if is_tffs else metrics
        if self.count == 1:
            return None
        items = [metrics] if _is_one(metrics) else list(metrics)
        if (not _is_one(metrics) and len(items) == self.count) or not all(map(_is_one, items)):
            return items
        # One object cannot count for several outputs: it gets all of them at once, as in TFF.
        return None if any(map(_is_object, items)) else self._in_structure(items)

    def _in_structure(self, items: list[Any]) -> Any:
        flat = [list(items) for _ in range(self.count)]
        if isinstance(self.predictions, Mapping) and len(self.predictions) == self.count:
            return dict(zip(self.predictions, flat, strict=True))
        return flat


def _is_one(item: Any) -> bool:
    """Whether this is one metric, its name or its configuration: not a sequence or a mapping of metrics, nor None."""
    if isinstance(item, Mapping):
        return "class_name" in item
    return item is not None and (isinstance(item, str) or not isinstance(item, Sequence))


def _is_object(item: Any) -> bool:
    return isinstance(item, keras.metrics.Metric) or callable(item)


def _is_constructor(item: Any) -> bool:
    """Whether this returns metrics when it is called: a class, or a callable without required arguments."""
    if not callable(item) or isinstance(item, keras.metrics.Metric):
        return False
    try:
        inspect.signature(item).bind()
    except TypeError:
        return inspect.isclass(item)
    return True


def _resolved(metrics: Any, outputs: _Outputs) -> Any:
    """One Metric, or an OrderedDict of them."""
    if _is_one(metrics):
        return _metric(metrics, outputs)
    if isinstance(metrics, Mapping):
        return collections.OrderedDict((str(name), _metric(item, outputs)) for name, item in metrics.items())
    if not isinstance(metrics, Sequence):
        raise TypeError(f"expected Keras metrics, got {metrics!r}")
    resolved = [_metric(item, outputs) for item in metrics]
    named = collections.OrderedDict((metric.name, metric) for metric in resolved)
    if len(named) != len(resolved):
        raise ValueError(f"expected different names, got {[metric.name for metric in resolved]}")
    return named


def _metric(item: Any, outputs: _Outputs) -> keras.metrics.Metric:
    if isinstance(item, str) and item.lower() in ("accuracy", "acc"):
        # Keras chooses the kind of accuracy by the shapes of labels and predictions.
        compiled = _compiled([item], None, outputs)
        return compiled.metrics[0]
    if isinstance(item, str):
        # The name of a class or of a function. Keras names an instance of the class.
        item = keras.metrics.get(item)
    metric = _objects(item() if _is_constructor(item) else item)
    if callable(metric) and not isinstance(metric, keras.metrics.Metric):
        (metric,) = _compiled([metric], None, outputs).metrics
    if not isinstance(metric, keras.metrics.Metric):
        raise TypeError(f"expected a Keras metric, its name or its configuration, got {item!r}")
    return metric


def _objects(metrics: Any) -> Any:
    """Makes objects of configurations: `compile` would take the dict of a configuration for outputs by name."""
    if isinstance(metrics, Mapping):
        if "class_name" in metrics:
            return keras.metrics.get(dict(metrics))
        return {name: _objects(item) for name, item in metrics.items()}
    if isinstance(metrics, Sequence) and not isinstance(metrics, str):
        return [_objects(item) for item in metrics]
    return metrics() if _is_constructor(metrics) else metrics


def _compiled(metrics: Any, weighted_metrics: Any, outputs: _Outputs) -> Any:
    """Keras's own container of the metrics of all outputs, built for these shapes."""
    compiled = CompileMetrics(_objects(metrics), _objects(weighted_metrics), output_names=outputs.names)
    compute_output_spec(compiled.update_state, outputs.labels, outputs.predictions)
    return compiled


def _listed(metrics: Any) -> Any:
    return [metrics] if _is_one(metrics) else metrics


def _of_compiled(metrics: Any, weighted_metrics: Any, outputs: _Outputs) -> MetricsFns:
    """The functions of metrics in the form of `keras.Model.compile`: Keras decides which output each one counts."""
    compiled = _compiled(_listed(metrics), _listed(weighted_metrics), outputs)
    names = list(compiled.result())
    if len(names) != len(compiled.metrics):
        raise ValueError(f"expected different names, got {[metric.name for metric in compiled.metrics]}")
    named = collections.OrderedDict(zip(names, compiled.metrics, strict=True))

    def updated(state: Any, labels: Any, predictions: Any, sample_weight: Any) -> Any:
        flat = [variable for name in names for variable in state[name]]
        updated = iter(compiled.stateless_update_state(flat, labels, predictions, sample_weight))
        return _map(lambda metric: tuple(next(updated) for _ in metric.variables), named)

    return _functions(named, updated)


def _of_metrics(metrics: Any, outputs: _Outputs) -> MetricsFns:
    """The functions of metrics each of which counts all labels and predictions."""
    for metric in tf.nest.flatten(metrics):
        # Some metrics make their variables only at the first update.
        compute_output_spec(metric.update_state, outputs.labels, outputs.predictions)
        if not _takes_weights(metric):
            _LOGGER.warning("the metric %s does not accept sample weights, and ignores them", metric.name)

    def updated(state: Any, labels: Any, predictions: Any, sample_weight: Any) -> Any:
        def of_one(metric: keras.metrics.Metric, variables: list[Any]) -> Any:
            weight = {} if sample_weight is None or not _takes_weights(metric) else {"sample_weight": sample_weight}
            return tuple(metric.stateless_update_state(variables, labels, predictions, **weight))

        return _map(of_one, metrics, state)

    return _functions(metrics, updated)


def _functions(metrics: Any, updated: Callable[[Any, Any, Any, Any], Any]) -> MetricsFns:
    """Metrics as (initialize, update, finalize).

    metrics: one, or an OrderedDict of them. updated: the state after one more batch, from the state before it, labels,
    predictions with their masks, and sample weights or None.
    """

    @tf.function
    def initialize() -> Any:
        return _map(lambda metric: tuple(metric.stateless_reset_state()), metrics)

    @tf.function
    def update(
        state: Any, labels: Any, batch_output: Any, sample_weight: Any = None, prediction_mask: Any = None
    ) -> Any:
        return updated(state, labels, masks.attached(batch_output.predictions, prediction_mask), sample_weight)

    @tf.function
    def finalize(state: Any) -> Any:
        return _map(_result, metrics, state)

    return initialize, update, finalize


def _result(metric: keras.metrics.Metric, variables: list[Any]) -> Any:
    with keras.StatelessScope(state_mapping=list(zip(metric.variables, variables, strict=True))):
        try:
            result = metric.result()
        except tf.errors.OperatorNotAllowedInGraphError:
            # The metric branches on a tensor in Python, as R2Score with num_regressors does; AutoGraph converts it.
            with warnings.catch_warnings():
                # Both branches are traced, and a branch that is not taken may warn.
                warnings.simplefilter("ignore")
                result = tf.autograph.to_graph(type(metric).result)(metric)
        # A metric may return a variable. Its value comes from the state within this scope only.
        return keras.tree.map_structure(tf.convert_to_tensor, result)


def _takes_weights(metric: keras.metrics.Metric) -> bool:
    parameters = inspect.signature(metric.update_state).parameters
    return "sample_weight" in parameters or any(one.kind is one.VAR_KEYWORD for one in parameters.values())


def _map(function: Callable[..., Any], metrics: Any, *states: Any) -> Any:
    """Calls a function with each metric and its part of the states."""
    if isinstance(metrics, keras.metrics.Metric):
        return function(metrics, *map(list, states))
    return collections.OrderedDict(
        (name, function(metric, *(list(state[name]) for state in states))) for name, metric in metrics.items()
    )
