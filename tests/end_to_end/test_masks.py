"""Models whose predictions keep a Keras mask, served and compared with Keras number by number.

Tolerance everywhere: the server composes and fuses graphs that Keras runs one by one, and so sums in another order;
float32 keeps seven digits. Counted padding would change each number by more than a hundredth.
"""

from __future__ import annotations

import asyncio
import copy
import pickle
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import forwardpass_client
from forwardpass_client import MaskedPredictions, MaskMissing, errors
from forwardpass_client.cli.commands import forwardpass
from support import masked_models
from support.masked_models import MODELS
from support.servers import ServerProcess

EXAMPLES = 5


def close(found: Any, expected: Any) -> bool:
    return bool(np.allclose(found, expected, rtol=1e-5, atol=1e-6))


@pytest.fixture(scope="module")
def masked_server(tmp_path_factory) -> Iterator[ServerProcess]:
    repository = tmp_path_factory.mktemp("masked")
    masked_models.write_repository(repository)
    factory = "two_outputs=support.masked_models:two_outputs"
    with ServerProcess("--model-repository", str(repository), "--factory", factory) as process:
        yield process


@pytest.fixture(scope="module")
def masked_client(masked_server) -> Iterator[forwardpass_client.Client]:
    with forwardpass_client.connect(masked_server.address) as connected:
        yield connected


@pytest.fixture(params=MODELS)
def case(request, masked_client) -> tuple[Any, Any, Any]:
    """A remote model, the same model in Keras, and its batches: (examples, seed) -> (x, y, sample_weight)."""
    return masked_client.model(request.param), masked_models.build(request.param), MODELS[request.param][0].batch


def test_the_predictions_have_a_mask_and_the_description_says_so(case):
    remote, model, batch = case
    x, _, _ = batch(EXAMPLES, 0)
    expected = model(x)
    predictions = remote.predict_on_batch(remote.initial_weights, x, training=False)
    assert close(predictions, expected)
    assert np.array_equal(predictions.mask, expected._keras_mask)
    assert not predictions.mask.all()
    (spec,) = remote.description.spec.prediction_mask.leaves
    assert spec.admits_shape(predictions.mask.shape)


@pytest.mark.parametrize("is_held", [False, True], ids=["weights by value", "weights by id"])
@pytest.mark.parametrize("training", [False, True])
def test_forward_pass_and_loss_equal_keras(case, training, is_held):
    remote, model, batch = case
    x, y, sample_weight = batch(EXAMPLES, 1)
    weights = remote.initial_weights
    found = remote.forward_pass(remote.put_weights(weights) if is_held else weights, (x, y), training)
    predictions = model(x, training=training)
    added = masked_models.penalties(model)
    loss = float(model.compute_loss(x=x, y=y, y_pred=predictions))
    weighted = float(model.compute_loss(x=x, y=y, y_pred=predictions, sample_weight=sample_weight))
    assert close(found.predictions, predictions)
    assert close(found.loss, loss)
    assert close(remote.loss(found.predictions, y) + added, loss)
    assert close(remote.loss(found.predictions, y, sample_weight) + added, weighted)


def test_the_forward_pass_equals_keras_evaluate(case):
    remote, model, batch = case
    x, y, _ = batch(EXAMPLES, 2)
    found = remote.forward_pass(remote.initial_weights, (x, y), training=False)
    assert close(found.loss, model.evaluate(x, y, batch_size=EXAMPLES, verbose=0, return_dict=True)["loss"])


@pytest.mark.parametrize("weighted", [False, True])
def test_metrics_by_value_in_sessions_and_of_evaluate_equal_keras(case, weighted):
    remote, model, batch = case
    batches = [batch(2 + seed, seed)[: 3 if weighted else 2] for seed in range(3)]
    expected = masked_models.evaluate(model, batches)
    handle = remote.put_weights(remote.initial_weights)
    state = remote.initialize_metrics_state()
    with remote.metrics_session() as updated, remote.metrics_session() as run:
        for x, y, *sample_weight in batches:
            output = remote.forward_pass(handle, (x, y), training=False)
            state = remote.update_metrics_state(state, y, output, *sample_weight)
            updated.update(y, output, *sample_weight)
            run.forward_pass(handle, (x, y), False, *sample_weight)
        results = [remote.finalize_metrics(state), updated.result(), run.result(), remote.evaluate(handle, batches)]
    for metrics in results:
        assert close(list(metrics.values()), list(expected.values()))


def test_concurrent_callers_each_get_their_own_loss_and_mask(masked_server):
    model = masked_models.build("masked_rows")
    batches = [MODELS["masked_rows"][0].batch(1 + seed % 4, seed) for seed in range(16)]

    async def run() -> list[Any]:
        async with forwardpass_client.connect_async(masked_server.address) as client:
            remote = await client.model("masked_rows")
            assert not remote.description.unbatchable_reason
            handle = await remote.put_weights(await remote.initial_weights)
            outputs = await asyncio.gather(*(remote.forward_pass(handle, (x, y), False) for x, y, _ in batches))
            losses = await asyncio.gather(
                *(remote.loss(output.predictions, y) for output, (_, y, _) in zip(outputs, batches, strict=True))
            )
            assert close([output.loss for output in outputs], losses)
            return outputs

    for output, (x, y, _) in zip(asyncio.run(run()), batches, strict=True):
        predictions = model(x)
        assert np.array_equal(output.predictions.mask, x.any(-1))
        assert close(output.predictions, predictions)
        assert close(output.loss, model.compute_loss(x=x, y=y, y_pred=predictions))
        assert int(output.num_examples) == len(x)


