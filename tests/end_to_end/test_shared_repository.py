"""A model repository with a URL: in a folder, and in S3."""

from __future__ import annotations

import pathlib
import signal
import tempfile

import numpy as np
import pytest
from click.testing import CliRunner

import forwardpass_client
from forwardpass.wire import errors
from forwardpass_server.app.cli import main
from forwardpass_server.catalog.upload import COMPLETE
from support import zoo
from support.servers import ServerProcess, wait_until


def upload(folder: pathlib.Path, url: str) -> None:
    """Runs `forwardpass-server upload`."""
    done = CliRunner().invoke(main, ["upload", str(folder), url])
    assert done.exit_code == 0, done.output


def versions(client: forwardpass_client.Client) -> dict[str, str]:
    return {f"{one.name}/{one.version}": one.state for one in client.models()}


def test_versions_are_served_from_a_url_as_from_a_folder(places, repository, server, tmp_path):
    place, cache = places.make(), tmp_path / "cache"
    source = repository / "keras_cnn" / "1"
    upload(source, f"{place.url}/cnn/1")
    arguments = ("--model-repository", place.url, "--repository-poll", "0.2", "--repository-cache", str(cache))
    with ServerProcess(*arguments, environment=dict(place.environment)) as shared:
        with forwardpass_client.connect(shared.address) as client:
            model = client.model("cnn")
            x = zoo.inputs(model, 3)
            expected = model.predict_on_batch(model.initial_weights, x)
            with forwardpass_client.connect(server.address) as there:
                local = there.model("keras_cnn", version=1)
                assert local.content_hash == model.content_hash
                np.testing.assert_array_equal(local.predict_on_batch(model.initial_weights, x), expected)

            # A version whose upload has not ended is not loaded.
            store = place.store()
            for path in source.rglob("*"):
                if path.is_file():
                    store.write(f"cnn/2/{path.relative_to(source).as_posix()}", path.read_bytes())
            shared.wait_for_log(f"cnn/2 is skipped: it has no {COMPLETE}")
            assert versions(client) == {"cnn/1": "available"}
            store.write(f"cnn/2/{COMPLETE}", b"")
            wait_until(lambda: versions(client) == {"cnn/1": "available", "cnn/2": "available"})

            # A removed version is unloaded, and its copy goes.
            for one in list(store.list("cnn/1/")):
                store.remove(one.name)
            wait_until(lambda: versions(client) == {"cnn/2": "available"})
            with pytest.raises(errors.ModelVersionNotFound):
                client.model("cnn", version=1)
            wait_until(lambda: len([one for one in cache.glob("*/.versions/*") if one.is_dir()]) == 1)
        assert shared.terminate() == 0
    assert list(cache.iterdir()) == []


def test_a_server_starts_without_a_cache_folder_and_removes_its_copies(places, repository, tmp_path):
    place = places.make()
    upload(repository / "no_metrics" / "1", f"{place.url}/tiny/1")
    environment = {**place.environment, "TMPDIR": str(tmp_path)}
    with ServerProcess("--model-repository", place.url, environment=environment) as server:
        assert "1 of 1 models" in server.ready_line
        (copies,) = tmp_path.glob("forwardpass-models-*")
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0
        assert not copies.exists()
    assert pathlib.Path(tempfile.gettempdir()) != tmp_path


def test_uploads_and_sweeps_name_what_is_wrong(tmp_path):
    (tmp_path / "empty").mkdir()
    for arguments, message in [
        (["upload", str(tmp_path / "empty"), "http://host/a"], "URL: expected a folder, or a URL file:///FOLDER"),
        (["upload", str(tmp_path / "empty"), (tmp_path / "to").as_uri()], "found no files"),
        (["sweep-weights", "s3://"], "URL: expected a folder, or a URL file:///FOLDER"),
        (["sweep-weights", "file:///proc/none"], "No such file or directory"),
    ]:
        done = CliRunner().invoke(main, arguments)
        assert done.exit_code == 1
        assert message in done.output
    done = CliRunner().invoke(main, ["sweep-weights", (tmp_path / "tier").as_uri(), "--older-than", "1"])
    assert done.output == "deleted 0 sets and 0 tensors, 0 bytes\n"
