"""Specs and descriptions of models, to messages and back."""

from __future__ import annotations

import collections
import copy
import dataclasses
import pickle

import pytest

from forwardpass import v1
from forwardpass.wire import description, dtypes, errors, specs
from forwardpass.wire.description import (
    BatchOutput,
    Function,
    ModelDescription,
    ModelIdentity,
    ModelSpec,
    Vectorization,
)
from forwardpass.wire.specs import StructureSpec, TensorSpec

FLOAT = dtypes.BY_NAME["float32"]
X = TensorSpec((None, 2), FLOAT, batched=True)
Y = TensorSpec((None,), dtypes.BY_NAME["int64"], batched=True)
LOSS = TensorSpec((), FLOAT)


def model_spec(**changes) -> ModelSpec:
    fields = {
        "weights": StructureSpec.of(((TensorSpec((2, 3), FLOAT),), ())),
        "input": StructureSpec.of((X, Y)),
        "predictions": StructureSpec.of(TensorSpec(None, FLOAT)),
        "batch_output": StructureSpec.of(BatchOutput(LOSS, X, None)),
        "sample_weight": StructureSpec.of(TensorSpec((None,), FLOAT)),
        "loss": StructureSpec.of(LOSS),
        "metrics_state": StructureSpec.of(collections.OrderedDict(b=[LOSS], a=(LOSS,))),
        "metrics": StructureSpec.of(collections.OrderedDict(b=LOSS, a=LOSS)),
        "unavailable": {Function.WEIGHTED_LOSS: "it knows no weights"},
        "has_own_forward_pass": True,
        "unused_batch_output_fields": frozenset({"loss"}),
    }
    return ModelSpec(**{**fields, **changes})


def test_a_description_is_decoded_unchanged():
    whole = ModelDescription(ModelIdentity("m", 3, b"\x01" * 32), "keras", model_spec())
    assert description.decode(v1.ModelDescription.FromString(description.encode(whole).SerializeToString())) == whole


@pytest.mark.parametrize(
    "vectorization, shown",
    [
        (Vectorization("Conv2D"), "no: Conv2D"),
        (Vectorization("", 0.0), "yes, with equal bits"),
        (Vectorization("", 5e-7), "only for calls that allow differences up to 5.0e-07 of the largest number"),
        (Vectorization("", 5e-7, True), "yes, with differences up to 5.0e-07 of the largest number"),
    ],
)
def test_vectorization_is_described(vectorization, shown):
    whole = ModelDescription(ModelIdentity("m", 1, b""), "f", model_spec(), vectorization=vectorization)
    assert description.decode(description.encode(whole)).vectorization == vectorization
    assert ("vectorization over weights", shown) in description.facts(whole)


def test_a_server_that_cannot_vectorize_does_not_describe_it():
    message = description.encode(ModelDescription(ModelIdentity("m", 1, b""), "f", model_spec()))
    message.ClearField("vectorization")
    assert description.decode(message).vectorization.unavailable_reason


def test_every_dtype_can_stand_in_a_spec():
    spec = StructureSpec.of([TensorSpec((None, 0, 5), dtype) for dtype in dtypes.ALL])
    assert specs.decode(specs.encode(spec)) == spec


def test_every_function_is_described():
    message = description.encode(ModelDescription(ModelIdentity("m", 1, b""), "f", model_spec()))
    assert {item.function for item in message.functions} == set(v1.Function.values()) - {0}
    assert set(model_spec().arguments) == set(model_spec().results) == set(Function)


def test_an_unknown_function_of_a_newer_server_is_ignored():
    message = description.encode(ModelDescription(ModelIdentity("m", 1, b""), "f", model_spec()))
    message.functions.add(function=999, available=False, unavailable_reason="new")
    assert description.decode(message).spec == model_spec()


@pytest.mark.parametrize(
    "field, spec, place",
    [
        ("weights", StructureSpec.of((X, X, X)), "weights"),
        ("input", StructureSpec.of(X), "input"),
        ("batch_output", StructureSpec.of((LOSS, X, LOSS)), "batch_output"),
    ],
)
def test_an_invalid_description_is_refused(field, spec, place):
    message = description.encode(ModelDescription(ModelIdentity("m", 1, b""), "f", model_spec()))
    getattr(message, field).CopyFrom(specs.encode(spec))
    with pytest.raises(errors.StructureMismatch, match=f"^{place}: expected"):
        description.decode(message)


@pytest.mark.parametrize(
    "message, error",
    [
        (v1.StructureSpec(tree=v1.TreeDef(leaf=v1.TreeDef.Leaf())), errors.StructureMismatch),
        (
            v1.StructureSpec(tree=v1.TreeDef(leaf=v1.TreeDef.Leaf()), leaves=[v1.TensorSpec(data_type=77)]),
            errors.DTypeMismatch,
        ),
        (v1.StructureSpec(), errors.InvalidRequest),
    ],
)
def test_an_invalid_spec_is_refused(message, error):
    with pytest.raises(error):
        specs.decode(message)


def test_x_and_y_are_found_in_a_mapping_of_any_order():
    spec = model_spec(input=StructureSpec.of({"y": Y, "x": X}))
    assert (spec.x.leaves, spec.y.leaves) == ((X,), (Y,))


