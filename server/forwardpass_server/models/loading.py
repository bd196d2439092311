"""Loads a version of a model: reads, traces, tries and warms it."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

import tensorflow as tf

from forwardpass.wire import description
from forwardpass.wire.description import ModelDescription, ModelIdentity, Vectorization
from forwardpass.wire.dtypes import Array
from forwardpass.wire.functions import Function
from forwardpass_server.calls.model import (
    CannotVectorize,
    Evaluator,
    ModelSource,
    StackedEvaluator,
    StackedPredictions,
    Trainer,
    TrainingOptions,
)
from forwardpass_server.errors import ModelLoadError
from forwardpass_server.models import (
    custom_objects,
    evaluators,
    example_file,
    examples,
    failures,
    formats,
    graphs,
    hashing,
    keras_agreement,
    keras_names,
    keras_settings,
    mergeability,
    onednn_faults,
    private_keras,
    private_tensorflow,
    separability,
    tracing,
    trial,
    warming,
)
from forwardpass_server.models import device as devices
from forwardpass_server.models.evaluators import Evaluators
from forwardpass_server.models.examples import Examples
from forwardpass_server.models.execution import Execution
from forwardpass_server.models.functional import FunctionalModel
from forwardpass_server.models.model_config import ROUNDING, ModelConfig
from forwardpass_server.models.optimizers import Probes
from forwardpass_server.models.runtime_functions import KERNELS
from forwardpass_server.models.tracing import TracedModel
from forwardpass_server.models.trainers import DEFAULT_OPTIMIZERS, Trainers
from forwardpass_server.models.training import TrainableModel
from forwardpass_server.models.trial import Trial
from forwardpass_server.models.trial_process import TrialProcess
from forwardpass_server.models.weight_stacks import GraphSource, Probed, WeightStacks
from forwardpass_server.process import garbage

_LOGGER = logging.getLogger(__name__)

FACTORY_FORMAT = "factory"

JudgementT = TypeVar("JudgementT")


@dataclasses.dataclass(frozen=True, eq=False)
class TensorFlowModel:
    """A model on a device: see `calls.model.LoadedModel`."""

    description: ModelDescription
    initial_weights: Sequence[Array]
    execution: Execution
    trainers: Trainers
    stacks: WeightStacks
    evaluators: Evaluators

    def has_loops(self, function: Function, training: bool) -> bool:
        """See `calls.model.LoadedModel.has_loops`."""
        return self.execution.has_loops(function, training)

    def run(self, function: Function, training: bool, leaves: Sequence[Array]) -> list[Array]:
        """See `calls.model.LoadedModel.run`."""
        return self.execution.run(function, training, leaves)

    @garbage.young_only()
    def stack(self, differing: Sequence[bool]) -> StackedPredictions:
        """See `calls.model.LoadedModel.stack`."""
        return self.stacks.get(differing)

    def trainer(self, options: TrainingOptions) -> Trainer | None:
        """See `calls.model.LoadedModel.trainer`."""
        return self.trainers.get(options)

    def find_trainer(self, options: TrainingOptions) -> Trainer | None:
        """See `calls.model.LoadedModel.find_trainer`."""
        return self.trainers.find(options)

    @garbage.young_only()
    def prepare_trainer(self, options: TrainingOptions) -> Trainer:
        """See `calls.model.LoadedModel.prepare_trainer`."""
        return self.trainers.prepare(options)

    def evaluator(self, weighted: bool) -> Evaluator | None:
        """See `calls.model.LoadedModel.evaluator`."""
        return self.evaluators.get(weighted)

    @garbage.young_only()
    def evaluator_of_stacks(self, weighted: bool, differing: Sequence[bool]) -> StackedEvaluator:
        """See `calls.model.LoadedModel.evaluator_of_stacks`."""
        return self.evaluators.of_stacks(weighted, differing)


class TensorFlowLoader:
    """Loads models onto one device: see `calls.model.ModelLoader`.

    device: see `device.choose`. on_trace: is called for each graph that Python builds.
    batching: whether to batch calls of batch-separable models.
    trial_process: the child process in which models are tried; None for no trials.
    imports: modules that register custom Keras objects, which every .keras file may use. They are imported first, and
      then the modules of `factories` (`module:function`), so that a model does not depend on the order of loads.

    Raises ModelLoadError where a module of `imports` cannot be imported, DeviceNotFound, and UnsupportedLibrary for a
    TensorFlow or Keras without an interface that the server needs.
    """

    def __init__(
        self,
        device: str = "auto",
        on_trace: Callable[[], None] = lambda: None,
        batching: bool = True,
        trial_process: TrialProcess | None = None,
        imports: Sequence[str] = (),
        factories: Sequence[str] = (),
    ) -> None:
        keras_settings.use_defaults()
        self.device = devices.choose(device)
        private_tensorflow.check(batching=batching, trial=trial_process is not None)
        with keras_names.fresh():
            private_keras.check()
        self.tensorflow_version: str = tf.__version__
        self._on_trace = on_trace
        self._probes = Probes(on_trace)
        self._batching = batching
        self._trial = None if trial_process is None else Trial(trial_process)
        custom_objects.import_modules(imports, "--import")
        self._objects = custom_objects.registered()
        for factory in sorted(factories):
            # A module that cannot be imported fails the load of its model.
            with contextlib.suppress(ModelLoadError):
                custom_objects.import_modules([factory.partition(":")[0]], "factory")

    @garbage.young_only()
    def load(self, source: ModelSource) -> TensorFlowModel:
        """Reads, traces, tries and warms a model.

        Raises ModelLoadError for files, code or a configuration that cannot be served, OSError for files that cannot be
        read, InvalidRequest or a subclass for specs that do not fit together, and OutOfMemory where the device has too
        little memory for the first calls.
        """
        KERNELS.clear_when_stale()
        if self._trial is not None:
            self._trial.start()
        if source.folder is not None:
            content_hash = hashing.of_folder(source.folder)
            with failures.explained(f"the files of {source}", "write the version anew"):
                model, format_name, config = formats.read(source.folder, self._objects)
            with failures.explained(f"the functions of {source}", "make input_spec, loss and metrics fit the model"):
                without_gradients = "the operator forbids it" if config.gradients is False else ""
                traced = tracing.trace(model, self._on_trace, without_gradients)
            if hashing.of_folder(source.folder) != content_hash:
                raise ModelLoadError(
                    "the files changed while they were read: load the version again when they are complete"
                )
            if any(map(graphs.calls_python, traced.functions.values())):
                raise ModelLoadError(
                    "the model calls Python functions, which a file cannot contain: serve it by --factory"
                )
        else:
            factory = source.factory or ""
            with failures.of_code(f"factory {factory}"):
                model, format_name, config = from_factory(factory), FACTORY_FORMAT, ModelConfig()
                traced = tracing.trace(model, self._on_trace)
            content_hash = hashing.of_traced(traced)
        onednn_faults.check(traced.functions.values())
        weights = traced.initial_weights
        given = None
        if source.folder is not None and config.example_input is not None:
            given = example_file.read(source.folder / config.example_input, traced.spec)
        execution = Execution(traced.functions, self.device)
        # The trial comes before any graph of the model runs in this process.
        verdict = trial.not_wanted() if self._trial is None else self._trial.judge(str(source), traced, given)
        found = verdict.found or examples.find(execution, traced.spec, weights, given)
        with failures.of_code(f"the first call of {source}"):
            warming.warm(execution, traced.functions, found, weights, str(source))
        trainable = TrainableModel.of(traced, execution, self.device)
        trainers = Trainers(trainable, found, weights, self._probes, self._on_trace)
        prepared = _prepared(trainers, config, bool(traced.updates), source)
        single = _judged(
            lambda: evaluators.prepared(
                traced.spec, traced.functions, execution, self.device, found, weights, self._on_trace
            ),
            lambda error: {},
        )
        probed = Probed(execution, found, weights, self._trial, self.device)
        stacks = self._stacks(config, traced, probed)
        without_stacks = "" if self._batching and config.vectorize is not False else "the operator forbids it"
        warnings = _warnings(model, execution, found, weights)
        for warning in warnings:
            _LOGGER.warning("model %s: %s", source, warning)
        described = ModelDescription(
            ModelIdentity(source.name, source.version, content_hash),
            format_name,
            _judged(lambda: warming.with_batched_leaves(execution, found, weights), lambda error: traced.spec),
            self._unbatchable_reason(config, traced, execution, found),
            _judged(lambda: mergeability.reason_against(execution, traced.spec, found), _unjudged),
            verdict.guard,
            tuple(warnings),
            traced.unreached_weights,
            prepared,
            _judged(lambda: stacks.judged(allows_rounding=config.vectorize == ROUNDING), _not_vectorized),
        )
        # Fails here if a client could not decode it.
        description.decode(description.encode(described))
        return TensorFlowModel(
            described, traced.initial_weights, execution, trainers, stacks, Evaluators(single, probed, without_stacks)
        )

    def _stacks(self, config: ModelConfig, traced: TracedModel, probed: Probed) -> WeightStacks:
        if not self._batching or config.vectorize is False:
            return WeightStacks(None, probed, "the operator forbids it")
        if not traced.initial_weights:
            return WeightStacks(None, probed, "the model has no weights")
        try:
            source = GraphSource.of(traced.functions[Function.PREDICT_ON_BATCH, False])
        except CannotVectorize as error:
            return WeightStacks(None, probed, str(error))
        return WeightStacks(source, probed)

    def _unbatchable_reason(
        self, config: ModelConfig, traced: TracedModel, execution: Execution, found: Examples
    ) -> str:
        if not self._batching or config.batching is False:
            return "the operator forbids it"
        predict = traced.functions[Function.PREDICT_ON_BATCH, False]
        return _judged(
            lambda: separability.reason_against(execution, predict, traced.spec, traced.initial_weights, found),
            _unjudged,
        )


def _judged(judge: Callable[[], JudgementT], otherwise: Callable[[Exception], JudgementT]) -> JudgementT:
    """The result of a probe, or `otherwise` if the probe fails: a failed probe must not fail the load."""
    try:
        return judge()
    except Exception as error:  # The model's code, or TensorFlow.
        _LOGGER.warning("a probe of the model failed", exc_info=True)
        return otherwise(error)


def _prepared(trainers: Trainers, config: ModelConfig, has_gradients: bool, source: ModelSource) -> tuple[str, ...]:
    """Prepares the trainers that the operator names, or else the default ones, and returns their optimizers.

    Raises ModelLoadError where one that the operator names cannot be used.
    """
    named = config.optimizers
    if not has_gradients:
        if named:
            raise ModelLoadError("forwardpass.json: optimizers: the model has no gradients: remove the optimizers")
        return ()
    prepared = []
    for optimizer in DEFAULT_OPTIMIZERS if named is None else named:
        try:
            trainers.prepare(TrainingOptions(optimizer=optimizer), keep=True)
        except Exception as error:  # The model's code, or Keras.
            if named is not None:
                with failures.explained("forwardpass.json: optimizers", "name others, or [] for none"):
                    raise
            _LOGGER.info("model %s: training with %s is not prepared: %s", source, optimizer, error)
            continue
        prepared.append(optimizer)
    return tuple(prepared)


def _warnings(model: FunctionalModel, execution: Execution, found: Examples, weights: Sequence[Array]) -> list[str]:
    if model.keras_model is None:
        return []
    warning = _judged(lambda: keras_agreement.warning(model.keras_model, execution, found, weights), lambda error: "")
    return [warning] if warning else []


def _unjudged(error: Exception) -> str:
    return f"it cannot be analysed: {type(error).__name__}"


def _not_vectorized(error: Exception) -> Vectorization:
    return Vectorization(f"the probe failed: {type(error).__name__}")


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
