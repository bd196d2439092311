"""Runs a model's graphs in a child process before they are served, on batches of unusual sizes.

A defect of a kernel may end the process for some sizes of a batch. Then it ends the child, and the model is refused.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from forwardpass.wire import errors
from forwardpass.wire.dtypes import Array
from forwardpass.wire.functions import Function
from forwardpass.wire.specs import describe_shape
from forwardpass_server.errors import ModelLoadError
from forwardpass_server.models import examples, graphs, private_tensorflow, warming
from forwardpass_server.models.examples import Examples, Given, Shape
from forwardpass_server.models.tracing import Key, TracedModel
from forwardpass_server.models.trial_process import Killed, TimedOut, TrialProcess, Unusable

_LOGGER = logging.getLogger(__name__)

_ROWS = (1, 0, 5)
_SIZES = (1, 0, 2)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a trial found. guard: for the description. found: examples; None where the trial found none."""

    guard: str
    found: Examples | None = None


class Trial:
    """Tries models, one after another, in one child process.

    call_s: seconds that one call may take. The first call of a graph compiles it, which takes seconds for a large
      network on a busy machine.
    """

    def __init__(self, process: TrialProcess, call_s: float = 60.0) -> None:
        self._process = process
        self._call_s = call_s
        # The child process holds the functions of one model, or one variant, at a time.
        self._lock = threading.Lock()

    def start(self) -> None:
        """Starts the child process without waiting for it: its start takes as long as reading a model."""
        with self._lock:
            self._process.start()

    def judge(self, name: str, traced: TracedModel, given: Given | None) -> Verdict:
        """Tries a model. name: for the log. given: as of `examples.find`.

        Raises ModelLoadError for a model that ends the child process, or that does not end for an unusual batch.
        """
        with self._lock:
            return self._judge(name, traced, given)

    def _judge(self, name: str, traced: TracedModel, given: Given | None) -> Verdict:
        left_out = {key: reason for key, one in traced.functions.items() if (reason := _why_immovable(one))}
        child = _Child(self._process, traced, left_out, self._call_s)
        try:
            self._process.define(*child.definition())
            found, count = child.tried(given)
        except Killed as error:
            raise ModelLoadError(
                f"{child.place()} ends the process with {error.signal_name}, which is a defect of TensorFlow's "
                f"({_onednn()}): {_advice()}"
            ) from None
        except TimedOut:
            if child.is_first:
                return self._not_tried(
                    name, f"a call of {child.place()} takes longer than {self._call_s:g} s on the CPU"
                )
            raise ModelLoadError(
                f"{child.place()} does not end within {self._call_s:g} s: make the model refuse such a batch, or start "
                "the server with --no-trial if it is meant to run that long"
            ) from None
        except Unusable as error:
            return self._not_tried(name, f"the child process cannot be used: {error}")
        guard = f"tried in a child process on {count} sizes of batch, {_onednn()}"
        if left_out:
            titles = sorted({f"{function.title} ({reason})" for (function, _), reason in left_out.items()})
            guard += f"; not tried: {', '.join(titles)}"
            _LOGGER.warning("model %s: not tried in a child process: %s", name, ", ".join(titles))
        if found is not None and found.refusal:
            guard += "; predict_on_batch refused every example batch"
        return Verdict(guard, found)

    def reason_against(
        self, concrete: Any, weights: Sequence[tuple[Sequence[int], str]], batches: Sequence[Sequence[Array]]
    ) -> str:
        """Runs one function in the child process; "" if the process survives, or if the function cannot be moved there.

        weights: shape and data type of the first arguments. batches: the other arguments of each call.
        """
        if _why_immovable(concrete):
            return ""
        key = "variant"
        with self._lock:
            try:
                self._process.define(
                    list(private_tensorflow.definitions(concrete).values()), {key: _movable(concrete)}, list(weights)
                )
                for batch in batches:
                    self._process.ask(self._call_s, "run", key, True, list(batch))
            except Killed as error:
                return f"it ends the process with {error.signal_name}"
            except TimedOut:
                return f"a call takes longer than {self._call_s:g} s"
            except Unusable as error:
                return f"the child process that would try it cannot be used: {error}"
        return ""

    def _not_tried(self, name: str, reason: str) -> Verdict:
        _LOGGER.warning("model %s was not tried in a child process: %s", name, reason)
        return Verdict(f"not tried: {reason}, {_onednn()}")


