"""`help()` of every public class and method says what a caller cannot see."""

from __future__ import annotations

import inspect
import re

import pytest

import forwardpass_client
from support.public_calls import CALLS, PUBLIC, public

ARRAYS = {
    "batch_input": r"\[B, \.\.\.\]",
    "batches": r"\[B, \.\.\.\]",
    "x": r"\[B, \.\.\.\]",
    "output": r"\[B, \.\.\.\]",
    "label": r"\[B, \.\.\.\]",
    "labels": r"\[B, \.\.\.\]",
    "sample_weight": r"float32\[B\]",
    "mask": r"bool\[B, \.\.\.\]|as of",
}
"""Arguments that are arrays, and how a text gives their shape."""

# Their errors and arguments are those of the method that they name.
REFERRING = {"Pipeline.forward_pass", "Model.evaluate_many"}


def methods() -> list[tuple[str, object]]:
    return [
        (place, getattr(cls, place.partition(".")[2]))
        for index in (0, 1)
        for place in sorted(public(index))
        for cls in (PUBLIC[place.partition(".")[0]][index],)
    ]


@pytest.mark.parametrize("place, method", methods())
def test_every_public_method_has_a_text_of_its_own(place, method):
    text = inspect.getdoc(method)
    assert text, place
    assert not re.match(r"See\b|`\w+` for", text), (place, text)


@pytest.mark.parametrize("place, method", [(place, method) for place, method in methods() if place in CALLS])
def test_every_call_names_its_arguments_their_shapes_and_its_errors(place, method):
    text = inspect.getdoc(method)
    function = method.fget if isinstance(method, property) else method
    for name in inspect.signature(function).parameters:
        if name == "self":
            continue
        assert re.search(rf"\b{name}\b", text), (place, name)
        if name in ARRAYS and place not in REFERRING and not place.startswith("Client."):
            assert re.search(ARRAYS[name], text), (place, name)
    assert re.search(r"Raises|errors: as of|DeadlineExceeded", text), place


@pytest.mark.parametrize("name", [name for name in forwardpass_client.__all__ if name != "errors"])
def test_every_public_name_has_a_text(name):
    assert inspect.getdoc(getattr(forwardpass_client, name))


def test_the_version_is_that_of_the_package():
    import importlib.metadata

    assert forwardpass_client.__version__ == importlib.metadata.version("forwardpass")
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = forwardpass_client.nonsense
