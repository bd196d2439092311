"""The interfaces of a loaded model and of a model loader."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any, Protocol

from forwardpass.wire.description import ModelDescription
from forwardpass.wire.dtypes import Array
from forwardpass.wire.functions import Function

Leaf = Any
"""An array, or a tensor that is on the device already."""


class LoadedModel(Protocol):
    """A model that is traced and warmed. Any number of threads may run it at once."""

    @property
    def description(self) -> ModelDescription:
        """Its identity, its specs and the functions that it has. It does not change."""

    @property
    def initial_weights(self) -> Sequence[Array]:
        """The leaves of `description.spec.weights`."""

    def has_loops(self, function: Function, training: bool) -> bool:
        """Whether a function has a loop whose length its arguments' values decide. False for a missing function."""

    def run(self, function: Function, training: bool, leaves: Sequence[Leaf]) -> list[Array]:
        """Runs one function.

        training: False for functions without `has_training`.
        leaves: those of `spec.arguments[function]`, in order. They fit their specs, and nobody changes them meanwhile.
        Returns the leaves of `spec.results[function]`, in order, as read-only arrays.
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
        """Reads, traces and warms a model. If it raises anything, this version cannot be served."""
