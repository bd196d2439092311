"""What serving asks of a loaded model and of whoever loads it."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any, Protocol

from forwardpass.wire.description import Function, ModelDescription
from forwardpass.wire.dtypes import Array

Leaf = Any
"""An array, or one that is placed on the device already."""


class LoadedModel(Protocol):
    """A model that is traced, warmed and ready to run, on as many threads as call it."""

    @property
    def description(self) -> ModelDescription: ...

    @property
    def initial_weights(self) -> Sequence[Array]:
        """The leaves of `description.spec.weights`."""

    def has_loops(self, function: Function, training: bool) -> bool:
        """Whether a function may go on for as long as its arguments' values say. False for one that is not there."""

    def run(self, function: Function, training: bool, leaves: Sequence[Leaf]) -> list[Array]:
        """Runs one function.

        training: False for functions that make no difference.
        leaves: those of `spec.arguments[function]`, in order; they fit their specs and stay unchanged meanwhile.
        Returns the leaves of `spec.results[function]`, in order, read-only.
        Raises ModelRefusedInput, OutOfMemory, or what else the model's code raises.
        """


@dataclasses.dataclass(frozen=True, slots=True)
class ModelSource:
    """Where one version of a model comes from: a folder, or a Python factory as `module:function`."""

    name: str
    version: int
    folder: pathlib.Path | None = None
    factory: str | None = None

    def __str__(self) -> str:
        return f"{self.name}/{self.version}"


class ModelLoader(Protocol):
    """Loads models."""

    def load(self, source: ModelSource) -> LoadedModel:
        """Reads, traces and warms a model. Whatever it raises means that this version cannot be served."""
