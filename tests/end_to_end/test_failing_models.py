"""Models that fail in a call, on a server that goes on."""

from __future__ import annotations

import concurrent.futures

import numpy as np
import pytest

import forwardpass_client
from forwardpass_client import errors
from support.servers import ServerProcess

# More floats than any machine has room for addresses.
_ABSURD = 2**46


def test_a_model_that_crashes_or_takes_all_memory_fails_its_own_call_and_no_other():
    factories = [f"--factory={name}=support.zoo:{name}" for name in ("crashing", "greedy", "patient")]
    with ServerProcess(*factories) as server, forwardpass_client.connect(server.address) as client:
        crashing, greedy, patient = map(client.model, ("crashing", "greedy", "patient"))

        def crash() -> None:
            with pytest.raises(errors.InternalError, match=r"the server failed; request [0-9a-f]{16}"):
                crashing.predict_on_batch(((), ()), np.float32([1]))

        def exhaust() -> None:
            with pytest.raises(errors.OutOfMemory):
                greedy.predict_on_batch(((), ()), [_ABSURD])

        def work() -> None:
            assert patient.predict_on_batch(patient.initial_weights, [3]).tolist() == [[6, 7]]

        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            # TensorFlow waits ten seconds for memory to come back, on a thread that others may need.
            for done in [pool.submit(one) for one in (exhaust, exhaust, *(crash, work) * 20)]:
                done.result()
        assert crashing.predict_on_batch(((), ()), np.float32([0])).tolist() == [0]
        assert greedy.predict_on_batch(((), ()), [5]).tolist() == [5]
        assert client.is_ready()
