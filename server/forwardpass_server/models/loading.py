"""Loads a version of a model: reads, traces, places and warms it."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
from collections.abc import Callable, Sequence

import tensorflow as tf

from forwardpass.wire import description
from forwardpass.wire.description import Function, ModelDescription, ModelIdentity
from forwardpass.wire.dtypes import Array
from forwardpass_server.models import (
    custom_objects,
    formats,
    graphs,
    hashing,
    keras_names,
    keras_settings,
    mergeability,
    separability,
    tracing,
    warming,
)
from forwardpass_server.models import device as devices
from forwardpass_server.models.execution import Execution
from forwardpass_server.models.functional import FunctionalModel
from forwardpass_server.models.model_config import ModelConfig
from forwardpass_server.models.tracing import TracedModel
from forwardpass_server.serving.errors import ModelLoadError
from forwardpass_server.serving.models import ModelSource

FACTORY_FORMAT = "factory"


@dataclasses.dataclass(frozen=True, eq=False)
class TensorFlowModel:
    """A model on a device, ready to run: see `serving.models.LoadedModel`."""

    description: ModelDescription
    initial_weights: Sequence[Array]
    execution: Execution

    def has_loops(self, function: Function, training: bool) -> bool:
        return self.execution.has_loops(function, training)

    def run(self, function: Function, training: bool, leaves: Sequence[Array]) -> list[Array]:
        return self.execution.run(function, training, leaves)


class TensorFlowLoader:
    """Loads models onto one device: see `serving.models.ModelLoader`.

    device: as `device.choose` takes it. on_trace: called for each graph that Python builds.
    batching: whether models may be batched where they show that they can.
    imports: modules that register custom Keras objects, which every .keras file may use. They are imported first, and
      then the modules of `factories` (`module:function`): what a model is must not depend on the order of loads.

    Raises ModelLoadError where a module of `imports` cannot be imported.
    """

    def __init__(
        self,
        device: str = "auto",
        on_trace: Callable[[], None] = lambda: None,
        batching: bool = True,
        imports: Sequence[str] = (),
        factories: Sequence[str] = (),
    ) -> None:
        keras_settings.use_defaults()
        self.device = devices.choose(device)
        self.tensorflow_version: str = tf.__version__
        self._on_trace = on_trace
        self._batching = batching
        custom_objects.import_modules(imports, "--import")
        self._objects = custom_objects.registered()
        for factory in sorted(factories):
            # One that cannot be imported says so when its model is loaded.
            with contextlib.suppress(ModelLoadError):
                custom_objects.import_modules([factory.partition(":")[0]], "factory")

    def load(self, source: ModelSource) -> TensorFlowModel:
        if source.folder is not None:
            content_hash = hashing.of_folder(source.folder)
            model, format_name, config = formats.read(source.folder, self._objects)
            traced = tracing.trace(model, self._on_trace)
            if hashing.of_folder(source.folder) != content_hash:
                raise ModelLoadError("the files changed while they were read")
            if any(map(graphs.calls_python, traced.functions.values())):
                raise ModelLoadError("the model calls Python functions, which no file holds: serve it by --factory")
        else:
            model, format_name, config = from_factory(source.factory or ""), FACTORY_FORMAT, ModelConfig()
            traced = tracing.trace(model, self._on_trace)
            content_hash = hashing.of_traced(traced)
        execution = Execution(traced.functions, self.device)
        warming.warm(execution, traced.functions, traced.spec, str(source))
        described = ModelDescription(
            ModelIdentity(source.name, source.version, content_hash),
            format_name,
            warming.with_batched_leaves(execution, traced.spec),
            self._unbatchable_reason(config, traced, execution),
            mergeability.reason_against(execution, traced.spec),
        )
        # A client must be able to read it: what it could not, fails here.
        description.decode(description.encode(described))
        return TensorFlowModel(described, traced.initial_weights, execution)

    def _unbatchable_reason(self, config: ModelConfig, traced: TracedModel, execution: Execution) -> str:
        if not self._batching or config.batching is False:
            return "the operator forbids it"
        predict = traced.functions[Function.PREDICT_ON_BATCH, False]
        return separability.reason_against(execution, predict, traced.spec, traced.initial_weights)


def from_factory(factory: str) -> FunctionalModel:
    """The functional model that a Python function returns, named `module:function`.

    Raises ModelLoadError where there is no such function or it returns something else.
    """
    module_name, separator, function_name = factory.partition(":")
    if not separator:
        raise ModelLoadError(f"factory: expected module:function, got {factory!r}")
    with keras_names.of_imports():
        function = getattr(importlib.import_module(module_name), function_name, None)
    if not callable(function):
        raise ModelLoadError(f"factory: {module_name} has no function {function_name!r}")
    with keras_names.of_load():
        model = function()
    if not isinstance(model, FunctionalModel):
        raise ModelLoadError(f"factory: {factory} returned a {type(model).__name__}, expected a FunctionalModel")
    return model