@pytest.mark.parametrize("training", [False, True])
def test_only_outputs_with_a_mask_are_masked(masked_client, training):
    remote, model = masked_client.model("two_outputs"), masked_models.two_outputs_in_keras()
    assert str(remote.description.spec.prediction_mask) == "{'topic': None, 'tags': bool[None,None]}"
    x, y = masked_models.two_outputs_batch(EXAMPLES, 0)
    handle = remote.put_weights(remote.initial_weights)
    found = remote.forward_pass(handle, (x, y), training)
    loss = float(model.compute_loss(x=x, y=y, y_pred=model(x, training=training)))
    assert close(found.loss, loss)
    assert close(remote.loss(found.predictions, y), loss)
    state = remote.update_metrics_state(remote.initialize_metrics_state(), y, found)
    metrics = remote.finalize_metrics(state)
    expected = masked_models.evaluate(model, [(x, y)])
    assert expected.keys() <= metrics.keys()
    assert all(close(metrics[name], value) for name, value in expected.items())
    with pytest.warns(MaskMissing, match="loss: output does not carry its Keras mask"):
        remote.loss({**found.predictions, "tags": np.asarray(found.predictions["tags"])}, y)


@pytest.fixture
def output(masked_client) -> tuple[Any, Any, Any]:
    """A remote model, labels, and a batch output."""
    remote = masked_client.model("lstm")
    x, y, _ = MODELS["lstm"][0].batch(EXAMPLES, 4)
    return remote, y, remote.forward_pass(remote.initial_weights, (x, y), training=False)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_a_copy_of_a_batch_output_keeps_the_mask(output, copied):
    remote, y, batch_output = output
    again = copied(batch_output)
    assert isinstance(again.predictions, MaskedPredictions)
    assert np.array_equal(again.predictions, batch_output.predictions)
    assert np.array_equal(remote.loss(again.predictions, y), batch_output.loss)
    assert again._replace(loss=None).predictions.mask is not None


def test_predictions_that_lost_their_mask_count_completely_with_a_warning(output):
    remote, y, batch_output = output
    plain = np.asarray(batch_output.predictions)
    whole = np.ones_like(batch_output.predictions.mask)
    with pytest.warns(MaskMissing, match="loss: output does not carry its Keras mask") as caught:
        counted = remote.loss(plain, y)
    assert caught[0].filename == __file__
    # Keras's number for predictions without a mask: the mean over all positions.
    assert close(counted, -np.log(np.take_along_axis(plain, y[..., None], -1)).mean())
    assert np.array_equal(remote.loss(plain, y, mask=whole), counted)
    assert not close(counted, batch_output.loss)
    state = remote.initialize_metrics_state()
    with pytest.warns(MaskMissing, match="update_metrics_state: batch_output.predictions does not carry") as caught:
        unmasked = remote.update_metrics_state(state, y, batch_output._replace(predictions=plain))
    assert caught[0].filename == __file__
    with remote.metrics_session() as session:
        with pytest.warns(MaskMissing) as caught:
            session.update(y, batch_output._replace(predictions=plain))
        assert caught[0].filename == __file__
        assert session.result() == remote.finalize_metrics(unmasked)


def test_a_mask_can_be_given(output):
    remote, y, batch_output = output
    plain = np.asarray(batch_output.predictions)
    mask = batch_output.predictions.mask
    assert np.array_equal(remote.loss(plain, y, mask=mask), batch_output.loss)
    state = remote.initialize_metrics_state()
    by_mask = remote.update_metrics_state(state, y, batch_output._replace(predictions=plain), mask=mask)
    expected = remote.finalize_metrics(remote.update_metrics_state(state, y, batch_output))
    assert remote.finalize_metrics(by_mask) == expected
    with remote.metrics_session() as session:
        session.update(y, batch_output._replace(predictions=plain), mask=mask)
        assert session.result() == expected
    with pytest.raises(errors.DTypeMismatch, match="output_mask: expected bool"):
        remote.loss(plain, y, mask=mask.astype(np.float32))


def test_a_mask_for_a_model_without_one_is_refused(client):
    remote = client.model("keras_cnn")
    with pytest.raises(errors.StructureMismatch, match="mask: expected None: predictions of model keras_cnn/2 have no"):
        remote.loss(np.zeros((1, 5), np.float32), np.int64([0]), mask=np.array([True]))


def test_predictions_of_a_pipeline_carry_their_mask(output):
    remote, y, batch_output = output
    x, _, _ = MODELS["lstm"][0].batch(EXAMPLES, 4)
    with remote.pipeline(remote.initial_weights) as pipeline:
        found = pipeline.forward_pass((x, y), training=False).result()
    assert np.array_equal(found.predictions.mask, batch_output.predictions.mask)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert close(remote.loss(found.predictions, y), batch_output.loss)


def test_the_command_says_that_loss_needs_the_mask(masked_server):
    found = CliRunner().invoke(forwardpass, ["describe", masked_server.address, "lstm"])
    shown = " ".join(found.output.split())
    assert "bool[None,None]; loss(output, label) counts masked positions unless output carries its mask" in shown


def test_a_session_answers_without_predictions_and_without_their_mask(output):
    remote, y, batch_output = output
    x, _, _ = MODELS["lstm"][0].batch(EXAMPLES, 4)
    with remote.metrics_session() as session:
        found = session.forward_pass(remote.initial_weights, (x, y), with_predictions=False)
    assert found.predictions is None
    assert close(found.loss, batch_output.loss)
