"""The first calls of a model, on its examples: they warm it, and find which inputs share the batch dimension."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from forwardpass.wire import errors, specs
from forwardpass.wire.description import ModelSpec
from forwardpass.wire.dtypes import Array
from forwardpass.wire.functions import Function
from forwardpass_server.models.examples import Examples, Runs, Shape
from forwardpass_server.models.tracing import Key

_LOGGER = logging.getLogger(__name__)

# Each subset of the leaves may cost two calls: models with more leaves are not probed.
_MAX_PROBED_LEAVES = 8

# Results that are arguments of other functions under another place.
_PASSED_ON = {"predictions": "output", "prediction_mask": "output_mask"}


def warm(model: Runs, functions: Iterable[Key], examples: Examples, weights: Sequence[Array], name: str) -> None:
    """Runs every function once. Raises what a function raises, unless it refuses the examples."""
    for (function, training), result in calls(model, functions, examples, weights, examples.shape):
        if isinstance(result, errors.ModelRefusedInput):
            # The model may be correct, and only accept other values.
            _LOGGER.log(
                # Keras takes sample weights only if the loss has one number for each example: this is not a fault.
                logging.INFO if function.takes_sample_weight else logging.WARNING,
                'model %s: %s%s was not warmed, since it refuses the example batch; "example_input" in '
                "forwardpass.json names a batch that it accepts: %s",
                name,
                function.title,
                " for training" if training else "",
                result,
            )
        elif isinstance(result, Exception):
            raise result


def calls(
    model: Runs, functions: Iterable[Key], examples: Examples, weights: Sequence[Array], shape: Shape
) -> Iterator[tuple[Key, list[Array] | Exception]]:
    """Runs functions, in this order, on a batch of this shape, and yields what each returned or raised.

    Results are arguments of later functions: predictions of the loss, and a batch output of the metrics. Other
    arguments are zeros.
    """
    rng = np.random.default_rng(0) if examples.is_random else None
    x = examples.x(rng, shape)
    known: dict[str, list[Array]] = {"x": x, "batch_input.x": x, **_parts(examples.spec.weights_places, weights)}
    predicted: Sequence[Sequence[int]] = examples.predicted if shape == examples.shape else ()
    for function, training in functions:
        y = examples.y(rng, shape, predicted)
        known.update({"label": y, "labels": y, "batch_input.y": y})
        leaves = [
            leaf
            for place, part in examples.spec.arguments[function].items()
            for leaf in known.get(place, [_made_up(spec, shape) for spec in part.leaves])
        ]
        try:
            results = model.run(function, training, leaves)
        except Exception as error:  # The model's code may raise anything.
            yield (function, training), error
            continue
        for place, part in _parts(examples.spec.results[function], results).items():
            known[_PASSED_ON.get(place, place)] = part
            if place == "predictions":
                predicted = [leaf.shape for leaf in part]
                specs_of = examples.spec.predictions.leaves
                known["cotangents"] = [
                    leaf for leaf, spec in zip(part, specs_of, strict=True) if spec.data_type.is_differentiable
                ]
        yield (function, training), results


def _parts(places: Mapping[str, specs.StructureSpec], leaves: Sequence[Array]) -> dict[str, list[Array]]:
    """Flat leaves by place."""
    remaining = iter(leaves)
    return {place: list(itertools.islice(remaining, len(part.leaves))) for place, part in places.items()}


def _made_up(spec: specs.TensorSpec, shape: Shape) -> Array:
    return specs.zeros(dataclasses.replace(spec, shape=tuple(shape.of(spec))))


def with_batched_leaves(model: Runs, examples: Examples, weights: Sequence[Array]) -> ModelSpec:
    """The spec with `batched` set on each leaf of x and y whose first dimension must equal the others'.

    TFF's files do not distinguish the batch dimension from other unknown dimensions, so the model is probed: a leaf is
    batched if a forward pass refuses it with 2 and with 1 examples while the other leaves have 3. (Broadcasting accepts
    1.) If some of those leaves may change their size together while the others keep theirs, as the nodes and edges of a
    graph do, there is no single batch dimension, and no leaf is marked.
    """
    spec = examples.spec
    leaves = (*spec.x.leaves, *spec.y.leaves)
    candidates = [index for index, leaf in enumerate(leaves) if leaf.shape and leaf.shape[0] is None]
    if not 2 <= len(candidates) <= _MAX_PROBED_LEAVES:
        return spec

    def accepts(sizes: Mapping[int, int]) -> bool:
        """Whether a forward pass takes the example batch, some leaves of x and y having other numbers of rows."""
        rng = np.random.default_rng(0) if examples.is_random else None
        inputs = [*examples.x(rng), *examples.y(rng)]
        for index, size in sizes.items():
            inputs[index] = inputs[index][:size]
        try:
            model.run(Function.FORWARD_PASS, False, [*weights, *inputs])
        except Exception:  # A refusal may be any exception.
            return False
        return True

    def may_differ(subset: Iterable[int]) -> bool:
        """Whether these leaves of x and y may have another number of examples than the rest."""
        return any(accepts(dict.fromkeys(subset, size)) for size in (examples.shape.rows - 1, 1))

    if not accepts({}):
        return spec
    batched = {index for index in candidates if not may_differ([index])}
    # Subsets up to half the size are enough: a subset may differ from the rest if the rest may differ from it.
    subsets = (
        subset for count in range(2, len(batched) // 2 + 1) for subset in itertools.combinations(sorted(batched), count)
    )
    if any(may_differ(subset) for subset in subsets):
        return spec
    return spec.with_input_leaves(
        [dataclasses.replace(leaf, batched=index in batched) for index, leaf in enumerate(leaves)]
    )
