"""The functions of a remote model on lists of leaves, for autodiff libraries that call back with arrays only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

from forwardpass.wire import conform, errors
from forwardpass.wire.description import BatchOutput
from forwardpass.wire.dtypes import Array
from forwardpass.wire.specs import TensorSpec
from forwardpass_client.model import RemoteFunctionalModel
from forwardpass_client.weights_handles import WeightsHandleApi

Leaves: TypeAlias = Sequence[Any]

Weights: TypeAlias = WeightsHandleApi | Leaves
"""A handle, or the leaves of (trainable, non_trainable)."""

NO_LOSS_DERIVATIVES = (
    "the server gives the derivatives of the loss with respect to the trainable weights only, not to x, labels, "
    "predictions or non-trainable weights: for those, compute a loss of your own from predict_on_batch"
)
NO_VJP = "the server gives the derivatives of predictions with respect to the trainable weights and x only"
NO_OWN_FORWARD_PASS = (
    "the predictions of forward_pass have no derivatives, because this model's forward pass is a function of its own: "
    "use predict_on_batch"
)
NO_SECOND_DERIVATIVES = (
    "a remote model has first derivatives only; stop the gradient (tf.stop_gradient, jax.lax.stop_gradient) where a "
    "first-order method is intended"
)
NO_SEPARATE_LOSSES = (
    "the server gives the gradient of the sum of a loss's values, which are scaled differently here: use their sum or "
    "mean, or compute a loss of your own from predict_on_batch"
)


class FlatModel:
    """The functions of a remote model. Leaves are in the order of the model's trees, as values for the SDK."""

    def __init__(self, model: RemoteFunctionalModel) -> None:
        if not isinstance(model, RemoteFunctionalModel):
            raise TypeError(
                f"model: expected a RemoteFunctionalModel of connect(...).model(name), got {type(model).__name__}"
            )
        self.model = model
        self.spec = model.description.spec
        self.trainable = self.spec.weights.child(0)
        self.non_trainable = self.spec.weights.child(1)
        self.batch_output = BatchOutput(*map(self.spec.batch_output.named_child, BatchOutput._fields))

    def predict(self, weights: Weights, x: Leaves, training: bool) -> list[Array]:
        """The leaves of the predictions, and then of their masks. Raises what `predict_on_batch` raises."""
        predictions = self.model.predict_on_batch(self._weights(weights), self.spec.x.tree.unflatten(x), training)
        leaves = conform.arrange(predictions, self.spec.predictions.tree, "predictions")
        return [*map(np.asarray, leaves), *self._masks(leaves)]

    def forward(self, weights: Weights, x: Leaves, y: Leaves, training: bool) -> list[Array]:
        """The leaves of the batch output, and then of the masks. Raises what `forward_pass` raises."""
        output = self.model.forward_pass(self._weights(weights), self._batch(x, y), training)
        return self._output_leaves(output)

    def forward_backward(
        self, weights: Weights, x: Leaves, y: Leaves, sample_weight: Leaves, training: bool
    ) -> tuple[list[Array], list[Array]]:
        """The leaves of the batch output and of the masks; and those of the gradients.

        sample_weight: no leaves for no weights. Raises what the model's `forward_backward` raises.
        """
        output, gradients = self.model.forward_backward(
            self._weights(weights), self._batch(x, y), training, sample_weight=self._sample_weight(sample_weight)
        )
        return self._output_leaves(output), conform.arrange(gradients, self.spec.gradients.tree, "gradients")

    def vjp(self, weights: Weights, x: Leaves, cotangents: Leaves, training: bool) -> tuple[list[Array], list[Array]]:
        """The leaves of the cotangents of the trainable weights, and of x. Raises what the model's `vjp` raises.

        cotangents: of the predictions that have derivatives. If all are zeros, nothing is sent: the results are zeros,
          and there are none of weights that are a handle.
        """
        if not any(np.any(np.asarray(leaf)) for leaf in cotangents):
            return self._zeros(weights, x)
        weights_cotangents, x_cotangents = self.model.vjp(
            self._weights(weights),
            self.spec.x.tree.unflatten(x),
            self.spec.predictions.differentiable.tree.unflatten(cotangents),
            training,
        )
        return (
            conform.arrange(weights_cotangents, self.spec.gradients.tree, "weights_cotangents"),
            conform.arrange(x_cotangents, self.spec.x.differentiable.tree, "x_cotangents"),
        )

    def loss(self, output: Leaves, masks: Leaves, label: Leaves, sample_weight: Leaves) -> list[Array]:
        """The leaves of the loss. masks, sample_weight: no leaves for none. Raises what the model's `loss` raises."""
        loss = self.model.loss(
            self.spec.predictions.tree.unflatten(output),
            self.spec.y.tree.unflatten(label),
            self._sample_weight(sample_weight),
            mask=self._mask(masks),
        )
        return conform.arrange(loss, self.spec.loss.tree, "loss")

    def update_metrics_state(
        self, state: Leaves, labels: Leaves, batch_output: Any, masks: Leaves, sample_weight: Leaves
    ) -> list[Array]:
        """The leaves of the new state. Raises what the model's `update_metrics_state` raises."""
        updated = self.model.update_metrics_state(
            self.spec.metrics_state.tree.unflatten(state),
            self.spec.y.tree.unflatten(labels),
            batch_output,
            self._sample_weight(sample_weight),
            mask=self._mask(masks),
        )
        return conform.arrange(updated, self.spec.metrics_state.tree, "state")

    def _weights(self, weights: Weights) -> Any:
        return weights if isinstance(weights, WeightsHandleApi) else self.spec.weights.tree.unflatten(weights)

    def _batch(self, x: Leaves, y: Leaves) -> tuple[Any, Any]:
        return self.spec.x.tree.unflatten(x), self.spec.y.tree.unflatten(y)

    def _sample_weight(self, leaves: Leaves) -> Any:
        return self.spec.sample_weight.tree.unflatten(leaves) if leaves else None

    def _mask(self, leaves: Leaves) -> Any:
        return self.spec.prediction_mask.tree.unflatten(leaves) if leaves else None

    def _masks(self, predictions: Leaves) -> list[Array]:
        return [predictions[index].mask for index in self.spec.masked_leaves]

    def _output_leaves(self, output: BatchOutput) -> list[Array]:
        leaves = conform.arrange(output, self.spec.batch_output.tree, "batch_output")
        predictions = conform.arrange(output.predictions, self.batch_output.predictions.tree, "predictions")
        return [*map(np.asarray, leaves), *self._masks(predictions)]

    def _zeros(self, weights: Weights, x: Leaves) -> tuple[list[Array], list[Array]]:
        trainable = [] if isinstance(weights, WeightsHandleApi) else weights[: len(self.trainable.leaves)]
        return _zeros_like(trainable, self.trainable.leaves[: len(trainable)]), _zeros_like(x, self.spec.x.leaves)


def _zeros_like(leaves: Leaves, specs: Sequence[TensorSpec]) -> list[Array]:
    """Zeros for those leaves that have derivatives."""
    return [
        np.zeros(np.shape(leaf), spec.dtype)
        for leaf, spec in zip(leaves, specs, strict=True)
        if spec.data_type.is_differentiable
    ]


def common_scale(cotangents: Sequence[Array]) -> Array:
    """The one number in the cotangents of a loss, of shape []. Raises FunctionNotAvailable if there are several."""
    values = np.concatenate([array.reshape(-1) for array in cotangents])
    if np.any(values != values[:1]):
        raise errors.FunctionNotAvailable(NO_SEPARATE_LOSSES)
    return np.asarray(values[0] if values.size else 0, values.dtype)
