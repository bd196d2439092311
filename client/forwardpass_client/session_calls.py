"""Calls of metric sessions: requests from arguments, results from responses."""

from __future__ import annotations

import dataclasses
from typing import Any

from forwardpass import v1
from forwardpass.wire import conform, errors, fields, messages
from forwardpass.wire.chunks import Pieces
from forwardpass.wire.description import BatchOutput, Function
from forwardpass.wire.methods import METHODS
from forwardpass.wire.structures import Structure
from forwardpass_client.calls import Call, ModelCalls, ResultT, batch_output_values, check_training, nested, x_and_y


class SessionCalls(ModelCalls):
    """The calls of one version of a model, those of its metric sessions included.

    An update has no identity yet: see `identified`.
    """

    def open_session(self, session_id: bytes, resume: bool, initial_state: Any) -> Call[int]:
        """How many updates the session has counted. initial_state: None for the state before the first batch."""
        request = v1.OpenSessionRequest(model=self._selector, session_id=session_id, resume=resume)
        # Raises FunctionNotAvailable for a model without metrics.
        self._conform(Function.INITIALIZE_METRICS_STATE, {})
        parts = {}
        if initial_state is not None:
            parts["initial_state"] = conform.conform(initial_state, self._spec.metrics_state, "initial_state")

        def read(data: bytes) -> int:
            response, _ = messages.decode(v1.OpenSessionResponse, data)
            self._check_identity(response.model)
            return response.updates

        return self._call("OpenSession", request, parts, read)

    def update_session(self, labels: Any, batch_output: Any, sample_weight: Any, mask: Any = None) -> Call[None]:
        function = Function.UPDATE_METRICS_STATE if sample_weight is None else Function.WEIGHTED_UPDATE_METRICS_STATE
        values = {"labels": labels, "sample_weight": sample_weight, **batch_output_values(batch_output)}
        place = "batch_output.prediction_mask"
        values[place] = self._mask(function, place, values["batch_output.predictions"], mask)
        parts = self._conform(function, values, {"state"})
        return self._call(
            "UpdateSession",
            v1.UpdateSessionRequest(),
            parts,
            lambda data: self._acknowledge(v1.UpdateSessionResponse, data),
        )

    def forward_pass_in_session(
        self,
        model_weights: Any,
        batch_input: Any,
        training: bool,
        sample_weight: Any,
        with_predictions: bool,
        *,
        names_weights: bool = False,
    ) -> Call[BatchOutput]:
        """names_weights: always by id, so that two calls with equal weights are equal requests."""
        request = v1.ForwardPassInSessionRequest(
            training=check_training(training), without_predictions=not with_predictions
        )

        def read(data: bytes) -> BatchOutput:
            return self._batch_output(self._read(v1.ForwardPassInSessionResponse, data))

        return self._call_with_weights(
            Function.FORWARD_PASS,
            "ForwardPassInSession",
            request,
            model_weights,
            self._batch_values(batch_input),
            read,
            self._sample_weight(sample_weight),
            names_weights=names_weights,
        )

    def merge_into_session(self, other_session_id: bytes, state: Any) -> Call[None]:
        """state: None for the state of the other session."""
        if self.model.unmergeable_reason:
            raise errors.FunctionNotAvailable(
                f"model {self.model.identity}: merging metrics states is not available: {self.model.unmergeable_reason}"
            )
        parts = {} if state is None else {"state": conform.conform(state, self._spec.metrics_state, "state")}
        return self._call(
            "MergeIntoSession",
            v1.MergeIntoSessionRequest(other_session_id=other_session_id),
            parts,
            lambda data: self._acknowledge(v1.MergeIntoSessionResponse, data),
        )

    def session_state(self, session_id: bytes) -> Call[Any]:
        return self._call(
            "GetSessionState",
            v1.GetSessionStateRequest(session_id=session_id),
            {},
            lambda data: nested(self._read(v1.GetSessionStateResponse, data), "state"),
        )

    def session_result(self, session_id: bytes) -> Call[Any]:
        return self._call(
            "GetSessionResult",
            v1.GetSessionResultRequest(session_id=session_id),
            {},
            lambda data: nested(self._read(v1.GetSessionResultResponse, data), "metrics"),
        )

    def evaluation_batch(self, batch_input: Any, sample_weight: Any, update_id: bytes) -> bytes:
        """One batch of an evaluation."""
        parts = {
            **self._conform(Function.FORWARD_PASS, self._batch_values(batch_input)),
            **self._sample_weight(sample_weight),
        }
        return messages.encode(v1.EvaluationBatch(update_id=update_id), parts, self._max_request_bytes)

    def check_position(self, position: v1.EvaluationPosition) -> None:
        """Raises ModelChanged where the evaluation runs on another model than the one that was looked up."""
        self._check_identity(position.model)

    def _batch_values(self, batch_input: Any) -> dict[str, Any]:
        x, y = x_and_y(batch_input)
        return {"batch_input.x": x, "batch_input.y": y}

    def _sample_weight(self, sample_weight: Any) -> dict[str, Structure]:
        if sample_weight is None:
            return {}
        self._check_available(Function.WEIGHTED_UPDATE_METRICS_STATE)
        return {"sample_weight": conform.conform(sample_weight, self._spec.sample_weight, "sample_weight")}

    def _acknowledge(self, response_type: Any, data: bytes) -> None:
        self._read(response_type, data)


# The first field of every request that is an update.
_UPDATE = v1.UpdateSessionRequest.DESCRIPTOR.fields_by_name["update"].number


def identified(call: Call[ResultT], update: v1.UpdateIdentity) -> Call[ResultT]:
    """An update with its identity: which update of which session it is."""
    identity = update.SerializeToString()
    start = fields.prefix(_UPDATE, len(identity)) + identity
    request = call.request.after(start) if isinstance(call.request, Pieces) else start + call.request
    return dataclasses.replace(call, request=request)


def close_session(session_id: bytes) -> Call[None]:
    request = v1.CloseSessionRequest(session_id=session_id)
    return Call(METHODS["CloseSession"].path, request.SerializeToString(), lambda data: None)
