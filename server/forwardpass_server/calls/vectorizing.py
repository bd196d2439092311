"""Decides whether calls with different weights run one by one or as one computation, by measurements.

A group of calls runs one by one at first. When the same kind of group comes again, its computation as one is tried
beside it: the results are compared, and both are timed. From then on the faster way is taken.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import logging
import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from forwardpass.wire.dtypes import Array
from forwardpass.wire.functions import Function
from forwardpass_server.calls.model import CannotVectorize, LoadedModel, StackedPredictions
from forwardpass_server.calls.scheduling import Estimates, smoothed
from forwardpass_server.process import background
from forwardpass_server.weights import stacks
from forwardpass_server.weights.stacks import FittedWeights
from forwardpass_server.weights.store import WeightStore

_LOGGER = logging.getLogger(__name__)

# One computation takes the place of several where it needs at most this share of their time.
_WORTH = 0.8

# Trials of one kind of group before the first decision; one less where one computation is clearly slower. The first one
# makes the kernels. Later ones take at most 1 % of the time, and all trials of a model together at most 5 %.
_TRIALS = 3
_CLEARLY = 1.5
_TRIAL_SHARE = 100
_TRIALS_SHARE = 20
_LONGEST_TRIAL_S = 60.0
_RETRY_S = 0.1

# Combinations of sets of which the shared leaves are known, and those that were seen once.
_MAX_KNOWN = 1024

MAX_SETS = 256
"""The most sets of one computation."""


@dataclasses.dataclass(slots=True)
class _Times:
    """What is known of groups of one kind. Times are seconds for each set, and None if not known.

    one_by_one: of computations one by one. stacked: of one computation for all. copying: of making the stack for it.
    """

    estimates: Estimates
    one_by_one: float | None = None
    stacked: float | None = None
    copying: float | None = None
    trials: int = 0
    next_trial_s: float = 0.0

    @property
    def is_clearly_slower(self) -> bool:
        """Whether one computation took far longer than several."""
        return self.stacked is not None and self.one_by_one is not None and self.stacked > _CLEARLY * self.one_by_one

    def is_worth(self, with_copy: bool) -> bool:
        """Whether one computation is faster. with_copy: a stack has to be made for it."""
        if self.stacked is None or self.one_by_one is None:
            return False
        return self.stacked + (with_copy * (self.copying or 0.0)) <= _WORTH * self.one_by_one


@dataclasses.dataclass(eq=False, slots=True)
class Together:
    """One computation for a group.

    is_trial: its results are compared with those of computations one by one, which the callers get.
    sets: the weights in order. leaves: their stack; None to make it.
    """

    function: StackedPredictions
    sets: Sequence[FittedWeights]
    leaves: Sequence[Any] | None
    is_trial: bool
    times: _Times
    variant: _Variant
    copied_s: float = 0.0

    def compute(self, x: Sequence[Array]) -> list[Array]:
        """The predictions: see `StackedPredictions.run`. For any thread."""
        if self.leaves is None:
            began = time.perf_counter()
            self.leaves = self.function.stack(self.sets)
            self.copied_s = time.perf_counter() - began
        return self.function.run(self.leaves, x)


class _Variant:
    """The computation for sets that differ in certain leaves.

    function: None until it is prepared, or if it cannot be.
    """

    def __init__(self, differing: tuple[bool, ...]) -> None:
        self.differing = differing
        self.function: StackedPredictions | None = None
        # By the number of sets and the size of each input, both in powers of two.
        self.times: dict[tuple[int, int], _Times] = {}
        # A trial found other bits than the probe of the load.
        self.is_inexact = False
        self._set_bytes: int | None = None

    def copied_bytes(self, sets: Sequence[FittedWeights]) -> int:
        """The size of the leaves that a stack of these sets copies."""
        if self._set_bytes is None:
            self._set_bytes = stacks.copied_bytes(sets[:1], self.differing)
        return self._set_bytes * len(sets)


class Vectorizer:
    """The decisions for one model. Used on one event loop only."""

    def __init__(self, model: LoadedModel, weights: WeightStore) -> None:
        self._model = model
        self._weights = weights
        vectorization = model.description.vectorization
        self._can = not vectorization.unavailable_reason
        self._allows_rounding = vectorization.allows_rounding
        self._is_exact = self._can and not vectorization.largest_difference
        self._has_loops = model.has_loops(Function.PREDICT_ON_BATCH, False)
        self._next_trial_s = 0.0
        self._variants: dict[tuple[bool, ...], _Variant] = {}
        self._differing: collections.OrderedDict[tuple[int, ...], tuple[bool, ...]] = collections.OrderedDict()
        self._seen: collections.OrderedDict[tuple[int, ...], None] = collections.OrderedDict()
        self._preparing: set[asyncio.Task[None]] = set()

    def may(self, allow_rounding: bool) -> bool:
        """Whether a call may run as one computation with calls of other weights. allow_rounding: the call allows it."""
        return self._can and (self._is_exact or self._allows_rounding or allow_rounding)

    def choose(
        self, sets: Sequence[FittedWeights], shapes: tuple[tuple[int, ...], ...], allow_rounding: bool
    ) -> Together | None:
        """How to run a group of calls: one by one (None), or as one computation.

        sets: the weights of each call, at least two. shapes: of the inputs of each call.
        """
        if any(0 in shape for shape in shapes):
            return None
        order = stacks.key_of(sets)
        differing = self._known_differing(order, sets)
        if not any(differing):
            return None
        variant = self._variants.get(differing)
        if variant is None:
            variant = self._variants[differing] = _Variant(differing)
            self._prepare(variant)
        function = variant.function
        allow_rounding = allow_rounding or self._allows_rounding
        if function is None or (not allow_rounding and (function.difference or variant.is_inexact)):
            return None
        kind = len(sets).bit_length(), sum(map(math.prod, shapes)).bit_length()
        times = variant.times.get(kind)
        if times is None:
            times = variant.times[kind] = _Times(Estimates(self._has_loops))
        copied_bytes = variant.copied_bytes(sets)
        if not self._weights.may_stack(copied_bytes):
            return None
        leaves = self._weights.stack_of(order)
        is_repeated = order in self._seen
        if not is_repeated:
            self._seen[order] = None
            if len(self._seen) > _MAX_KNOWN:
                self._seen.popitem(last=False)
        # A stack that is kept serves the next group of the same sets too: its cost counts only for new sets.
        with_copy = leaves is None and not (is_repeated and self._weights.would_keep_stack(copied_bytes))
        # Also while one computation is used: its time is measured under the load of the callers, and so is the other.
        if time.monotonic() >= max(times.next_trial_s, self._next_trial_s):
            # No other one begins before this one has ended.
            self._next_trial_s = time.monotonic() + _LONGEST_TRIAL_S
            return Together(function, sets, leaves, True, times, variant)
        if times.is_worth(with_copy):
            return Together(function, sets, leaves, False, times, variant)
        return None

    def ran(self, together: Together, seconds: float) -> None:
        """One computation has taken the place of several. seconds: with making the stack, if that was not kept."""
        count, times = len(together.sets), together.times
        if together.copied_s:
            times.copying = smoothed(times.copying, together.copied_s / count)
            self._keep(together)
        times.stacked = smoothed(times.stacked, (seconds - together.copied_s) / count)

    def failed(self, together: Together) -> None:
        """A trial has ended without a result."""
        together.times.next_trial_s = self._next_trial_s = time.monotonic() + _RETRY_S

    def tried(self, together: Together, one_by_one_s: float, seconds: float, is_equal: bool) -> None:
        """A trial has ended. one_by_one_s: the time of the computations one by one. is_equal: with equal bits."""
        times = together.times
        times.one_by_one = smoothed(times.one_by_one, one_by_one_s / len(together.sets))
        self.ran(together, seconds)
        times.trials += 1
        now, both_s = time.monotonic(), one_by_one_s + seconds
        self._next_trial_s = now + _TRIALS_SHARE * both_s
        if times.trials >= _TRIALS - times.is_clearly_slower:
            times.next_trial_s = now + _TRIAL_SHARE * both_s
        if not is_equal and not together.function.difference and not together.variant.is_inexact:
            together.variant.is_inexact = True
            _LOGGER.warning(
                "model %s: calls with different weights had other bits as one computation than one by one: from now on "
                "only calls that allow rounding are computed together",
                self._model.description.identity,
            )

    def _known_differing(self, order: tuple[int, ...], sets: Sequence[FittedWeights]) -> tuple[bool, ...]:
        """See `stacks.differing`."""
        known = self._differing.get(order)
        if known is None:
            known = self._differing[order] = stacks.differing(sets)
            if len(self._differing) > _MAX_KNOWN:
                self._differing.popitem(last=False)
        return known

    def _keep(self, together: Together) -> None:
        order = stacks.key_of(together.sets)
        if together.leaves is not None and order in self._seen:
            self._weights.keep_stack(order, together.leaves, together.variant.copied_bytes(together.sets))

    def _prepare(self, variant: _Variant) -> None:
        task = asyncio.ensure_future(self._prepared(variant))
        self._preparing.add(task)
        task.add_done_callback(self._preparing.discard)

    async def _prepared(self, variant: _Variant) -> None:
        try:
            variant.function = await background.run(lambda: self._model.stack(variant.differing), "stack")
        except CannotVectorize as error:
            _LOGGER.info(
                "model %s: sets of weights are not computed together: %s", self._model.description.identity, error
            )
        except Exception:  # The model's code, or TensorFlow.
            _LOGGER.warning(
                "model %s: sets of weights are not computed together", self._model.description.identity, exc_info=True
            )


def are_equal(one: Sequence[Sequence[Array]], other: Sequence[Sequence[Array]]) -> bool:
    """Whether results have equal bits; NaN equals NaN."""
    return all(
        np.array_equal(first, second, equal_nan=first.dtype.kind in "fc")
        for several, others in zip(one, other, strict=True)
        for first, second in zip(several, others, strict=True)
    )
