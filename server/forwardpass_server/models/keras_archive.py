"""Reads a .keras file: its model, and the arguments of `Model.compile` that it was saved with."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
import re
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from forwardpass_server.errors import ModelLoadError
from forwardpass_server.models import private_keras
from forwardpass_server.models.keras_losses import InvalidCompileArgument, first_sentence
from forwardpass_server.models.model_config import FILE_NAME, ModelConfig

# Keras's messages for unknown custom objects in files, and in short configurations.
_UNKNOWN_OBJECTS = (
    re.compile(
        r"Could not locate (?P<kind>\w+) '(?P<name>[^']*)'.*?(?:config: \{'module': '(?P<module>[^']*)'|$)", re.S
    ),
    re.compile(r"Could not interpret (?P<kind>\w+) identifier: \{.*'class_name': '(?P<name>[^']*>[^']*)'"),
)


class KerasArchive:
    """A .keras file. It is loaded in Keras's safe mode only. Raises ModelLoadError for another file."""

    def __init__(self, path: pathlib.Path) -> None:
        self._path = path
        try:
            with zipfile.ZipFile(path) as archive:
                self._text = archive.read("config.json")
            self._config = json.loads(self._text)
        except (zipfile.BadZipFile, KeyError, ValueError) as error:
            raise ModelLoadError(
                f"{path.name}: not a .keras file of Keras 3 ({error}): write it by model.save('NAME.keras')"
            ) from None

    @property
    def name(self) -> str:
        """The file's name."""
        return self._path.name

    def model(self) -> keras.Model:
        """The model with its weights and without an optimizer. Seeds that the file lacks are derived from its content.

        Raises ModelLoadError for custom objects that are not registered, and what Keras raises.
        """
        try:
            model = keras.saving.load_model(self._path, compile=False, safe_mode=True)
        except (TypeError, ValueError) as error:
            unknown = unknown_object(error)
            if unknown is None:
                raise
            raise ModelLoadError(f"{self._path.name}: {unknown}") from error
        self._seed(model)
        return model

    def _seed(self, model: keras.Model) -> None:
        """Seeds the random number generators that were made without a seed, by the file's content and their index.

        Keras would draw other seeds at each load, since files do not hold the state of generators.
        """
        for index, generator in enumerate(private_keras.seed_generators(model)):
            if generator.get_config()["seed"] is None:
                digest = hashlib.sha256(self._text + b"\0%d" % index).digest()
                # In the range of Keras's own seeds.
                generator.state.assign([int.from_bytes(digest[:8], "big") % 10**9 + 1, 0])

    def with_defaults(self, config: ModelConfig, model: keras.Model) -> ModelConfig:
        """The configuration, completed by what the model was compiled with and by the shapes that follow from it.

        That of a model that was never compiled stays as it is.

        Raises ModelLoadError for what is compiled in and cannot be read in safe mode, InvalidCompileArgument for a loss
        that Keras does not know.
        """
        compiled = self._config.get("compile_config")
        if not compiled:
            return config
        found: dict[str, Any] = {}
        if config.loss is None:
            found["loss"] = self._compiled(compiled, "loss")
            if config.loss_weights is None:
                found["loss_weights"] = self._compiled(compiled, "loss_weights")
        if config.metrics is None:
            found["metrics"] = self._compiled(compiled, "metrics")
        if config.weighted_metrics is None:
            found["weighted_metrics"] = self._compiled(compiled, "weighted_metrics")
            if found.get("metrics") is not None and found["weighted_metrics"] is None:
                # None would make metrics count sample weights: see `keras_metrics.functional_metrics`.
                found["weighted_metrics"] = []
        config = dataclasses.replace(config, **found)
        if config.input_spec is None:
            config = dataclasses.replace(config, input_spec=_input_spec(model, config.loss))
        return config

    def _compiled(self, compiled: Mapping[str, Any], name: str) -> Any:
        try:
            return keras.saving.deserialize_keras_object(compiled.get(name))
        except (TypeError, ValueError) as error:
            reason = unknown_object(error) or f"{first_sentence(error)} Name another {name} in {FILE_NAME}."
            raise ModelLoadError(f"{self._path.name}: {name} that it was compiled with: {reason}") from error


