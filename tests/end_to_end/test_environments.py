"""A server among other people's files, without a home, and where nothing can be written."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

import pytest

import forwardpass_client
from support import confinement
from support.golden import FOLDER
from support.servers import ServerProcess, wait_until

NOBODY = 65534


@pytest.fixture
def models():
    """A repository with one model, which any user may read: pytest's own folders are for one user alone."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        shutil.copytree(FOLDER / "no_metrics" / "saved_model", pathlib.Path(folder) / "models" / "m" / "1")
        yield pathlib.Path(folder) / "models"


def forbidden(folder: pathlib.Path) -> pathlib.Path:
    """A folder that only another user may look into."""
    folder.mkdir()
    os.chown(folder, NOBODY, NOBODY)
    folder.chmod(0o700)
    return folder


def passed_over(server: ServerProcess) -> list[str]:
    return [line.split(" is skipped")[0].split()[-1] for line in server.log if " is skipped: " in line]


def test_foreign_folders_are_skipped_with_one_warning_each(models):
    for path in ("lost+found", ".Trash-0", "another-team", "m/1/lost+found"):
        forbidden(models / path)
    (models / "dangling").symlink_to(models / "gone")
    (models / "m" / "3").write_text("a file")
    limits = confinement.without_reading_everything()
    with ServerProcess("--model-repository", str(models), "--repository-poll", "0.1", prefix=limits) as server:
        assert "1 of 1 models" in server.ready_line
        with forwardpass_client.connect(server.address) as client:
            forbidden(models / "later-team")
            shutil.copytree(FOLDER / "no_metrics" / "saved_model", models / "m" / ".2")
            (models / "m" / ".2").rename(models / "m" / "2")
            wait_until(lambda: "m 2 available" in [f"{one.name} {one.version} {one.state}" for one in client.models()])
            assert len({one.content_hash for one in client.models()}) == 1
        server.terminate()
    named = passed_over(server)
    assert sorted(name for name in named if not name.startswith(str(models))) == [
        "another-team",
        "dangling",
        "later-team",
        "lost+found",
        "m/3",
    ]
    # Of a volume that is mounted as a version.
    assert str(models / "m" / "1" / "lost+found") in named


def serve(prefix: list[str], *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A server that does not start."""
    command = [sys.executable, "-m", "forwardpass_server.app.cli", "serve", "--metrics-port", "-1", *arguments]
    return subprocess.run(
        [*prefix, *command], env={**os.environ, **environment}, capture_output=True, text=True, timeout=300, cwd="/"
    )


@pytest.mark.parametrize(
    "prefix, environment, reason",
    [
        (confinement.as_nobody_in_particular, {}, "the user has no home folder"),
        (confinement.with_read_only_root, {"HOME": "/root", "TMPDIR": "/dev/shm"}, "Read-only file system"),
        (list, {"HOME": "/proc/none"}, "No such file or directory"),
        (list, {"XDG_STATE_HOME": "/proc/none"}, "No such file or directory"),
    ],
)
def test_a_start_without_a_folder_for_sessions_ends_with_an_error_that_names_the_setting(
    models, prefix, environment, reason
):
    finished = serve(prefix(), "--model-repository", str(models), "--port", "18500", **environment)
    assert finished.returncode == 1
    (sentence,) = (line for line in finished.stderr.splitlines() if line.startswith("Error: "))
    assert "Traceback" not in finished.stderr
    assert sentence.startswith("Error: --session-store: the default file cannot be used: ")
    assert reason in sentence
    assert "sqlite:///PATH" in sentence


def test_a_start_without_a_temporary_folder_ends_with_an_error_that_says_so(models):
    finished = serve(confinement.with_read_only_root(), "--model-repository", str(models), TMPDIR="/proc")
    assert finished.returncode == 1
    assert finished.stderr.startswith("Error: TensorFlow needs a writable folder for temporary files")
    assert "TMPDIR" in finished.stderr
    assert len(finished.stderr.splitlines()) == 1


def test_a_server_runs_on_a_read_only_root_as_an_unnamed_user(models):
    prefix = [*confinement.with_read_only_root(), *confinement.as_nobody_in_particular()]
    arguments = ("--model-repository", str(models), "--session-store", "memory://")
    with ServerProcess(*arguments, prefix=prefix, environment={"TMPDIR": "/dev/shm"}) as server:
        with forwardpass_client.connect(server.address) as client:
            model = client.model("m")
            assert model.initial_weights
            assert client.is_ready()
