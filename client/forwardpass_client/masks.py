"""Keras masks of predictions, which mark the positions that loss and metrics leave out."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from forwardpass.wire import conform
from forwardpass.wire.description import ModelSpec
from forwardpass.wire.dtypes import Array


class MaskMissing(UserWarning):
    """Warns of predictions without a Keras mask for a loss or metrics that leave out masked positions."""


class MaskedPredictions(np.ndarray[Any, Any]):
    """Predictions that carry their Keras mask, as a Keras tensor does.

    `loss`, `update_metrics_state` and a session's `update` read the mask, and so do the losses and metrics of a local
    Keras. Copies by pickle and `copy` keep it. Arrays computed from this one, views and slices included, have no mask,
    because their positions may differ.
    """

    _keras_mask: Array | None

    def __array_finalize__(self, source: Any) -> None:
        self._keras_mask = None

    def __array_wrap__(self, array: Any, context: Any = None, return_scalar: bool = False) -> Any:
        # Results of computations are plain arrays, or numbers where numpy returns numbers.
        plain = np.asarray(array)
        return plain[()] if return_scalar or not plain.ndim else plain

    @property
    def mask(self) -> Array | None:
        """The mask, bool of shape [B, ...]: False for a position that is left out. None for an array without a mask."""
        return self._keras_mask

    def __reduce__(self) -> Any:
        return masked, (np.asarray(self), self._keras_mask)

    def __copy__(self) -> MaskedPredictions:
        return masked(np.array(self), self._keras_mask)

    def __deepcopy__(self, memo: Any) -> MaskedPredictions:
        return masked(np.array(self), None if self._keras_mask is None else self._keras_mask.copy())


def masked(predictions: Array, mask: Array | None) -> MaskedPredictions:
    """The same array, carrying its mask."""
    array = predictions.view(MaskedPredictions)
    array._keras_mask = mask
    return array


def attached(predictions: Sequence[Array], masks: Sequence[Array], spec: ModelSpec) -> list[Array]:
    """The leaves of predictions, where each masked leaf carries its mask."""
    leaves = list(predictions)
    for index, mask in zip(spec.masked_leaves, masks, strict=True):
        leaves[index] = masked(leaves[index], mask)
    return leaves


def carried(predictions: Any, spec: ModelSpec, place: str) -> tuple[Any, bool]:
    """The masks that predictions carry, structured as the model's `prediction_mask`, and whether none is missing.

    A missing mask is replaced by one that counts every position.
    Raises StructureMismatch for predictions in other containers than the model's.
    """
    leaves = conform.arrange(predictions, spec.predictions.tree, place)
    is_whole = True
    masks = []
    for index, mask_spec in zip(spec.masked_leaves, spec.prediction_mask.leaves, strict=True):
        mask = getattr(leaves[index], "_keras_mask", None)
        if mask is None:
            is_whole = False
            shape = np.shape(leaves[index])
            mask = np.ones(shape if mask_spec.shape is None else shape[: len(mask_spec.shape)], mask_spec.dtype)
        masks.append(mask)
    return spec.prediction_mask.tree.unflatten(masks), is_whole


def warn_missing(function: str, place: str, stacklevel: int) -> None:
    """Warns that every position counts. stacklevel: the number of calls between this one and the user's code."""
    warnings.warn(
        f"{function}: {place} does not carry its Keras mask, so padding counts like any other position. Pass the "
        "predictions as the model returned them, or their mask as mask=predictions.mask. To count every position "
        "without this warning, pass a mask that is all True.",
        MaskMissing,
        stacklevel=stacklevel + 1,
    )