def unknown_object(error: BaseException | None) -> str | None:
    """The custom object that Keras did not find, and what to do; None if the error has another cause."""
    while error is not None:
        for found in filter(None, (pattern.search(str(error)) for pattern in _UNKNOWN_OBJECTS)):
            named = found.groupdict()
            home = f" of module {named['module']}" if named.get("module") else ""
            return (
                f"the custom {named['kind']} {named['name']!r}{home} is not registered: name the module that registers "
                f'it by --import MODULE, or by "imports" in {FILE_NAME}'
            )
        error = error.__cause__ or error.__context__
    return None


def _input_spec(model: keras.Model, loss: Any) -> Any:
    """(x, y) where they follow from the model's inputs and outputs and its losses; None where they do not."""
    if loss is None:
        return None
    if isinstance(model, keras.Sequential):
        try:
            (inputs,), (outputs,) = model.inputs, model.outputs
        except ValueError:  # It was saved before it had a shape.
            return None
    elif isinstance(model, private_keras.Functional):
        inputs, outputs = model.input, model.output
    else:
        return None
    labels = _labels(loss, outputs, getattr(model, "output_names", ()))
    return None if labels is None else (_specs(inputs), _specs(labels))


def _specs(tensors: Any) -> Any:
    """tf.TensorSpecs for symbolic tensors, in dicts and tuples."""
    if isinstance(tensors, Mapping):
        return {name: _specs(tensor) for name, tensor in tensors.items()}
    if isinstance(tensors, (list, tuple)):
        return tuple(map(_specs, tensors))
    return tf.TensorSpec(tensors.shape, tensors.dtype)


def _labels(loss: Any, outputs: Any, output_names: Sequence[str]) -> Any:
    """Symbolic tensors of y: like the outputs, without the last dimension where a loss takes class numbers."""
    count = len(keras.tree.flatten(outputs))
    if isinstance(loss, Mapping) and "class_name" not in loss:
        # keras.tree sorts the keys of a dict.
        names = sorted(outputs) if isinstance(outputs, Mapping) else list(output_names)
        losses = [loss.get(name) for name in names]
    else:
        losses = list(loss) if isinstance(loss, (list, tuple)) else [loss] * count
    if len(losses) != count:
        return None
    labels = [_label(one, output) for one, output in zip(losses, keras.tree.flatten(outputs), strict=True)]
    return None if any(label is None for label in labels) else keras.tree.pack_sequence_as(outputs, labels)


_LIKE_OUTPUT = {
    cls().fn
    for cls in (
        keras.losses.BinaryCrossentropy,
        keras.losses.BinaryFocalCrossentropy,
        keras.losses.CategoricalCrossentropy,
        keras.losses.CategoricalFocalCrossentropy,
        keras.losses.CategoricalHinge,
        keras.losses.CosineSimilarity,
        keras.losses.Dice,
        keras.losses.Hinge,
        keras.losses.Huber,
        keras.losses.KLDivergence,
        keras.losses.LogCosh,
        keras.losses.MeanAbsoluteError,
        keras.losses.MeanAbsolutePercentageError,
        keras.losses.MeanSquaredError,
        keras.losses.MeanSquaredLogarithmicError,
        keras.losses.Poisson,
        keras.losses.SquaredHinge,
        keras.losses.Tversky,
    )
}
"""Functions of losses whose labels are shaped like the output."""

_CLASS_NUMBERS = keras.losses.SparseCategoricalCrossentropy().fn


def _label(loss: Any, output: Any) -> Any:
    """The symbolic tensor of one output's labels; None where it is not certain."""
    if loss is None or (isinstance(loss, str) and loss.lower() in ("crossentropy", "ce")):
        return None
    try:
        loss = keras.losses.get(dict(loss) if isinstance(loss, Mapping) else loss)
    except (TypeError, ValueError) as error:
        raise InvalidCompileArgument(f"loss: {first_sentence(error)}") from error
    function = getattr(loss, "fn", loss)
    if function is _CLASS_NUMBERS:
        is_last = not isinstance(loss, keras.losses.Loss) or loss.get_config().get("axis", -1) == -1
        return keras.KerasTensor(output.shape[:-1], "int64") if is_last else None
    return output if function in _LIKE_OUTPUT else None
