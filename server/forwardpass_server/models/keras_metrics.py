"""Keras metrics as three pure functions of a state, and Keras losses by name or object."""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from forwardpass_server.models import masks
from forwardpass_server.models.functional import MetricsFns


def resolve_loss(loss: Any) -> Callable[..., Any]:
    """A loss as a callable of (y_true, y_pred, sample_weight=).

    loss: a keras.losses.Loss, its configuration as a dict, a name that Keras knows, or a callable of
    (y_true, y_pred). Names and plain callables give the mean over the batch.
    Raises ValueError for a name or configuration that Keras does not know.
    """
    found = keras.losses.get(loss)
    if isinstance(found, keras.losses.Loss):
        return found
    if not callable(found):
        raise ValueError(f"loss: expected a Keras loss, its name or its configuration, got {loss!r}")
    return _MeanLoss(found)


class _MeanLoss(keras.losses.Loss):
    """The mean of a function that gives one loss for each example."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(name=getattr(function, "__name__", None), reduction="sum_over_batch_size")
        self._function = function

    def call(self, y_true: Any, y_pred: Any) -> Any:
        return self._function(y_true, y_pred)


def resolve_metrics(metrics: Any) -> Any:
    """Metrics as one keras.metrics.Metric or an OrderedDict of them.

    metrics: what tff.learning.metrics.create_functional_metric_fns takes: a callable that returns a Metric or an
    OrderedDict of them, or an OrderedDict of such callables. Also a Metric, a name, a configuration, a sequence of
    these (named as the metrics are) or a mapping from names to them.
    Raises ValueError or TypeError for what is no metric, and for two of one name.
    """
    if isinstance(metrics, Mapping) and "class_name" not in metrics:
        return collections.OrderedDict((str(name), _metric(item)) for name, item in metrics.items())
    if isinstance(metrics, Sequence) and not isinstance(metrics, str):
        resolved = [_metric(item) for item in metrics]
        named = collections.OrderedDict((metric.name, metric) for metric in resolved)
        if len(named) != len(resolved):
            raise ValueError(f"metrics: two of one name among {[metric.name for metric in resolved]}")
        return named
    if callable(metrics) and not isinstance(metrics, keras.metrics.Metric):
        made = metrics()
        return made if isinstance(made, keras.metrics.Metric) else resolve_metrics(made)
    return _metric(metrics)


def _metric(item: Any) -> keras.metrics.Metric:
    if isinstance(item, str) and item in ("accuracy", "acc", "crossentropy", "ce"):
        # Keras's compile() guesses what these mean from shapes it has not seen here.
        raise ValueError(f"metrics: {item!r} is ambiguous; name the metric, such as 'SparseCategoricalAccuracy'")
    metric = keras.metrics.get(item)
    if callable(metric) and not isinstance(metric, keras.metrics.Metric):
        metric = metric()
    if not isinstance(metric, keras.metrics.Metric):
        raise TypeError(f"metrics: expected a Keras metric, its name or its configuration, got {item!r}")
    return metric


def functional_metrics(metrics: Any, example_labels: Any, example_predictions: Any) -> MetricsFns:
    """Keras metrics as (initialize, update, finalize), for `FunctionalModel`.

    metrics: as `resolve_metrics` returns them. The state is a tuple of the metric's variables, for each metric.
    example_labels, example_predictions: any batch of y_true and y_pred.
    """
    for metric in tf.nest.flatten(metrics):
        # Some metrics make their variables only at the first update.
        metric.update_state(example_labels, example_predictions)
        metric.reset_state()

    @tf.function
    def initialize() -> Any:
        return tf.nest.map_structure(lambda metric: tuple(metric.stateless_reset_state()), metrics)

    @tf.function
    def update(
        state: Any, labels: Any, batch_output: Any, sample_weight: Any = None, prediction_mask: Any = None
    ) -> Any:
        weight = {} if sample_weight is None else {"sample_weight": sample_weight}
        predictions = masks.attached(batch_output.predictions, prediction_mask)
        return _map(
            lambda metric, variables: tuple(metric.stateless_update_state(variables, labels, predictions, **weight)),
            metrics,
            state,
        )

    @tf.function
    def finalize(state: Any) -> Any:
        return _map(lambda metric, variables: metric.stateless_result(variables), metrics, state)

    return initialize, update, finalize


def _map(function: Callable[..., Any], metrics: Any, state: Any) -> Any:
    if isinstance(metrics, keras.metrics.Metric):
        return function(metrics, list(state))
    return collections.OrderedDict((name, function(metric, list(state[name]))) for name, metric in metrics.items())
