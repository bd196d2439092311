"""forwardpass.json: what an operator says of a model beside its files."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import tensorflow as tf

from forwardpass.wire import dtypes, optimizers
from forwardpass.wire.errors import OptimizerNotSupported
from forwardpass_server.errors import ModelLoadError

FILE_NAME = "forwardpass.json"

EXACT, ROUNDING = "exact", "rounding"
"""Which differences vectorization over weights may make: none, or those of rounding."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The contents of forwardpass.json; None for what it leaves out.

    input_spec: a pair (x, y) of structures of tf.TensorSpec.
    loss, loss_weights, metrics, weighted_metrics: as `functional_model_from_keras` takes them: names or Keras
      configurations, or objects and arrays of these for several outputs.
    imports: modules that register custom Keras objects, imported before the model is read.
    sample_weight_spec: a tf.TensorSpec.
    batching: False where concurrent calls are not to be run as one batch. True changes nothing: whether they can be is
      for the model to show.
    vectorize: whether calls with different weights are computed together. "exact" (the default): where the bits of the
      results stay the same; "rounding": also where the last bits may change; False: never.
    gradients: False where forward_backward, vjp and training are not to be served. They take time at each load.
    optimizers: those for which training is prepared at the load, as `forwardpass.wire.optimizers.canonical` returns
      them; () for none.
    example_input: the name of an .npz file in the same folder with a batch that the model accepts (`example_file`).
    """

    input_spec: Any = None
    loss: Any = None
    loss_weights: Any = None
    metrics: Any = None
    weighted_metrics: Any = None
    imports: tuple[str, ...] = ()
    sample_weight_spec: Any = None
    batching: bool | None = None
    vectorize: str | bool | None = None
    example_input: str | None = None
    gradients: bool | None = None
    optimizers: tuple[str, ...] | None = None


def read(path: pathlib.Path) -> ModelConfig:
    """The configuration in a file; empty where there is none.

    Raises ModelLoadError, naming the place in the file, for what it cannot mean.
    """
    if not path.exists():
        return ModelConfig()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelLoadError(f"{FILE_NAME}: expected JSON: {error}") from None
    known = [field.name for field in dataclasses.fields(ModelConfig)]
    if not isinstance(content, dict) or not set(content) <= set(known):
        found = sorted(content) if isinstance(content, dict) else type(content).__name__
        raise ModelLoadError(f"{FILE_NAME}: expected an object with keys among {known}, got {found}")
    input_spec = content.get("input_spec")
    if input_spec is not None:
        if not isinstance(input_spec, dict) or set(input_spec) != {"x", "y"}:
            raise ModelLoadError(f"{FILE_NAME}: input_spec: expected an object with keys x and y")
        input_spec = tuple(_spec(input_spec[name], f"input_spec.{name}") for name in ("x", "y"))
    for switch in ("batching", "gradients"):
        if not isinstance(content.get(switch, True), bool):
            raise ModelLoadError(f"{FILE_NAME}: {switch}: expected true or false, got {content[switch]!r}")
    vectorize = content.get("vectorize")
    # Not only by equality: 0 equals False.
    if not (vectorize is None or vectorize is False or vectorize in (EXACT, ROUNDING)):
        raise ModelLoadError(f'{FILE_NAME}: vectorize: expected "exact", "rounding" or false, got {vectorize!r}')
    example_input = content.get("example_input")
    if example_input is not None and (not isinstance(example_input, str) or "/" in example_input):
        raise ModelLoadError(
            f"{FILE_NAME}: example_input: expected the name of an .npz file in the same folder, got {example_input!r}"
        )
    imports = content.get("imports", [])
    if not isinstance(imports, list) or not all(isinstance(name, str) and name for name in imports):
        raise ModelLoadError(f"{FILE_NAME}: imports: expected an array of names of modules, got {imports!r}")
    sample_weight = content.get("sample_weight_spec")
    return ModelConfig(
        input_spec=input_spec,
        loss=content.get("loss"),
        loss_weights=content.get("loss_weights"),
        metrics=content.get("metrics"),
        weighted_metrics=content.get("weighted_metrics"),
        imports=tuple(imports),
        batching=content.get("batching"),
        vectorize=vectorize,
        gradients=content.get("gradients"),
        optimizers=_optimizers(content.get("optimizers")),
        example_input=example_input,
        sample_weight_spec=None if sample_weight is None else _spec(sample_weight, "sample_weight_spec"),
    )


def _optimizers(value: Any) -> tuple[str, ...] | None:
    """The canonical texts of names and Keras configurations. Learning rates in them are ignored."""
    if value is None:
        return None
    if not isinstance(value, list):
        raise ModelLoadError(f"{FILE_NAME}: optimizers: expected an array, got {type(value).__name__}")
    found = []
    for index, one in enumerate(value):
        place = f"{FILE_NAME}: optimizers[{index}]"
        if not isinstance(one, (str, dict)):
            raise ModelLoadError(f"{place}: expected a name or a Keras configuration, got {type(one).__name__}")
        try:
            found.append(optimizers.canonical(one, place).text)
        except OptimizerNotSupported as error:
            raise ModelLoadError(str(error)) from None
    return tuple(found)


def _spec(value: Any, place: str) -> Any:
    """A tensor is {"dtype": "float32", "shape": [null, 28]}; other objects are dicts, arrays are tuples."""
    if isinstance(value, list):
        return tuple(_spec(item, f"{place}[{index}]") for index, item in enumerate(value))
    if not isinstance(value, dict):
        raise ModelLoadError(f"{FILE_NAME}: {place}: expected a tensor or a structure, got {value!r}")
    if set(value) != {"dtype", "shape"}:
        return {name: _spec(item, f"{place}.{name}") for name, item in value.items()}
    dtype, shape = value["dtype"], value["shape"]
    if dtype not in dtypes.BY_NAME:
        raise ModelLoadError(f"{FILE_NAME}: {place}.dtype: expected one of {sorted(dtypes.BY_NAME)}, got {dtype!r}")
    if not isinstance(shape, list) or not all(dim is None or (type(dim) is int and dim >= 0) for dim in shape):
        raise ModelLoadError(f"{FILE_NAME}: {place}.shape: expected dimensions or null, got {shape!r}")
    return tf.TensorSpec(shape, tf.dtypes.as_dtype(dtype))