def not_wanted() -> Verdict:
    """Of a server without trials."""
    return Verdict(f"not tried: the operator forbids it, {_onednn()}")


def _onednn() -> str:
    value = os.environ.get("TF_ENABLE_ONEDNN_OPTS")
    return "oneDNN as TensorFlow decides" if value is None else "oneDNN off" if value == "0" else "oneDNN on"


def _advice() -> str:
    if os.environ.get("TF_ENABLE_ONEDNN_OPTS") == "0":
        return "fix the size in input_spec, or rewrite the operation"
    return "start the server with --onednn off, or fix the size in input_spec"


def _why_immovable(concrete: Any) -> str:
    """Why a function cannot be moved to another process; "" where it can."""
    if graphs.calls_python(concrete):
        return "calls Python"
    if any(tensor.dtype in (tf.resource, tf.variant) for tensor in concrete.captured_inputs):
        return "uses a lookup table"
    return ""


def _movable(concrete: Any) -> tuple[Any, ...]:
    """What the child process needs to call a function: name, types of arguments and results, and captured arrays."""
    captured = list(concrete.captured_inputs)
    return (
        concrete.name,
        [tensor.dtype.as_datatype_enum for tensor in concrete.inputs[: -len(captured) or None]],
        [tensor.dtype.as_datatype_enum for tensor in concrete.outputs],
        [tensor.numpy() for tensor in captured],
    )


class _Child:
    """The functions of one model in the child process. Remembers the last call, for an error that names it."""

    def __init__(self, process: TrialProcess, traced: TracedModel, left_out: Mapping[Key, str], call_s: float) -> None:
        self._process = process
        self._call_s = call_s
        self._traced = traced
        self._functions = {key: one for key, one in traced.functions.items() if key not in left_out}
        self._last: tuple[Function, bool, Sequence[Array]] | None = None
        self.is_first = True

    def definition(self) -> tuple[Any, ...]:
        """The arguments of `TrialProcess.define`."""
        definitions: dict[bytes, bytes] = {}
        functions = {}
        for key, concrete in self._functions.items():
            definitions |= private_tensorflow.definitions(concrete)
            functions[key] = _movable(concrete)
        weights = [(weight.shape, weight.dtype.name) for weight in self._traced.initial_weights]
        return list(definitions.values()), functions, weights

    def tried(self, given: Given | None) -> tuple[Examples | None, int]:
        """Runs every function on every size, and returns the examples that were found, and how many sizes."""
        spec, found = self._traced.spec, None
        if (Function.PREDICT_ON_BATCH, False) in self._functions:
            found = examples.find(self, spec, (), given)
        count = 0
        for shape in _shapes(found or Examples(spec=spec, given=given)):
            for _ in warming.calls(self, self._functions, found or Examples(spec=spec, given=given), (), shape):
                pass
            self.is_first = False
            count += 1
        return found, count

    def run(self, function: Function, training: bool, leaves: Sequence[Array]) -> list[Array]:
        """See `execution.Execution.run`. leaves: without the weights, which the child process makes."""
        self._last = function, training, leaves
        has_weights = any(place in self._traced.spec.weights_places for place in self._traced.spec.arguments[function])
        kind, answer = self._process.ask(self._call_s, "run", (function, training), has_weights, list(leaves))
        if kind == "refusal":
            raise errors.ModelRefusedInput(answer)
        results: list[Array] = answer
        return results

    def place(self) -> str:
        """The last call: the function and the shapes of what it took, without the weights."""
        assert self._last is not None
        function, training, leaves = self._last
        shapes = ", ".join(describe_shape(np.shape(leaf)) for leaf in leaves)
        return f"{function.title}{' for training' if training else ''} with arguments of shape {shapes}"


def _shapes(found: Examples) -> list[Shape]:
    """The example's shape first, then unusual ones: dimensions of 1 and 0, each by itself and together, and others."""
    shape, leaves = found.shape, found.spec.x.leaves
    axes = sorted({axis for leaf in leaves for axis, dim in enumerate(leaf.shape or ()) if axis and dim is None})
    shapes = [shape, *(dataclasses.replace(shape, rows=rows) for rows in _ROWS)]
    if axes:
        second = [] if found.second is None else [found.second.other]
        shapes += [dataclasses.replace(shape, other=other) for other in (*_SIZES, *second)]
        shapes += [Shape(1, 1)]
    if len(axes) > 1:
        shapes += [dataclasses.replace(shape, axes={axis: size}) for axis in axes for size in (1, 0)]
    return shapes
