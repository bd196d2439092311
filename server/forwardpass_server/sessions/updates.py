"""The two kinds of session updates: one counts a batch, the other adds a metrics state."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from forwardpass.wire import conform, errors
from forwardpass.wire.functions import SAMPLE_WEIGHT, Function
from forwardpass.wire.structures import Structure
from forwardpass_server.calls.execution import Executor, Invocation
from forwardpass_server.calls.plans import Servable
from forwardpass_server.sessions.records import UpdateIdentity
from forwardpass_server.sessions.session import Session, Update


def counting(
    executor: Executor, identity: UpdateIdentity, parts: Mapping[str, Structure], size_bytes: int, outcome: bytes = b""
) -> Update:
    """The update that counts one batch.

    parts: labels, the fields of a batch output, and maybe sample_weight. size_bytes: of their message.
    outcome: see `Update`.
    """
    function = Function.UPDATE_METRICS_STATE
    if SAMPLE_WEIGHT in parts:
        function = function.with_sample_weight

    async def count(servable: Servable, state: Structure, applied: int) -> Structure:
        invocation = Invocation(function, {**parts, "state": state}, size_bytes)
        return (await executor.run(servable, invocation))["state"]

    return Update((identity,), count, outcome)


def update_parts(batch: Mapping[str, Structure], results: Mapping[str, Structure]) -> dict[str, Structure]:
    """The parts that `counting` takes, from the request and the results of a forward pass."""
    parts = {"labels": batch["batch_input.y"], **results}
    if SAMPLE_WEIGHT in batch:
        parts[SAMPLE_WEIGHT] = batch[SAMPLE_WEIGHT]
    return parts


def adding(session: Session, identity: UpdateIdentity, state: Structure) -> Update:
    """The update that adds a metrics state to the state of a session.

    Raises FunctionNotAvailable where states of the model cannot be added, StructureMismatch, DTypeMismatch and
    ShapeMismatch.
    """
    reason = session.servable.model.description.unmergeable_reason
    if reason:
        raise errors.FunctionNotAvailable(f"merging metrics states is not available: {reason}")
    added = conform.check(state, session.servable.spec.metrics_state, "state")

    async def add(servable: Servable, state: Structure, applied: int) -> Structure:
        for path, one, other in zip(state.tree.paths("state"), state.leaves, added, strict=True):
            if one.shape != other.shape:
                # numpy would broadcast one of them.
                raise errors.ShapeMismatch(place=path, expected=f"shape {one.shape}", found=f"{other.shape}")
        # numpy returns a scalar, not an array, for the sum of two arrays without dimensions.
        leaves = [np.asarray(one + other) for one, other in zip(state.leaves, added, strict=True)]
        return Structure(servable.spec.metrics_state.tree, leaves)

    return Update((identity,), add)
