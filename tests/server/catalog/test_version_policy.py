"""Version policies: the versions that they serve, and invalid files."""

from __future__ import annotations

import re

import pytest

from forwardpass_server.catalog import version_policy
from forwardpass_server.catalog.version_policy import VersionPolicies
from forwardpass_server.errors import ModelLoadError


@pytest.mark.parametrize(
    "text, served",
    [
        (b"{}", {1, 2, 5}),
        (b'{"serve": "all"}', {1, 2, 5}),
        (b'{"serve": {"latest": 2}}', {2, 5}),
        (b'{"serve": {"latest": 9}}', {1, 2, 5}),
        (b'{"serve": [1, 7]}', {1}),
        (b'{"serve": {"latest": 1}, "labels": {"stable": 1}}', {1, 5}),
    ],
)
def test_a_policy_selects_the_versions_to_serve(text, served):
    assert version_policy.parse(text).served([5, 1, 2]) == served


@pytest.mark.parametrize(
    "text, message",
    [
        (b"{", "expected JSON"),
        (b"\xff", "expected JSON"),
        (b"[]", "expected an object of serve and labels"),
        (b'{"keep": 1}', "expected an object of serve and labels"),
        (b'{"serve": "latest"}', 'serve: expected "all", {"latest": N} or a list of versions, got latest'),
        (b'{"serve": {"latest": 0}}', "serve: expected"),
        (b'{"serve": []}', "serve: expected"),
        (b'{"serve": [true]}', "serve: expected"),
        (b'{"labels": {"a b": 1}}', "labels: expected versions by names like"),
        (b'{"labels": {"stable": "1"}}', "labels: expected"),
    ],
)
def test_an_invalid_policy_is_refused_with_its_place(tmp_path, text, message):
    with pytest.raises(ModelLoadError, match=re.escape("forwardpass-versions.json: ")) as caught:
        version_policy.parse(text)
    assert message in str(caught.value)
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / version_policy.FILE).write_bytes(text)
    with pytest.raises(ModelLoadError, match=r"m/forwardpass-versions\.json: "):
        VersionPolicies(tmp_path)


def test_an_unreadable_policy_is_refused_and_an_unrelated_folder_is_ignored(tmp_path):
    (tmp_path / "lost+found").mkdir()
    (tmp_path / "circle").symlink_to("circle")
    VersionPolicies(tmp_path).refresh()
    (tmp_path / "m" / version_policy.FILE).mkdir(parents=True)
    with pytest.raises(ModelLoadError, match=r"m/forwardpass-versions\.json: it cannot be read \(Is a directory\)"):
        VersionPolicies(tmp_path)