@pytest.mark.parametrize("nested", [(X, Y), [X, Y], {"x": X, "y": Y}, {"y": Y, "x": X}])
def test_leaves_of_x_and_y_can_be_replaced(nested):
    free = model_spec(input=StructureSpec.of(nested))
    tied = free.with_input_leaves([dataclasses.replace(X, batched=False), dataclasses.replace(Y, batched=False)])
    assert [leaf.batched for leaf in (*tied.x.leaves, *tied.y.leaves)] == [False, False]
    assert (tied.x.leaves[0].shape, tied.y.leaves[0].shape) == (X.shape, Y.shape)


def test_the_text_of_a_spec_is_like_tensorflows():
    assert repr(X) == "TensorSpec(shape=(None, 2), dtype=float32)"
    assert str(StructureSpec.of({"a": (X, None)})) == "{'a': (float32[None,2], None)}"


def test_a_structure_of_specs_refuses_other_leaves():
    with pytest.raises(errors.StructureMismatch, match=r"spec\[1\]: expected a TensorSpec, got int"):
        StructureSpec.of([X, 3])


@pytest.mark.parametrize(
    "spec, shape",
    [
        (TensorSpec((), FLOAT), ()),
        (TensorSpec((None, None, 4), FLOAT), (2, 3, 4)),
        (TensorSpec((5, None), FLOAT), (5, 3)),
        (TensorSpec(None, FLOAT), (2,)),
        (TensorSpec((None,), dtypes.STRING), (2,)),
    ],
)
def test_zeros_fit_their_spec(spec, shape):
    zeros = specs.zeros(spec, batch=2, other=3)
    assert zeros.shape == shape
    assert spec.admits_shape(zeros.shape)
    assert zeros.dtype == spec.dtype


BOOL = dtypes.BY_NAME["bool"]


def masked_spec() -> ModelSpec:
    """Two outputs, the second of which has a mask."""
    predictions = {"topic": X, "tags": TensorSpec((None, None, 5), FLOAT)}
    return model_spec(
        predictions=StructureSpec.of(predictions),
        batch_output=StructureSpec.of(BatchOutput(LOSS, predictions, None)),
        prediction_mask=StructureSpec.of({"topic": None, "tags": TensorSpec((None, None), BOOL)}),
        unused_batch_output_fields=frozenset({"loss", "prediction_mask"}),
    )


def test_masks_of_predictions_are_described():
    whole = ModelDescription(ModelIdentity("m", 3, b"\x01" * 32), "keras", masked_spec())
    assert description.decode(v1.ModelDescription.FromString(description.encode(whole).SerializeToString())) == whole


def test_a_description_without_masks_has_no_mask_field():
    message = description.encode(ModelDescription(ModelIdentity("m", 1, b""), "f", model_spec()))
    assert not message.HasField("prediction_mask")
    assert description.decode(message).spec.prediction_mask == specs.EMPTY


def test_masks_are_arguments_and_results_behind_what_they_belong_to():
    spec = masked_spec()
    assert spec.masked_leaves == (1,)
    assert list(spec.arguments[Function.WEIGHTED_LOSS]) == ["output", "label", "output_mask", "sample_weight"]
    assert list(spec.arguments[Function.UPDATE_METRICS_STATE])[-1] == "batch_output.prediction_mask"
    assert list(spec.results[Function.PREDICT_ON_BATCH]) == ["predictions", "prediction_mask"]
    assert list(spec.results[Function.FORWARD_PASS])[-1] == "batch_output.prediction_mask"
    assert spec.may_be_none("batch_output.prediction_mask")


def test_a_mask_of_other_containers_than_the_predictions_is_refused():
    message = description.encode(ModelDescription(ModelIdentity("m", 1, b""), "f", masked_spec()))
    message.prediction_mask.CopyFrom(specs.encode(StructureSpec.of([TensorSpec((None,), BOOL)])))
    with pytest.raises(errors.StructureMismatch, match="prediction_mask"):
        description.decode(message)


@pytest.mark.parametrize("copied", [lambda value: pickle.loads(pickle.dumps(value)), copy.deepcopy])
def test_a_copied_description_is_the_same_and_has_the_same_element_types(copied):
    for dtype in dtypes.ALL:
        whole = ModelDescription(
            ModelIdentity("m", 3, b"\x01" * 32),
            "keras",
            model_spec(sample_weight=StructureSpec.of(TensorSpec((None,), dtype))),
        )
        found = copied(description.decode(description.encode(whole)))
        assert found == whole
        assert found.spec.sample_weight.leaves[0].data_type is dtype


def test_facts_show_the_description_and_each_function():
    mask = StructureSpec.of(TensorSpec((None,), dtypes.BY_NAME["bool"]))
    spec = model_spec(prediction_mask=mask, unavailable={Function.WEIGHTED_LOSS: "it knows no weights"})
    described = ModelDescription(ModelIdentity("m", 3, b""), "keras", spec, "rows mix", "", "tried", ("slow", "large"))
    shown = description.facts(described)
    facts = dict(shown)
    assert facts["weights"] == "1 arrays, 6 numbers, 0.00 MiB"
    assert facts["batching"] == "no: rows mix"
    assert facts["merging metrics states"] == "yes"
    assert facts["prediction mask"].startswith("bool[None]; ")
    assert [value for name, value in shown if name == "warning"] == ["slow", "large"]
    without = dict(description.facts(dataclasses.replace(described, spec=model_spec())))
    assert set(facts) - set(without) == {"prediction mask"}
    functions = dict(description.function_facts(spec))
    assert list(functions) == [function.title for function in Function]
    assert functions["loss with sample_weight"] == "no: it knows no weights"
    assert functions["loss"] == "yes"
