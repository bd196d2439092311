"""The trainers of one loaded model: those that are prepared at its load, and a bounded number of others."""

from __future__ import annotations

import collections
import dataclasses
import logging
import threading
from collections.abc import Callable, Sequence

import numpy as np

from forwardpass.wire import errors, optimizers, specs
from forwardpass.wire.dtypes import Array
from forwardpass_server.calls.model import Trainer, TrainingOptions
from forwardpass_server.models.examples import Examples
from forwardpass_server.models.optimizers import Probes, resolved
from forwardpass_server.models.training import GraphTrainer, TrainableModel

_LOGGER = logging.getLogger(__name__)

DEFAULT_OPTIMIZERS: tuple[str, ...] = tuple(
    optimizers.canonical(one).text for one in ("SGD", {"class_name": "SGD", "config": {"momentum": 0.9}}, "Adam")
)
"""The optimizers that a load prepares if the operator names no others, in their canonical form."""

# Besides those that the operator names. One takes 0.5 to 5 MiB, depending on the number of weights. Federated averaging
# with one set of options needs one; a caller who tries further options waits for each at its first use only.
_MAX_OTHERS = 16

# Spellings of the options of trainers. Each is a short text.
_MAX_NAMES = 256


class Trainers:
    """The trainers of one model. Any number of threads may use it.

    on_trace: called once for each graph that Python builds. probes: of the process.
    found, weights: examples with which a trainer is warmed.
    """

    def __init__(
        self,
        model: TrainableModel,
        found: Examples,
        weights: Sequence[Array],
        probes: Probes,
        on_trace: Callable[[], None],
    ) -> None:
        self._model = model
        self._found = found
        self._weights = weights
        self._probes = probes
        self._on_trace = on_trace
        self._preparing = threading.Lock()
        # By options whose optimizer is `resolved`. Both mappings change only while `_lock` is held.
        self._kept: dict[TrainingOptions, Trainer] = {}
        self._others: collections.OrderedDict[TrainingOptions, Trainer] = collections.OrderedDict()
        self._names: collections.OrderedDict[TrainingOptions, TrainingOptions] = collections.OrderedDict()
        self._lock = threading.Lock()

    def get(self, options: TrainingOptions) -> Trainer | None:
        """The trainer for these options; None if it is not prepared. Does not wait for a preparation."""
        with self._lock:
            name = self._names.get(options)
            if name is None:
                return None
            if name in self._others:
                self._others.move_to_end(name)
                return self._others[name]
            return self._kept.get(name)

    def find(self, options: TrainingOptions) -> Trainer | None:
        """Like `get`, and also finds a trainer whose optimizer was prepared under another spelling.

        It makes the optimizer, which takes milliseconds, and traces no graph. Raises OptimizerNotSupported.
        """
        name = dataclasses.replace(options, optimizer=resolved(options.optimizer))
        found = self.get(name)
        if found is not None:
            with self._lock:
                self._remember(options, name)
        return found

    def prepare(self, options: TrainingOptions, *, keep: bool = False) -> Trainer:
        """Prepares a trainer, or returns the one that was prepared meanwhile.

        keep: whether it is never dropped. Raises as `GraphTrainer` does.
        """
        with self._preparing:
            if (found := self.get(options)) is not None:
                return found
            name = dataclasses.replace(options, optimizer=resolved(options.optimizer))
            if (found := self.get(name)) is None:
                self._probes.check(name.optimizer)
                found = GraphTrainer(self._model, name.optimizer, options, self._on_trace)
                self._warm(found, options)
            with self._lock:
                if keep:
                    self._kept[name] = found
                elif name not in self._kept:
                    self._others[name] = found
                    while len(self._others) > _MAX_OTHERS:
                        self._others.popitem(last=False)
                self._remember(options, name)
            return found

    def _remember(self, options: TrainingOptions, name: TrainingOptions) -> None:
        """Notes a spelling. Drops spellings of trainers that are gone, and the oldest others."""
        for spelling in (options, name):
            self._names[spelling] = name
            self._names.move_to_end(spelling)
        gone = [key for key, name in self._names.items() if name not in self._others and name not in self._kept]
        for key in gone:
            del self._names[key]
        free = [key for key, name in self._names.items() if key != name]
        for key in free[: max(len(free) - _MAX_NAMES, 0)]:
            del self._names[key]

    def _warm(self, trainer: Trainer, options: TrainingOptions) -> None:
        """Runs one step on the example batch: the first one makes kernels, which takes up to seconds."""
        rng = np.random.default_rng(0) if self._found.is_random else None
        batch = [*self._found.x(rng), *self._found.y(rng)]
        if options.weighted:
            rows = self._found.shape.rows
            batch += [specs.zeros(leaf, rows) for leaf in self._model.spec.sample_weight.leaves]
        try:
            state = trainer.begin(self._weights)
            start = list(trainer.weights(state))[: len(self._model.spec.weights.child(0).leaves)]
            trainer.totals(trainer.step(state, batch, 0.01, 0.01, start))
        except errors.ModelRefusedInput as error:
            # The model may be correct, and only accept other values.
            _LOGGER.info("a trainer was not warmed, since the model refuses the example batch: %s", error)
