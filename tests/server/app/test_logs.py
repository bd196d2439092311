"""The log: one event, one line; the request id that a caller was told; nothing that a caller sent."""

from __future__ import annotations

import datetime
import json
import logging
import sys

import numpy as np
import pytest

import forwardpass_client
from forwardpass_client import errors
from forwardpass_server.app.logs import JsonFormatter
from support.servers import ServerProcess


def formatted(message: str, *arguments: object, **fields: object) -> dict[str, object]:
    record = logging.getLogger("some.place").makeRecord(
        "some.place", logging.WARNING, "file", 1, message, arguments, None, extra=fields
    )
    line = JsonFormatter().format(record)
    assert "\n" not in line
    return json.loads(line)


def test_an_event_is_one_object_with_its_fields():
    event = formatted("it took %d s\nin all", 5, request_id="abc", place=object)
    assert datetime.datetime.fromisoformat(event.pop("time")).tzinfo is datetime.timezone.utc
    assert event == {
        "level": "warning",
        "logger": "some.place",
        "message": "it took 5 s\nin all",
        "request_id": "abc",
        "place": "<class 'object'>",
    }


def test_an_exception_is_logged_with_its_place():
    try:
        raise ValueError("wrong")
    except ValueError:
        record = logging.LogRecord("some.place", logging.ERROR, "file", 1, "it failed", (), sys.exc_info())
    event = json.loads(JsonFormatter().format(record))
    assert event["exception"].endswith("ValueError: wrong")
    assert "test_an_exception_is_logged_with_its_place" in event["exception"]


@pytest.mark.parametrize("log_format", ["json", "text"])
def test_the_log_has_the_request_id_that_the_caller_got(log_format):
    arguments = ("--factory", "crashing=support.zoo:crashing", "--factory", "broken=support.zoo:keras_batch")
    arguments += ("--required-models", "crashing")
    with ServerProcess(*arguments, "--log-format", log_format) as server:
        with forwardpass_client.connect(server.address) as client:
            with pytest.raises(errors.InternalError) as raised:
                client.model("crashing").predict_on_batch(((), ()), np.float32([1234567]))
        log = server.wait_for_log(raised.value.request_id)
    assert "1234567" not in log
    assert "secret" not in log
    if log_format == "json":
        lines = [line for line in log.splitlines() if line.startswith("{")]
        # What native libraries print before TensorFlow is told to be silent is no event.
        events = [json.loads(line) for line in lines]
        (event,) = [event for event in events if event.get("request_id") == raised.value.request_id]
        assert event["level"] == "error"
        assert event["error"].isidentifier()
        assert event["failed"].endswith("/PredictOnBatch")
        assert any("broken/1 failed to load" in event["message"] and "exception" in event for event in events)
        assert not any("Traceback" in line for line in log.splitlines() if not line.startswith("{"))
    else:
        assert f"request {raised.value.request_id}: " in log
